"""One image file in, one RGB array out, or an `ImageError` with a reason a person understands.

Everything here treats the file as hostile: formats are on a list, bytes and pixels are capped before any
decoder runs, and nothing but `ImageError` comes out. `decode` is safe to call from many threads at once.
"""

import os
import re
import stat
import warnings
from collections.abc import Callable
from io import BytesIO
from pathlib import Path, PurePath

import numpy as np

# The plugins are imported by name so that Pillow never registers formats inside a worker thread.
from PIL import (
    BmpImagePlugin,  # noqa: F401
    GifImagePlugin,  # noqa: F401
    Image,
    JpegImagePlugin,  # noqa: F401
    MpoImagePlugin,  # noqa: F401
    PngImagePlugin,  # noqa: F401
    TiffImagePlugin,  # noqa: F401
    UnidentifiedImageError,
    WebPImagePlugin,  # noqa: F401
)

from mixlab.errors import ImageError

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

MAX_BYTES = 64 * 1024**2
MAX_PIXELS = 100_000_000
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")  # Pillow opens the MPO of some phones as JPEG
IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
)
_ORIENTATION = 0x0112
_NO_PILLOW_WARNINGS = ("ignore", None, Warning, re.compile(r"PIL\."), 0)


def is_image_name(path: str | PurePath) -> bool:
    """Whether a folder scan takes this file for an image, by its name alone."""
    name = PurePath(path).name
    return not name.startswith(".") and PurePath(name).suffix.lower() in IMAGE_SUFFIXES


def read_image_file(path: str | Path) -> bytes:
    """The bytes of an image file, refused before reading if it is no regular file or too large."""
    where = str(path)
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # opening a FIFO would wait for ever
            raise ImageError("not a regular file", where=where)
        if status.st_size > MAX_BYTES:
            raise ImageError(f"larger than {MAX_BYTES // 1024**2} MiB", where=where)
        with open(path, "rb") as file:
            return file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        link = os.path.islink(path)
        raise ImageError("a link to a missing file" if link else "no such file", where=where) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the path
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ImageError(f"cannot be read: {reason}", where=where) from None


Reduction = Callable[[int, int], float]


def decode(source: str | Path | bytes, *, reduction: Reduction | None = None) -> np.ndarray:
    """Decode to uint8 (H, W, 3) RGB: first frame, EXIF orientation applied, alpha over white.

    Colour profiles are not applied. reduction: given height and width, how many times smaller a JPEG may come back;
    it then does at 1/2, 1/4 or 1/8 of its size. Much faster where the image is scaled down anyway.
    """
    where = None if isinstance(source, bytes) else str(source)
    data = source if isinstance(source, bytes) else read_image_file(source)
    try:
        pixels = _decode_plain_jpeg(data, reduction) if data[:2] == b"\xff\xd8" else None
        return _decode_with_pillow(data, reduction) if pixels is None else pixels
    except Exception as error:  # decoders raise nearly every type there is
        raise ImageError(_reason(error, data), where=where) from None


def describe(source: str | Path | bytes) -> tuple[int, int, str, str]:
    """Stored width, height, mode and format, from the header only."""
    where = None if isinstance(source, bytes) else str(source)
    data = source if isinstance(source, bytes) else read_image_file(source)
    try:
        with _open(data) as image:
            return image.width, image.height, image.mode, str(image.format)
    except Exception as error:
        raise ImageError(_reason(error, data), where=where) from None


def _reason(error: Exception, data: bytes) -> str:
    if isinstance(error, ImageError):
        return error.message
    if not data:
        return "the file is empty"
    if isinstance(error, UnidentifiedImageError):
        return "not an image, or not of a supported format (" + ", ".join(FORMATS) + ")"
    if isinstance(error, Image.DecompressionBombError):
        return _too_many_pixels()
    if isinstance(error, MemoryError):
        return "not enough memory to decode it"
    text = " ".join((str(error) or type(error).__name__).split())[:120]
    return ("truncated: " if "truncated" in text.lower() else "damaged: ") + text


def _too_many_pixels() -> str:
    return f"more than {MAX_PIXELS // 10**6} million pixels"


def _check_size(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise ImageError("an image without pixels")
    if width * height > MAX_PIXELS:
        raise ImageError(_too_many_pixels())


def _open(data: bytes) -> Image.Image:
    """Read the header with Pillow and check the size, before anything is decoded."""
    if len(data) > MAX_BYTES:
        raise ImageError(f"larger than {MAX_BYTES // 1024**2} MiB")
    _silence_pillow()
    image = Image.open(BytesIO(data), formats=FORMATS)
    _check_size(*image.size)
    return image


def _silence_pillow() -> None:
    """Ignore Pillow's warnings about odd metadata and many pixels, in the whole process.

    `warnings.catch_warnings` is not thread-safe, so the filter stays. It must come first, and others
    (pytest, for one) put filters before it or restore an older list.
    """
    if warnings.filters[:1] != [_NO_PILLOW_WARNINGS]:
        warnings.filterwarnings("ignore", module=r"PIL\.")


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION, 1)
        return value if value in range(1, 9) else 1
    except Exception:  # a broken EXIF block says nothing about the picture
        return 1


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _jpeg_scale(width: int, height: int, orientation: int, reduction: Reduction | None) -> int:
    """The largest of 8, 4, 2, 1 that `reduction` of the upright picture allows."""
    if reduction is None:
        return 1
    height, width = (width, height) if orientation >= 5 else (height, width)
    allowed = min(reduction(height, width), height, width)
    return next((s for s in (8, 4, 2) if s <= allowed), 1)


def _decode_plain_jpeg(data: bytes, reduction: Reduction | None) -> np.ndarray | None:
    """Decode a grey or colour JPEG fast, bit for bit as Pillow does; None leaves it to Pillow."""
    if simplejpeg is None or len(data) > MAX_BYTES:
        return None
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
        if space in ("CMYK", "YCCK"):
            return None
        _check_size(width, height)
        # Reading metadata with Pillow takes a fifth of the decoding time, so only where there is some.
        turned = b"Exif\x00" in data or b"Orientation" in data
        orientation = _orientation(_open(data)) if turned else 1
        scale = _jpeg_scale(width, height, orientation, reduction)
        # Without minimums simplejpeg gives the full size; with them, the smallest size that has both.
        least = (-(-height // scale), -(-width // scale)) if scale > 1 else (0, 0)
        pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=least[0], min_width=least[1])
    except (ValueError, UnidentifiedImageError):  # damaged or rare: Pillow decides
        return None
    return _upright(pixels, orientation)


def _decode_with_pillow(data: bytes, reduction: Reduction | None) -> np.ndarray:
    with _open(data) as image:
        if image.format in ("JPEG", "MPO"):
            scale = _jpeg_scale(*image.size, _orientation(image), reduction)
            if scale > 1:  # rounded down, because draft() compares whole quotients
                image.draft(None, (image.width // scale, image.height // scale))
        image.load()
        # After load(), because TIFF turns itself and then says 1.
        return _upright(_rgb(image), _orientation(image))


def _rgb(image: Image.Image) -> np.ndarray:
    if image.mode == "F":
        raise ImageError("pixels are floating-point numbers of unknown range; save as 8 or 16 bits")
    if image.mode.startswith("I"):
        return _grey16(np.asarray(image))
    if image.has_transparency_data:
        # La (premultiplied grey) converts to LA only.
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def _grey16(values: np.ndarray) -> np.ndarray:
    """16-bit grey to 8 bits; Pillow's own conversion clips at 255 and gives white pictures."""
    wide = values.astype(np.int64)
    if wide.min() < 0 or wide.max() > 65535:
        raise ImageError("32-bit pixels outside 0..65535; save as 8 or 16 bits")
    grey = ((wide + 128) // 257).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=2)
