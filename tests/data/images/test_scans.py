"""JPEGs whose scans are more than their pixels are worth: refused before a decoder begins."""

import io

import numpy as np
import pytest
from PIL import Image

from mixlab.data.images import decode as module
from mixlab.data.images.decode import decode, describe
from mixlab.errors import ExampleError


def progressive(size=(32, 32), mode="RGB", extra=0, start=b"", **options):
    """A progressive JPEG whose last scan comes `extra` times more. start: segments after the first marker."""
    file = io.BytesIO()
    Image.new(mode, size, 7).save(file, "JPEG", **{"progressive": True} | options)
    data = file.getvalue()
    last, end = data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")
    return data[:2] + start + data[2:end] + data[last:end] * extra + data[end:]


def test_thousands_of_scans_are_refused_before_they_are_decoded():
    for data in (
        progressive((2000, 2000), "L", 2000),
        progressive((2000, 2000), "RGB", 2000),
        progressive((2000, 2000), "L", 2000, start=b"\xff\xe1\x00\x0aExif\x00\x00\x00\x00"),
        progressive(
            (2000, 2000), "L", 2000, start=b"\xff\xfe\x00\x06\xff\xd9\xff\xda"
        ),  # an end, in a comment
        progressive((2000, 2000), "CMYK", 2000),
    ):
        assert len(data) < 4_000_000
        for read in (decode, describe):
            with pytest.raises(ExampleError, match="scans"):
                read(data)


def scan_for_each_colour(times):
    """A JPEG that is not progressive, yet has scans of a colour each, made of a grey one."""
    file = io.BytesIO()
    Image.new("L", (32, 32), 200).save(file, "JPEG")
    grey = file.getvalue()
    frame, scan = grey.index(b"\xff\xc0"), grey.index(b"\xff\xda")
    tables, content = grey[frame + 13 : scan], grey[scan + 10 : -2]
    three = b"\xff\xc0\x00\x11" + grey[frame + 4 : frame + 9] + b"\x03\x01\x11\x00\x02\x11\x00\x03\x11\x00"
    scans = b"".join(b"\xff\xda\x00\x08\x01" + bytes([i]) + b"\x00\x00\x3f\x00" + content for i in (1, 2, 3))
    return grey[:frame] + three + tables + scans * times + b"\xff\xd9"


def test_a_jpeg_with_a_scan_for_each_colour_again_and_again_is_refused(monkeypatch):
    assert decode(scan_for_each_colour(1)).shape == (32, 32, 3)
    monkeypatch.setattr(module, "MAX_SCANNED", 20 * (32 * 32 + module.SCAN_PIXELS))
    assert decode(scan_for_each_colour(1)).shape == (32, 32, 3)
    with pytest.raises(ExampleError, match="more than 20 scans"):
        decode(scan_for_each_colour(100))


def test_usual_pictures_and_what_only_looks_like_scans_are_read(monkeypatch):
    monkeypatch.setattr(module, "MAX_SCANNED", 16 * (32 * 32 + module.SCAN_PIXELS))
    noise = b"\xff\xda" * 100  # in a comment, as a thumbnail or a profile may have it
    comment = b"\xff\xfe" + (len(noise) + 2).to_bytes(2, "big") + noise
    for data in (
        progressive(), progressive(mode="L"), progressive(start=comment), progressive(progressive=False),
        progressive(progressive=False, start=comment), progressive(progressive=False) + b"\xff\xda" * 100,
        progressive() + b"\xff\xda" * 100, progressive(restart_marker_blocks=1),
    ):  # fmt: skip
        assert decode(data).shape == (32, 32, 3)
        assert np.ptp(decode(data).reshape(-1, 3), axis=0).max() == 0
    with pytest.raises(ExampleError, match="more than 16 scans"):
        decode(progressive(extra=7))
