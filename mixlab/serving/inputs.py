"""What a program hands to `predict`, as one list of examples; nothing is opened before all of it is understood."""

import io
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mixlab.data.modality import MAX_BYTES, Modality, Preprocess
from mixlab.errors import ExampleError, UsageTypeError


@dataclass(frozen=True)
class Given:
    """One example. name: its path, or its number among all. content: a path, bytes, or a decoded example."""

    name: str
    content: str | bytes | np.ndarray | ExampleError

    def read(self, preprocess: Preprocess) -> np.ndarray:
        """The example as `preprocess` keeps it. ExampleError says why there is none."""
        if isinstance(self.content, ExampleError):
            raise self.content
        if isinstance(self.content, np.ndarray):
            return preprocess.keep(self.content)
        return preprocess.read(self.content)


def read_inputs(given: Any, preprocess: Preprocess, list_folder: Callable[[str], list[str]]) -> list[Given]:
    """The examples of `given` in order; a folder is what is listed of it. UsageTypeError for what is taken by none.

    Files are opened later, by `Given.read`. What is open already, a file or an object of the modality's own, belongs
    to the caller and to its thread: it is read here and left open; one that cannot be read gives an example that
    raises ExampleError.
    """
    modality = preprocess.modality
    single = _is_one(given, modality)
    if not single and not _is_list(given):
        raise _refused(given, modality)
    items = [given] if single else list(given)
    for number, item in enumerate(items):
        if not _is_one(item, modality):
            raise _refused(item, modality, number)
    contents = [content for item in items for content in _contents(item, preprocess, list_folder)]
    return [
        Given(content if isinstance(content, str) else str(number), content)
        for number, content in enumerate(contents)
    ]


def _is_one(item: Any, modality: Modality) -> bool:
    if modality.takes(item) or isinstance(item, str | os.PathLike | bytes | bytearray | memoryview):
        return True
    if isinstance(item, np.ndarray):
        return False
    return callable(getattr(item, "read", None)) and not isinstance(item, io.TextIOBase)


def _is_list(given: Any) -> bool:
    if isinstance(given, np.ndarray):
        return given.dtype.kind in "OU" and given.ndim > 0  # of objects or of paths, not of numbers
    return isinstance(given, Iterable) and not isinstance(given, Mapping | io.TextIOBase)


def _refused(item: Any, modality: Modality, number: int | None = None) -> UsageTypeError:
    kind = f"an array of {item.dtype}" if isinstance(item, np.ndarray) else type(item).__name__
    at = "" if number is None else f" at position {number}"
    is_tensor = kind == "Tensor" and modality.taken
    hint = "a tensor uint8 (C, H, W) becomes one by x.permute(1, 2, 0).numpy()" if is_tensor else None
    return UsageTypeError(f"predict takes {_taken(modality)}; got {kind}{at}", where="images", hint=hint)


def _taken(modality: Modality) -> str:
    own = f"{modality.taken}, " if modality.taken else ""
    return f"a path of a file or folder, the bytes of a file, {own}a binary file object, or a list of these"


def _contents(
    item: Any, preprocess: Preprocess, list_folder: Callable[[str], list[str]]
) -> list[str | bytes | np.ndarray | ExampleError]:
    """The examples that one item of `_is_one` stands for."""
    if isinstance(item, str | os.PathLike):
        path = os.fsdecode(item)
        return list(list_folder(path)) if os.path.isdir(path) else [path]
    if isinstance(item, bytes | bytearray | memoryview):
        return [bytes(item)]
    if preprocess.modality.takes(item):
        return list(preprocess.modality.contents(item, preprocess))
    try:
        return [_read_file(item)]
    except ExampleError as error:
        return [error]


def _read_file(file: Any) -> bytes:
    """What is left in an open file, up to the size at which files are refused anyway."""
    parts: list[bytes] = []
    size = 0
    while size <= MAX_BYTES:
        try:
            part = file.read(MAX_BYTES + 1 - size)
        except Exception as error:  # whatever stands behind it: a disk, an archive, a network
            raise ExampleError(f"cannot be read: {error or type(error).__name__}") from None
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
