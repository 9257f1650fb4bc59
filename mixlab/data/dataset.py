"""What a source hands on: named, labelled images, as files or as pixels already in memory."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from mixlab.data.decode import read_image_file

SPLIT_NAMES = {"train": "train", "val": "val", "validation": "val", "valid": "val", "test": "test"}


class Encoded(Protocol):
    """Pictures as the bytes of image files, by row number, for sources whose pictures are not files of their own.

    window: rows that are read together, one window after the other; 0 where any row is as quick as any other.
    is_checked: whether it is known that all pictures can be decoded, so that nobody need try before training.
    """

    @property
    def window(self) -> int: ...

    @property
    def is_checked(self) -> bool: ...

    def read(self, row: int) -> bytes:
        """The bytes of one picture. ImageError if it cannot be read or is not what it was."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """The images of one split, n of them.

    names: how a person finds each image again: a path, or `index 12` where the source has no files.
    labels: int64 (n,), indices into the source's `class_names`.
    pixels: uint8 (n, H, W, channels), or None where pictures are still to be decoded.
    encoded: where their bytes are, at `rows`, int64 (n,); None where `names` are paths of files.
    """

    names: tuple[str, ...]
    labels: np.ndarray
    pixels: np.ndarray | None = None
    encoded: Encoded | None = None
    rows: np.ndarray | None = None

    @property
    def has_files(self) -> bool:
        """Whether `names` are paths."""
        return self.pixels is None and self.encoded is None

    def read(self, index: int) -> bytes:
        """The bytes of the image file at `index`, for a split without pixels. ImageError if it cannot be read."""
        if self.encoded is None or self.rows is None:
            return read_image_file(self.names[index])
        return self.encoded.read(int(self.rows[index]))

    def __len__(self) -> int:
        return len(self.names)

    def take(self, indices: np.ndarray) -> "Split":
        """The images at `indices`, in that order."""
        return Split(
            names=tuple(self.names[i] for i in indices),
            labels=self.labels[indices],
            pixels=None if self.pixels is None else self.pixels[indices],
            encoded=self.encoded,
            rows=None if self.rows is None else self.rows[indices],
        )


@dataclass(frozen=True, kw_only=True)
class Source:
    """A data set: its classes and its splits.

    splits: some of `train`, `val`, `test`; a source that names no splits has one called `all`.
    root: the folder or CSV file it was read from, None for sets that live in a library.
    """

    name: str
    class_names: tuple[str, ...]
    splits: Mapping[str, Split]
    root: Path | None = None
