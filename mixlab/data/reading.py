"""A split read once: which pictures can be read, their digests, and their pixels where those are kept."""

import contextlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from mixlab.data.copies import picture_digest
from mixlab.data.dataset import Split
from mixlab.data.decode import GREY16_MAX, Reduction, decode, decode_deep
from mixlab.data.preprocess import Preprocess
from mixlab.errors import DataError, ImageError


@dataclass(frozen=True)
class BadFile:
    """A picture that could not be read, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class Images:
    """The readable pictures of a split.

    split: names and labels of those that could be read. pixels: uint8 (m, channels, H, W) at model size if
    they are kept in memory, else None. bad: the others. places: int64 (n,), where in `pixels` each picture is; None
    where they are in the same order. digests: of the decoded pictures (`copies.picture_digest`), empty where unknown.
    """

    split: Split
    preprocess: Preprocess
    pixels: Tensor | None
    bad: list[BadFile] = field(default_factory=list)
    places: np.ndarray | None = None
    digests: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.split)

    def take(self, indices: np.ndarray) -> "Images":
        """The pictures at `indices`, in that order, with the same pixels in memory."""
        places = None
        if self.pixels is not None:
            places = indices if self.places is None else self.places[indices]
        digests = tuple(self.digests[i] for i in indices)
        return replace(self, split=self.split.take(indices), places=places, digests=digests)

    def pictures(self, indices: Sequence[int] | np.ndarray) -> Tensor:
        """uint8 (n, channels, H, W): the preprocessed pictures at `indices`. ImageError if one went bad since."""
        if self.pixels is not None:
            wanted = np.asarray(indices)
            return self.pixels[torch.as_tensor(wanted if self.places is None else self.places[wanted])]
        grey_max = self.preprocess.grey_max
        decoded = [read_picture(self.split, i, grey_max=grey_max) for i in indices]
        return torch.from_numpy(np.stack([self.preprocess.pixels(picture) for picture in decoded]))


@dataclass(frozen=True)
class Reading:
    """All pictures of a split, read once, from which those of its parts are taken.

    pixels: as in Images, in the order of `split`; rows of unreadable pictures mean nothing. digests: of each picture.
    bad: unreadable pictures by index. peaks: the largest value of each 16-bit grey picture, by index. is_read: False
    for pictures that were not looked at.
    """

    split: Split
    preprocess: Preprocess
    pixels: Tensor | None
    digests: list[str]
    bad: dict[int, BadFile]
    peaks: dict[int, int]
    is_read: bool = True

    def images(self, indices: np.ndarray | None = None) -> Images:
        """The readable ones of the pictures at `indices` (all), which share these pixels."""
        if indices is None:
            indices = np.arange(len(self.split))
        good = np.array([i for i in indices if i not in self.bad], dtype=np.int64)
        is_all = len(good) == len(self.split) and bool((good == np.arange(len(good))).all())
        return Images(
            split=self.split if is_all else self.split.take(good),
            preprocess=self.preprocess,
            pixels=self.pixels,
            bad=[self.bad[int(i)] for i in indices if i in self.bad],
            places=None if is_all else good,
            digests=tuple(self.digests[i] for i in good),
        )


Progress = Callable[[int, int], None]
NUM_SAMPLED = 64
READ_CHUNK, READ_PART = 1024, 16  # pictures handed to the threads at a time, and to one of them


def load_images(
    split: Split, preprocess: Preprocess, *, in_memory: bool = True, progress: Progress | None = None
) -> Images:
    """Read every picture of `split` once; keep the pixels if `in_memory`, else only learn which are readable."""
    return read_images(split, preprocess, in_memory=in_memory, progress=progress).images()


def read_images(
    split: Split, preprocess: Preprocess, *, in_memory: bool = True, progress: Progress | None = None
) -> Reading:
    """Read every picture of `split` once, with its digest; a stream, or shards not kept in memory, are not read."""
    digests, bad, peaks = [""] * len(split), {}, {}  # type: ignore[var-annotated]
    if not in_memory and split.encoded is not None and (split.encoded.is_checked or split.encoded.window):
        # Known to be good, or too long to read just for that.
        return Reading(split, preprocess, None, _stored_digests(split), bad, peaks, is_read=False)
    shape = (len(split), preprocess.channels, *preprocess.image_size)
    pixels = np.empty(shape, dtype=np.uint8) if in_memory else None

    def read(index: int) -> None:
        try:
            if split.pixels is not None:
                picture, deep = split.pixels[index], None
            else:
                picture, deep = decode_deep(split.read(index), grey_max=preprocess.grey_max)
            if deep is not None:
                peaks[index] = int(deep.max())
            digests[index] = picture_digest(picture if deep is None else deep)
            if pixels is not None and not is_taken_whole:
                pixels[index] = preprocess.pixels(picture)
        except ImageError as error:
            bad[index] = BadFile(split.names[index], error.message)

    def read_all(part: range) -> None:
        for index in part:
            read(index)

    is_taken_whole = split.pixels is not None and _is_model_size(split.pixels, preprocess)
    if is_taken_whole and split.pixels is not None and pixels is not None:
        pixels[:] = split.pixels.transpose(0, 3, 1, 2)
    # Decoders, digests and resizing release the GIL, so threads keep all cores busy without copies.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(split), READ_CHUNK):
            stop = min(start + READ_CHUNK, len(split))
            parts = [range(first, min(first + READ_PART, stop)) for first in range(start, stop, READ_PART)]
            list(pool.map(read_all, parts))
            if progress is not None:
                progress(stop, len(split))
    return Reading(
        split, preprocess, None if pixels is None else torch.from_numpy(pixels), digests, bad, peaks
    )


def read_again(reading: Reading, preprocess: Preprocess) -> Reading:
    """The same pictures where `preprocess` differs in `grey_max`: those of 16 bits are decoded again."""
    if reading.pixels is not None:
        for index in reading.peaks:
            picture = read_picture(reading.split, index, grey_max=preprocess.grey_max)
            reading.pixels.numpy()[index] = preprocess.pixels(picture)
    return replace(reading, preprocess=preprocess)


def sample_peaks(split: Split, indices: np.ndarray) -> dict[int, int]:
    """`peaks` of some of the pictures at `indices`, for splits that are not read beforehand."""
    window = split.encoded.window if split.encoded is not None else 0
    step = (
        1 if window else max(len(indices) // NUM_SAMPLED, 1)
    )  # the first of a stream, whose middle is far away
    peaks = {}
    for index in indices[::step][:NUM_SAMPLED].tolist():
        with contextlib.suppress(ImageError):
            deep = decode_deep(split.read(index))[1]
            if deep is not None:
                peaks[index] = int(deep.max())
    return peaks


def _stored_digests(split: Split) -> list[str]:
    """Digests that a split's files bring along, of the pictures' bytes; empty for others."""
    stored = getattr(split.encoded, "digest", None)
    if stored is None or split.rows is None:
        return [""] * len(split)
    return [f"bytes-{stored[row]}" for row in split.rows]


def _is_model_size(pixels: np.ndarray, preprocess: Preprocess) -> bool:
    height, width = pixels.shape[1:3]
    whole = (0.0, 0.0, float(width), float(height))
    return (
        (height, width) == preprocess.image_size
        and pixels.shape[3] == preprocess.channels
        and preprocess.box(height, width) == whole
    )


def read_picture(
    split: Split, index: int, reduction: Reduction | None = None, grey_max: int = GREY16_MAX
) -> np.ndarray:
    """uint8 (H, W, channels): one decoded picture. reduction, grey_max: as for `decode`. ImageError if it is none."""
    if split.pixels is not None:
        return split.pixels[index]
    return decode(split.read(index), reduction=reduction, grey_max=grey_max)


def check_bad_share(bad: Sequence[BadFile], total: int, max_share: float) -> None:
    """DataError, naming the first of them, if more than `max_share` of `total` pictures are bad, or all.

    `bad` may hold files that are no pictures of the set but might have been; `total` counts them too.
    """
    if len(bad) < total and len(bad) <= max_share * total:
        return
    lines = "".join(f"\n  {file.path}: {file.reason}" for file in bad[:10])
    more = "" if len(bad) <= 10 else f"\n  and {len(bad) - 10} more"
    raise DataError(
        f"{len(bad)} of {total} images cannot be read, more than the {max_share:.0%} allowed:{lines}{more}",
        where="data.max_bad_share",
        hint="mend or remove them (`mixlab check DATA` lists all), or allow more with --max-bad-share",
    )
