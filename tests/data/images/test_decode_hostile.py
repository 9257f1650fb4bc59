"""Damaged and hostile files: `decode` refuses them with a reason, and neither waits nor crashes."""

import io
import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mixlab.data.images import decode as decode_module
from mixlab.data.images.decode import decode, describe
from mixlab.data.images.modality import IMAGES
from mixlab.data.listing import files_below
from mixlab.errors import ExampleError

MAKE_DAMAGED = Path(__file__).resolve().parents[4] / "shared" / "data" / "make_damaged.py"


def noise():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))


def encode(image, format):
    out = io.BytesIO()
    image.save(out, format)
    return out.getvalue()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"])
def test_a_file_cut_anywhere_is_refused(format):
    data = encode(noise(), format)
    for keep in np.linspace(0, len(data) * 0.9, 25).astype(int):
        with pytest.raises(ExampleError) as caught:
            decode(data[:keep])
        assert "\n" not in str(caught.value)
        assert "0x" not in str(caught.value)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"])
def test_no_damage_raises_anything_but_an_image_error(format):
    data = encode(noise(), format)
    rng = np.random.default_rng(1)
    for _ in range(150):
        damaged = bytearray(data)
        for at in rng.integers(0, len(data), rng.integers(1, 8)):
            damaged[at] = rng.integers(0, 256)
        try:
            result = decode(bytes(damaged))
        except ExampleError:
            continue
        assert result.dtype == np.uint8
        assert result.ndim == 3


def test_formats_outside_the_list_are_refused(tmp_path):
    for format in ("PPM", "ICO", "PCX", "TGA"):
        with pytest.raises(ExampleError, match="not an image, or not of a supported format"):
            decode(encode(noise(), format))
    path = tmp_path / "drawing.png"
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    with pytest.raises(ExampleError) as caught:
        decode(path)
    assert caught.value.where == str(path)


@pytest.mark.parametrize(
    ("format", "side"), [("PNG", 10_001), ("PNG", 12_000), ("JPEG", 10_001), ("GIF", 20_000)]
)
def test_too_many_pixels_are_refused_before_decoding(format, side, monkeypatch):
    small = bytearray(encode(Image.new("L", (8, 8)), format))
    size = struct.pack("<HH" if format == "GIF" else ">II" if format == "PNG" else ">HH", side, side)
    at = {"PNG": 16, "GIF": 6, "JPEG": small.find(b"\xff\xc0") + 5}[format]
    small[at : at + len(size)] = size
    if format == "PNG":
        small[29:33] = struct.pack(">I", zlib.crc32(small[12:29]))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ExampleError, match="more than 100 million pixels"):
        decode(bytes(small))


def test_a_picture_just_below_the_cap_raises_no_bomb_warning():
    data = encode(Image.new("1", (9_500, 9_500)), "PNG")  # above Pillow's own limit for warnings
    assert describe(data) == (9_500, 9_500, "1", "PNG")


def test_a_file_of_too_many_bytes_is_refused_before_reading(tmp_path):
    path = tmp_path / "large.jpg"
    with open(path, "wb") as file:
        file.truncate(decode_module.MAX_BYTES + 1)
    with pytest.raises(ExampleError, match="larger than 64 MiB"):
        decode(path)


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    for path in (tmp_path / "pipe.jpg", tmp_path / "folder.jpg", Path("/dev/zero")):
        with pytest.raises(ExampleError, match="not a regular file"):
            decode(path)
    (tmp_path / "a.jpg").symlink_to("b.jpg")
    with pytest.raises(ExampleError, match="a link to a missing file"):
        decode(tmp_path / "a.jpg")
    (tmp_path / "b.jpg").symlink_to("a.jpg")
    for path, reason in (
        (tmp_path / "a.jpg", "cannot be read"),
        ("a\0b.jpg", "cannot be read"),
        ("no.jpg", "no such"),
    ):
        with pytest.raises(ExampleError, match=reason):
            decode(path)


def test_every_exception_of_a_decoder_becomes_an_image_error(monkeypatch):
    data = encode(noise(), "PNG")
    for error in (
        OSError("x"),
        SyntaxError("x"),
        MemoryError(),
        zlib.error("x"),
        OverflowError(),
        RecursionError(),
    ):

        def fail(self, error=error):
            raise error

        monkeypatch.setattr(Image.Image, "load", fail)
        monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
        with pytest.raises(ExampleError):
            decode(data)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    if not MAKE_DAMAGED.is_file():
        pytest.skip(f"{MAKE_DAMAGED} is not here")
    out = tmp_path_factory.mktemp("damaged")
    command = [sys.executable, str(MAKE_DAMAGED), str(out), "--repeat", "7", "--include", "fifo"]
    subprocess.run(command, check=True, capture_output=True)
    return out, json.loads((out / "manifest.json").read_text())


def test_every_damaged_or_unusual_file_is_read_or_refused_as_it_must_be(damaged):
    root, manifest = damaged
    listed = set(files_below(root, IMAGES))
    wrong = []
    for entry in manifest["files"]:
        path = root / entry["path"]
        if entry["expect"] == "ignore":
            if str(path) in listed:
                wrong.append((entry["kind"], "taken for an image"))
            continue
        if str(path) not in listed and not entry.get("may_ignore"):
            wrong.append((entry["kind"], "left out"))
        try:
            pixels = decode(path)
        except ExampleError as error:
            if entry["expect"] == "accept":
                wrong.append((entry["kind"], str(error)))
            continue
        if entry["expect"] == "reject":
            wrong.append((entry["kind"], "accepted"))
            continue
        truth = {**entry, **entry.get("alternatives", {}).get("over_white", {})}
        problem = difference(truth, pixels)
        if problem:
            wrong.append((entry["kind"], problem))
    assert not wrong
    assert len(manifest["files"]) > 300


def difference(truth, pixels):
    height, width = pixels.shape[:2]
    if [width, height] != truth["size"]:
        return f"size {width} x {height}, not {truth['size']}"
    off = np.abs(pixels.reshape(-1, 3).mean(0) - truth["rgb_mean"]).max()
    if "quadrant_rgb_means" in truth:
        y, x = height // 2, width // 2
        quadrants = (pixels[:y, :x], pixels[:y, x:], pixels[y:, :x], pixels[y:, x:])
        means = np.array([q.reshape(-1, 3).mean(0) for q in quadrants])
        off = max(off, np.abs(means - truth["quadrant_rgb_means"]).max())
    return f"a mean is off by {off:.2f}" if off > truth["tolerance"] else None
