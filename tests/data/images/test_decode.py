import io
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from mixlab.data.images import decode as decode_module
from mixlab.data.images.decode import decode, describe
from mixlab.errors import ExampleError

RNG = np.random.default_rng(0)


def picture(height=37, width=53):
    y, x = np.mgrid[0:height, 0:width]
    ramp = np.stack([4 * x, 6 * y, 255 - 2 * x - y], axis=-1)
    return np.clip(ramp + RNG.normal(0, 8, ramp.shape), 0, 255).astype(np.uint8)


def encode(image, format, **options):
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def png_16_bit(samples, color_type):
    """`samples`: uint16 (H, W) grey or (H, W, 3) RGB; Pillow cannot write the latter."""

    def chunk(tag, body):
        return struct.pack(">I", len(body)) + tag + body + struct.pack(">I", zlib.crc32(tag + body))

    height, width = samples.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    header = struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


JPEGS = {
    **{f"subsampling {s}": {"subsampling": s, "quality": 90} for s in ("4:4:4", "4:2:2", "4:2:0")},
    "progressive": {"progressive": True},
    "low quality": {"quality": 5},
    "restart markers": {"restart_marker_blocks": 3},
    "with a colour profile": {"icc_profile": bytes(3000)},
}


@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("options", JPEGS.values(), ids=JPEGS.keys())
def test_the_fast_jpeg_path_gives_the_bits_that_pillow_gives(options, grey, monkeypatch):
    pytest.importorskip("simplejpeg")
    for height, width in ((37, 53), (1, 1), (8, 160), (101, 64)):
        pixels = picture(height, width)
        data = encode(pixels[..., 0] if grey else pixels, "JPEG", **options)
        reference = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        assert decode_module._decode_plain_jpeg(data, None) is not None
        assert np.array_equal(decode(data), reference)
        for times in (0.1, 1, 2, 3, 4.5, 8, 100):
            fast = decode(data, reduction=lambda height, width, times=times: times)
            with monkeypatch.context() as patch:
                patch.setattr(decode_module, "simplejpeg", None)
                assert np.array_equal(decode(data, reduction=lambda height, width, times=times: times), fast)
            assert fast.shape[0] in [-(-height // s) for s in (8, 4, 2, 1) if s <= max(times, 1)]


def test_a_jpeg_is_scaled_down_as_far_as_is_allowed():
    data = encode(picture(240, 400), "JPEG")
    for times, shape in (
        (8.5, (30, 50)),
        (7.9, (60, 100)),
        (4, (60, 100)),
        (2, (120, 200)),
        (1.9, (240, 400)),
    ):
        assert decode(data, reduction=lambda height, width, times=times: times).shape[:2] == shape
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    asked = []
    turned = decode(
        encode(picture(240, 400), "JPEG", exif=exif),
        reduction=lambda height, width: asked.append((height, width)) or 2,
    )
    assert asked == [(400, 240)]
    assert turned.shape == (200, 120, 3)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [*range(1, 9), 0, 9, 999])
def test_exif_orientation_is_applied_and_invalid_values_are_ignored(format, orientation):
    upright = np.zeros((24, 40, 3), np.uint8)
    upright[:12, :20] = (250, 0, 0)
    upright[:12, 20:] = (0, 250, 0)
    upright[12:, :20] = (0, 0, 250)
    transpose = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,  # the inverse of what a reader does
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }.get(orientation)
    stored = Image.fromarray(upright) if transpose is None else Image.fromarray(upright).transpose(transpose)
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(format, {})
    pixels = decode(encode(stored, format, exif=exif.tobytes(), **lossless))
    assert pixels.shape == upright.shape
    assert np.abs(pixels.astype(int) - upright).max() <= 3


@pytest.mark.parametrize("format", ["PNG", "WEBP", "BMP", "TIFF", "GIF"])
def test_lossless_formats_come_back_as_they_were(format):
    pixels = picture()
    if format == "GIF":
        pixels = np.repeat(pixels[..., :1], 3, axis=2)
        data = encode(pixels[..., 0], format)
    else:
        data = encode(pixels, format, **({"lossless": True} if format == "WEBP" else {}))
    result = decode(data)
    assert result.dtype == np.uint8
    assert result.flags.c_contiguous
    assert np.array_equal(result, pixels)


def test_grey_and_one_bit_and_palette_become_rgb():
    grey = picture()[..., 0]
    assert np.array_equal(decode(encode(grey, "PNG")), np.repeat(grey[..., None], 3, axis=2))
    bits = grey > 128
    assert np.array_equal(decode(encode(Image.fromarray(bits), "PNG"))[..., 1], bits * np.uint8(255))
    palette = Image.fromarray(picture()).quantize(16)
    assert np.array_equal(decode(encode(palette, "PNG")), np.asarray(palette.convert("RGB")))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_composited_over_white(mode):
    rgb = picture()
    image = Image.fromarray(rgb).convert("L").convert("RGB") if mode == "LA" else Image.fromarray(rgb)
    alpha = np.linspace(0, 255, 53).round().astype(np.uint8)[None].repeat(37, 0)
    colors = np.asarray(image)
    image.putalpha(Image.fromarray(alpha))
    weight = alpha[..., None] / 255
    result = decode(encode(image.convert(mode), "PNG"))
    assert np.abs(result - (colors * weight + 255 * (1 - weight))).max() <= 1


@pytest.mark.parametrize("mode", ["P", "RGB", "L"])
def test_a_transparent_colour_becomes_white(mode):
    image = Image.new(mode, (4, 2), 0 if mode != "RGB" else (0, 0, 0))
    if mode == "P":
        image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((0, 0), 1 if mode != "RGB" else (1, 1, 1))
    transparency = 0 if mode != "RGB" else (0, 0, 0)
    result = decode(encode(image, "PNG", transparency=transparency))
    assert (result[1] == 255).all()
    assert result[0, 0].tolist() == ([40, 50, 60] if mode == "P" else [1, 1, 1])


def test_cmyk_jpeg_is_converted_as_pillow_does():
    data = encode(Image.fromarray(picture()).convert("CMYK"), "JPEG", quality=95)
    assert np.array_equal(decode(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_16_bit_grey_is_scaled_and_not_clipped():
    values = np.array([[0, 128, 129, 257, 32768, 65407, 65535]], np.uint16)
    expected = [0, 0, 1, 1, 128, 255, 255]
    assert decode(png_16_bit(values, 0))[0, :, 0].tolist() == expected
    little = Image.fromarray(values)
    big = Image.frombytes("I;16B", (7, 1), values.astype(">u2").tobytes())
    for image in (little, big, Image.fromarray(values.astype(np.int32))):
        assert decode(encode(image, "TIFF"))[0, :, 0].tolist() == expected


def test_16_bit_rgb_is_scaled():
    pixels = picture()
    assert np.abs(decode(png_16_bit(pixels * np.uint16(257), 2)).astype(int) - pixels).max() <= 1


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_pixels_of_unknown_range_are_refused(dtype):
    with pytest.raises(ExampleError, match="8 or 16 bits"):
        decode(encode(Image.fromarray(np.full((4, 4), 70000, dtype)), "TIFF"))


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_the_first_frame_counts(format):
    frames = [Image.new("RGB", (16, 16), color) for color in ((200, 0, 0), (0, 200, 0), (0, 0, 200))]
    options = {"quality": 95} if format == "MPO" else {"lossless": True} if format == "WEBP" else {}
    data = encode(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert np.abs(decode(data).reshape(-1, 3).mean(0) - (200, 0, 0)).max() <= 3
    if format == "MPO":
        assert describe(data)[3] == "MPO"


def test_many_threads_decode_the_same_as_one():
    files = [encode(picture(40 + i, 50), f) for i, f in enumerate(["JPEG", "PNG", "TIFF", "GIF", "WEBP"] * 8)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(decode, files))
    assert all(np.array_equal(a, decode(b)) for a, b in zip(together, files, strict=True))


def test_describe_reads_the_header_only(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encode(picture(), "PNG")[:60])
    assert describe(path) == (53, 37, "RGB", "PNG")
    path.write_bytes(b"")
    with pytest.raises(ExampleError, match="the file is empty"):
        describe(path)
