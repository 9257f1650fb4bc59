"""What a source hands on: named, labelled examples, as files or as arrays already in memory."""

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from mixlab.data.listing import Skipped
from mixlab.data.modality import Modality, read_example_file
from mixlab.errors import DataError
from mixlab.escape import is_plain, readable

# By any name that the Hugging Face Hub takes for one too, in lower case.
SPLIT_NAMES = (
    dict.fromkeys(("train", "training"), "train")
    | dict.fromkeys(("val", "validation", "valid", "dev"), "val")
    | dict.fromkeys(("test", "testing", "eval", "evaluation"), "test")
)


class Encoded(Protocol):
    """Examples as the bytes of files, by row number, for sources whose examples are not files of their own.

    window: rows that are read together, one window after the other; 0 where any row is as quick as any other.
    is_checked: whether it is known that all of them can be decoded, so that nobody need try before training.
    """

    @property
    def window(self) -> int: ...

    @property
    def is_checked(self) -> bool: ...

    def read(self, row: int) -> bytes:
        """The bytes of one example. ExampleError if it cannot be read or is not what it was."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """The examples of one split, n of them.

    names: how a person finds each again: a path, or `index 12` where the source has no files. Always plain
        text; what is none in the name of a file is escaped.
    labels: int64 (n,), indices into the source's `class_names`.
    arrays: the decoded examples, (n, ...), of images uint8 (n, H, W, channels); None where they are still files.
    encoded: where their bytes are, at `rows`, int64 (n,); None where `names` are paths of files.
    paths: the files, where some of their names are no plain text.
    """

    names: tuple[str, ...]
    labels: np.ndarray
    arrays: np.ndarray | None = None
    encoded: Encoded | None = None
    rows: np.ndarray | None = None
    paths: tuple[str, ...] | None = None

    @property
    def has_files(self) -> bool:
        """Whether `names` are paths."""
        return self.arrays is None and self.encoded is None

    def read(self, index: int) -> bytes:
        """The bytes of the file at `index`, for a split without arrays. ExampleError if it cannot be read."""
        if self.encoded is None or self.rows is None:
            return read_example_file((self.paths or self.names)[index])
        return self.encoded.read(int(self.rows[index]))

    def __len__(self) -> int:
        return len(self.names)

    def take(self, indices: np.ndarray) -> "Split":
        """The examples at `indices`, in that order."""
        return Split(
            names=tuple(self.names[i] for i in indices),
            labels=self.labels[indices],
            arrays=None if self.arrays is None else self.arrays[indices],
            encoded=self.encoded,
            rows=None if self.rows is None else self.rows[indices],
            paths=None if self.paths is None else tuple(self.paths[i] for i in indices),
        )


@dataclass(frozen=True, kw_only=True)
class Source:
    """A data set: its classes and its splits.

    splits: some of `train`, `val`, `test`; a source that names no splits has one called `all`.
    modality: what kind of examples they are. root: the folder or CSV file it was read from, None for sets that live
    in a library. skipped: what lies there and is left out. class_names are brought to Unicode's NFC; DataError for
    one that is no text or holds a line break.
    """

    name: str
    class_names: tuple[str, ...]
    splits: Mapping[str, Split]
    modality: Modality
    root: Path | None = None
    skipped: tuple[Skipped, ...] = ()

    def __post_init__(self) -> None:
        names = tuple(clean_name(name, where=str(self.root or self.name)) for name in self.class_names)
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise DataError(f"two classes are called '{twice}'", where=str(self.root or self.name))
        object.__setattr__(self, "class_names", names)

    def __len__(self) -> int:
        return sum(len(split) for split in self.splits.values())

    @property
    def lost(self) -> list[tuple[str, str]]:
        """Path and reason of every file that is left out and may be an example."""
        return [(path, one.reason) for one in self.skipped if one.is_loss for path in one.paths]


def everything(source: Source) -> Split:
    """All examples of a source as one split, in the order of its splits."""
    parts = list(source.splits.values())
    if len(parts) == 1:
        return parts[0]
    in_memory = all(part.arrays is not None for part in parts)
    has_rows = all(part.rows is not None for part in parts)
    has_odd = any(part.paths is not None for part in parts)
    return Split(
        names=tuple(name for part in parts for name in part.names),
        labels=np.concatenate([part.labels for part in parts]),
        arrays=np.concatenate([part.arrays for part in parts]) if in_memory else None,
        encoded=parts[0].encoded,
        rows=np.concatenate([part.rows for part in parts]) if has_rows else None,
        paths=tuple(path for part in parts for path in part.paths or part.names) if has_odd else None,
    )


def clean_name(name: str, *, where: str) -> str:
    """A class name from outside in NFC: a Mac's names and Linux's are then the same. DataError if it is no text."""
    if is_plain(name):
        return unicodedata.normalize("NFC", name)
    try:
        name.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"the class name {readable(name)} is not in UTF-8",
            where=where,
            hint="rename it (`convmv -f gbk -t utf8 --notest -r FOLDER`, or the coding it has)",
        ) from None
    raise DataError(f"the class name {readable(name)} has a control character", where=where, hint="rename it")
