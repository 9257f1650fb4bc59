"""One image file in, one RGB array out, or an `ExampleError` with a reason a person understands.

Everything here treats the file as hostile: formats are on a list, bytes and pixels are capped before any
decoder runs, and nothing but `ExampleError` comes out. `decode` is safe to call from many threads at once.
"""

import re
import warnings
from collections.abc import Callable, Iterator
from io import BytesIO
from itertools import islice
from pathlib import Path

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

from mixlab.data.images.formats import FORMATS, image_format
from mixlab.data.modality import MAX_BYTES, read_example_file
from mixlab.errors import ExampleError
from mixlab.words import install_hint

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

MAX_PIXELS = 100_000_000
MAX_SCANNED = (
    16 * MAX_PIXELS
)  # of a JPEG: pixels times scans, since a decoder goes over all of them in each scan
SCAN_PIXELS = 10_000  # what beginning a scan costs
_ORIENTATION = 0x0112
GREY16_MAX = 65535  # of 16-bit images: the value that is white, unless the images' own range is known
_JPEG_MARKER = re.compile(rb"\xff+([^\x00\x01\xff\xd0-\xd8])")  # those that have a length, and the end
_SOF, _SOF_PLAIN, _EOI, _SOS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}, (0xC0, 0xC1), 0xD9, 0xDA
_NO_PILLOW_WARNINGS = ("ignore", None, Warning, re.compile(r"PIL\."), 0)


Reduction = Callable[[int, int], float]


def decode(
    source: str | Path | bytes, *, reduction: Reduction | None = None, grey_max: int = GREY16_MAX
) -> np.ndarray:
    """Decode to uint8 (H, W, 3) RGB: first frame, EXIF orientation applied, alpha over white.

    Colour profiles are not applied. reduction: given height and width, how many times smaller a JPEG may come back;
    it then does at 1/2, 1/4 or 1/8 of its size. Much faster where the image is scaled down anyway. grey_max: the
    value of a 16-bit grey image that becomes 255.
    """
    return decode_deep(source, reduction=reduction, grey_max=grey_max)[0]


def decode_deep(
    source: str | Path | bytes, *, reduction: Reduction | None = None, grey_max: int = GREY16_MAX
) -> tuple[np.ndarray, np.ndarray | None]:
    """`decode`, and the values (H, W) of a 16-bit grey image before they became 8 bits; None for any other."""
    where = None if isinstance(source, bytes) else str(source)
    data = source if isinstance(source, bytes) else read_example_file(source)
    try:
        pixels = _decode_plain_jpeg(data, reduction) if data[:2] == b"\xff\xd8" else None
        return _decode_with_pillow(data, reduction, grey_max) if pixels is None else (pixels, None)
    except Exception as error:  # decoders raise nearly every type there is
        raise ExampleError(_reason(error, data), where=where) from None


def decode_opened(image: Image.Image, *, grey_max: int = GREY16_MAX) -> np.ndarray:
    """`decode` of an image that Pillow has opened already, or made; its current frame."""
    try:
        _check_size(*image.size)
        _silence_pillow()
        return _pixels(image, grey_max)[0]
    except Exception as error:
        raise ExampleError(_reason(error, b"opened")) from None


def describe(source: str | Path | bytes) -> tuple[int, int, str, str]:
    """Stored width, height, mode and format, from the header only."""
    where = None if isinstance(source, bytes) else str(source)
    data = source if isinstance(source, bytes) else read_example_file(source)
    try:
        with _open(data) as image:
            return image.width, image.height, image.mode, str(image.format)
    except Exception as error:
        raise ExampleError(_reason(error, data), where=where) from None


def _reason(error: Exception, data: bytes) -> str:
    if isinstance(error, ExampleError):
        return error.message
    if not data:
        return "the file is empty"
    if isinstance(error, UnidentifiedImageError):
        if (name := image_format(data)) and name not in FORMATS:
            return f"{name} is not read here; save it as JPEG or PNG"
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
        raise ExampleError("an image without pixels")
    if width * height > MAX_PIXELS:
        raise ExampleError(_too_many_pixels())


def _jpeg_markers(data: bytes, at: int = 2) -> Iterator[tuple[int, int]]:
    """Each marker with the place of its length, up to the end of the image; its content is passed over."""
    while (found := _JPEG_MARKER.search(data, at)) is not None and found[1][0] != _EOI:
        yield found[1][0], found.end()
        at = found.end() + int.from_bytes(data[found.end() : found.end() + 2], "big")


def _check_scans(data: bytes, width: int, height: int) -> None:
    """A few hundred bytes can ask for thousands of scans of a large image; decoding them would take minutes."""
    most = MAX_SCANNED // (width * height + SCAN_PIXELS)
    if len(data) // 10 <= most:  # bytes of the shortest scan
        return
    components = None
    for marker, at in _jpeg_markers(data):
        if marker in _SOF:
            components = data[at + 7 : at + 8] if marker in _SOF_PLAIN else None
        elif marker == _SOS:
            if data[at + 2 : at + 3] == components:  # all in one scan: no decoder takes a second one
                return
            break
    if data.count(b"\xff\xda") > most:
        scans = (marker for marker, _ in _jpeg_markers(data) if marker == _SOS)
        if next(islice(scans, most, None), None) is not None:
            raise ExampleError(f"a JPEG with more than {most} scans")


def _open(data: bytes) -> Image.Image:
    """Read the header with Pillow and check the size, before anything is decoded."""
    if len(data) > MAX_BYTES:
        raise ExampleError(f"larger than {MAX_BYTES // 1024**2} MiB")
    _silence_pillow()
    formats = _heif_formats() if image_format(data) == "HEIC" else FORMATS
    image = Image.open(BytesIO(data), formats=formats)
    _check_size(*image.size)
    if image.format in ("JPEG", "MPO"):
        _check_scans(data, *image.size)
    return image


def _heif_formats() -> tuple[str, ...]:
    """Pillow's name of HEIC, made known to it. ExampleError without the package that reads it."""
    try:
        import pillow_heif
    except ImportError:
        raise ExampleError(f"HEIC is read with the package pillow-heif; {install_hint('heic')}") from None
    pillow_heif.register_heif_opener()
    return ("HEIF",)


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
    except Exception:  # a broken EXIF block says nothing about the image
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
    """The largest of 8, 4, 2, 1 that `reduction` of the upright image allows."""
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
        _check_scans(data, width, height)
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


def _decode_with_pillow(
    data: bytes, reduction: Reduction | None, grey_max: int
) -> tuple[np.ndarray, np.ndarray | None]:
    with _open(data) as image:
        if image.format in ("JPEG", "MPO"):
            scale = _jpeg_scale(*image.size, _orientation(image), reduction)
            if scale > 1:  # rounded down, because draft() compares whole quotients
                image.draft(None, (image.width // scale, image.height // scale))
        return _pixels(image, grey_max)


def _pixels(image: Image.Image, grey_max: int) -> tuple[np.ndarray, np.ndarray | None]:
    image.load()
    deep = _deep_grey(image)
    pixels = _rgb(image) if deep is None else _grey16(deep, grey_max)
    # After load(), because TIFF turns itself and then says 1.
    return _upright(pixels, _orientation(image)), deep


def _deep_grey(image: Image.Image) -> np.ndarray | None:
    """The values (H, W) of a grey image of more than 8 bits; None for other images."""
    if not image.mode.startswith("I"):
        return None
    values = np.asarray(image)
    if values.min() < 0 or values.max() > GREY16_MAX:
        raise ExampleError("32-bit pixels outside 0..65535; save as 8 or 16 bits")
    return values.astype(np.uint16)


def _rgb(image: Image.Image) -> np.ndarray:
    if image.mode == "F":
        raise ExampleError("pixels are floating-point numbers of unknown range; save as 8 or 16 bits")
    if image.has_transparency_data:
        # La (premultiplied grey) converts to LA only.
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def _grey16(values: np.ndarray, grey_max: int) -> np.ndarray:
    """uint16 grey (H, W) to uint8 (H, W, 3), `grey_max` to 255; Pillow's own conversion gives white images."""
    scaled = (values.astype(np.int64) * 255 + grey_max // 2) // grey_max
    return np.repeat(scaled.clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)


def grey_range(peak: int) -> int:
    """The largest value of the fewest bits (8, 10, 12, 14 or 16) that hold `peak`: 255 to 65535."""
    return next(2**bits - 1 for bits in (8, 10, 12, 14, 16) if peak < 2**bits)
