"""What a program hands to `predict`, as one list of pictures; nothing is opened before all of it is understood."""

import io
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from mixlab.data.decode import MAX_BYTES, decode_opened
from mixlab.data.preprocess import Preprocess
from mixlab.errors import ImageError, UsageTypeError

TAKEN = (
    "a path of a file or folder, bytes of an image file, a PIL image, a binary file object, a uint8 array "
    "(H, W), (H, W, 1 or 3) or (N, H, W, 1 or 3), or a list of these"
)


@dataclass(frozen=True)
class Given:
    """One picture. name: its path, or its number among all. content: a path, bytes, or an array uint8 (H, W, C)."""

    name: str
    content: str | bytes | np.ndarray | ImageError

    def read(self, preprocess: Preprocess) -> np.ndarray:
        """uint8 (channels, height, width) at model size. ImageError says why there is none."""
        if isinstance(self.content, ImageError):
            raise self.content
        if isinstance(self.content, np.ndarray):
            return preprocess.pixels(self.content)
        return preprocess.read(self.content)


def read_inputs(images: Any, preprocess: Preprocess, list_folder: Callable[[str], list[str]]) -> list[Given]:
    """The pictures of `images` (TAKEN) in order; a folder is what is listed of it. UsageTypeError for anything else.

    Files are opened later, by `Given.read`. PIL images and file objects, which belong to the caller and to its
    thread, are read here and left open; one that cannot be read gives a picture that raises ImageError.
    """
    single = _is_one(images)
    if not single and not _is_list(images):
        raise _refused(images)
    items = [images] if single else list(images)
    for number, item in enumerate(items):
        if not _is_one(item):
            raise _refused(item, number)
    contents = [content for item in items for content in _contents(item, preprocess, list_folder)]
    return [
        Given(content if isinstance(content, str) else str(number), content)
        for number, content in enumerate(contents)
    ]


def _is_one(item: Any) -> bool:
    if isinstance(item, np.ndarray):
        return item.dtype == np.uint8
    if isinstance(item, str | os.PathLike | bytes | bytearray | memoryview | Image.Image):
        return True
    return callable(getattr(item, "read", None)) and not isinstance(item, io.TextIOBase)


def _is_list(images: Any) -> bool:
    if isinstance(images, np.ndarray):
        return images.dtype.kind in "OU" and images.ndim > 0  # of objects or of paths, not of numbers
    return isinstance(images, Iterable) and not isinstance(images, Mapping | io.TextIOBase)


def _refused(item: Any, number: int | None = None) -> UsageTypeError:
    kind = f"an array of {item.dtype}" if isinstance(item, np.ndarray) else type(item).__name__
    at = "" if number is None else f" at position {number}"
    hint = "a tensor uint8 (C, H, W) becomes one by x.permute(1, 2, 0).numpy()" if kind == "Tensor" else None
    return UsageTypeError(f"predict takes {TAKEN}; got {kind}{at}", where="images", hint=hint)


def _contents(
    item: Any, preprocess: Preprocess, list_folder: Callable[[str], list[str]]
) -> list[str | bytes | np.ndarray | ImageError]:
    """The pictures that one item of `_is_one` stands for."""
    if isinstance(item, str | os.PathLike):
        path = os.fsdecode(item)
        return list(list_folder(path)) if os.path.isdir(path) else [path]
    if isinstance(item, bytes | bytearray | memoryview):
        return [bytes(item)]
    if isinstance(item, np.ndarray):
        return [_checked(array) for array in (item if item.ndim == 4 else [item])]
    try:
        if isinstance(item, Image.Image):
            return [decode_opened(item, grey_max=preprocess.grey_max)]
        return [_read_file(item)]
    except ImageError as error:
        return [error]


def _checked(array: np.ndarray) -> np.ndarray | ImageError:
    shaped = array[..., None] if array.ndim == 2 else array
    if shaped.ndim == 3 and shaped.shape[2] in (1, 3) and shaped.size:
        return shaped
    return ImageError(f"an array must be uint8 (H, W), (H, W, 3) or (H, W, 1), got {array.shape}")


def _read_file(file: Any) -> bytes:
    """What is left in an open file, up to the size at which images are refused anyway."""
    parts: list[bytes] = []
    size = 0
    while size <= MAX_BYTES:
        try:
            part = file.read(MAX_BYTES + 1 - size)
        except Exception as error:  # whatever stands behind it: a disk, an archive, a network
            raise ImageError(f"cannot be read: {error or type(error).__name__}") from None
        if not part:
            break
        if not isinstance(part, bytes):
            raise UsageTypeError(
                f"predict takes files opened in binary mode; this one gives {type(part).__name__}",
                where="images",
                hint='open(path, "rb")',
            )
        parts.append(part)
        size += len(part)
    return b"".join(parts)
