"""What a source hands on: named, labelled images, as files or as pixels already in memory."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Split:
    """The images of one split, n of them.

    names: how a person finds each image again: a path, or `index 12` where the source has no files.
    labels: int64 (n,), indices into the source's `class_names`.
    pixels: uint8 (n, H, W, channels), or None where `names` are paths still to be decoded.
    """

    names: tuple[str, ...]
    labels: np.ndarray
    pixels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.names)

    def take(self, indices: np.ndarray) -> "Split":
        """The images at `indices`, in that order."""
        return Split(
            names=tuple(self.names[i] for i in indices),
            labels=self.labels[indices],
            pixels=None if self.pixels is None else self.pixels[indices],
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
