"""A split read once: which examples can be read, their digests, and the examples where they are kept."""

import contextlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mixlab.data.dataset import Split
from mixlab.data.modality import BadFile, Look, Modality, Preprocess, array_digest
from mixlab.errors import DataError, ExampleError
from mixlab.words import counted


@dataclass(frozen=True)
class Examples:
    """The readable examples of a split.

    split: names and labels of those that could be read. kept: (m, *kept_shape) of the preprocess if they are
    in memory, else None. bad: the others. places: int64 (n,), where in `kept` each example is; None where they are in
    the same order. digests: of the decoded examples (`array_digest`), empty where unknown.
    """

    split: Split
    preprocess: Preprocess
    kept: Tensor | None
    bad: list[BadFile] = field(default_factory=list)
    places: np.ndarray | None = None
    digests: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.split)

    def take(self, indices: np.ndarray) -> "Examples":
        """The examples at `indices`, in that order, with the same memory."""
        places = None
        if self.kept is not None:
            places = indices if self.places is None else self.places[indices]
        digests = tuple(self.digests[i] for i in indices)
        return replace(self, split=self.split.take(indices), places=places, digests=digests)

    def at(self, indices: Sequence[int] | np.ndarray) -> Tensor:
        """(n, *kept_shape): the kept examples at `indices`. ExampleError if one went bad since."""
        if self.kept is not None:
            wanted = np.asarray(indices)
            return self.kept[torch.as_tensor(wanted if self.places is None else self.places[wanted])]
        decoded = [read_example(self.split, i, self.preprocess) for i in indices]
        return torch.from_numpy(np.stack([self.preprocess.keep(example) for example in decoded]))

    def readable(self, indices: np.ndarray) -> tuple[Tensor, np.ndarray, list[BadFile]]:
        """`at`, without those that went bad: the others, their numbers, and what is wrong with these."""
        try:
            return self.at(indices), indices, []
        except ExampleError:
            kept, good, bad = [], [], []
        for i in indices:
            try:
                kept.append(self.at([int(i)]))
                good.append(i)
            except ExampleError as error:
                bad.append(self.bad_file(i, error))
        return torch.cat(kept) if kept else torch.empty(0), np.array(good, dtype=np.int64), bad

    def bad_file(self, index: int, error: ExampleError) -> BadFile:
        """The example at `index`, with the reason why it cannot be read."""
        return BadFile(self.split.names[index], error.message)


@dataclass(frozen=True)
class Reading:
    """All examples of a split, read once, from which those of its parts are taken.

    kept: as in Examples, in the order of `split`; rows of unreadable ones mean nothing. digests: of each example.
    bad: unreadable ones by index. facts: what `Modality.learn` wants to know, by index of those that have it.
    is_read: False for examples that were not looked at.
    """

    split: Split
    preprocess: Preprocess
    kept: Tensor | None
    digests: list[str]
    bad: dict[int, BadFile]
    facts: dict[int, Any]
    is_read: bool = True

    def examples(self, indices: np.ndarray | None = None) -> Examples:
        """The readable ones of the examples at `indices` (all), which share this memory."""
        if indices is None:
            indices = np.arange(len(self.split))
        good = np.array([i for i in indices if i not in self.bad], dtype=np.int64)
        is_all = len(good) == len(self.split) and bool((good == np.arange(len(good))).all())
        return Examples(
            split=self.split if is_all else self.split.take(good),
            preprocess=self.preprocess,
            kept=self.kept,
            bad=[self.bad[int(i)] for i in indices if i in self.bad],
            places=None if is_all else good,
            digests=tuple(self.digests[i] for i in good),
        )


Progress = Callable[[int, int], None]
NUM_SAMPLED = 64
READ_CHUNK, READ_PART = 1024, 16  # examples handed to the threads at a time, and to one of them


def load_examples(
    split: Split, preprocess: Preprocess, *, in_memory: bool = True, progress: Progress | None = None
) -> Examples:
    """Read every example of `split` once; keep them if `in_memory`, else only learn which are readable."""
    return read_examples(split, preprocess, in_memory=in_memory, progress=progress).examples()


def read_examples(
    split: Split, preprocess: Preprocess, *, in_memory: bool = True, progress: Progress | None = None
) -> Reading:
    """Read every example of `split` once, with its digest; a stream, or shards not kept in memory, are not read."""
    digests, bad, facts = [""] * len(split), {}, {}  # type: ignore[var-annotated]
    if not in_memory and split.encoded is not None and (split.encoded.is_checked or split.encoded.window):
        # Known to be good, or too long to read just for that.
        return Reading(split, preprocess, None, _stored_digests(split), bad, facts, is_read=False)
    whole = preprocess.keep_all(split.arrays) if in_memory and split.arrays is not None else None
    kept = whole
    if in_memory and kept is None:
        kept = np.empty((len(split), *preprocess.kept_shape), dtype=preprocess.kept_dtype)
    modality = preprocess.modality

    def read(index: int) -> None:
        try:
            look = look_at(split, index, modality, preprocess)
            if look.fact is not None:
                facts[index] = look.fact
            digests[index] = look.digest
            if kept is not None and whole is None:
                kept[index] = preprocess.keep(look.example)
        except ExampleError as error:
            bad[index] = BadFile(split.names[index], error.message)

    def read_all(part: range) -> None:
        for index in part:
            read(index)

    # Decoders, digests and resizing release the GIL, so threads keep all cores busy without copies.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(split), READ_CHUNK):
            stop = min(start + READ_CHUNK, len(split))
            parts = [range(first, min(first + READ_PART, stop)) for first in range(start, stop, READ_PART)]
            list(pool.map(read_all, parts))
            if progress is not None:
                progress(stop, len(split))
    return Reading(split, preprocess, None if kept is None else torch.from_numpy(kept), digests, bad, facts)


def digests_of(split: Split, modality: Modality) -> list[str]:
    """The digests of all examples of `split`, empty for those that cannot be read; of a stream its own."""
    if split.encoded is not None and (split.encoded.is_checked or split.encoded.window):
        return _stored_digests(split)

    def digest(index: int) -> str:
        try:
            return look_at(split, index, modality).digest
        except ExampleError:
            return ""

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(digest, range(len(split))))


def look_at(split: Split, index: int, modality: Modality, preprocess: Preprocess | None = None) -> Look:
    """One example of a split for the first time. ExampleError if it cannot be read."""
    if split.arrays is not None:
        return Look(split.arrays[index], array_digest(split.arrays[index]))
    return modality.look(split.read(index), preprocess)


def read_example(split: Split, index: int, preprocess: Preprocess) -> np.ndarray:
    """One decoded example of a split. ExampleError if it cannot be read."""
    if split.arrays is not None:
        return split.arrays[index]
    return preprocess.modality.decode(split.read(index), preprocess)


def read_again(reading: Reading, preprocess: Preprocess) -> Reading:
    """The same examples with a `preprocess` made after their facts were known: those that have one are read again."""
    if reading.kept is not None:
        for index in reading.facts:
            example = read_example(reading.split, index, preprocess)
            reading.kept.numpy()[index] = preprocess.keep(example)
    return replace(reading, preprocess=preprocess)


def sample_facts(split: Split, indices: np.ndarray, modality: Modality) -> dict[int, Any]:
    """`facts` of some of the examples at `indices`, for splits that are not read beforehand."""
    window = split.encoded.window if split.encoded is not None else 0
    # The first of a stream, whose middle is far away.
    step = 1 if window else max(len(indices) // NUM_SAMPLED, 1)
    facts = {}
    for index in indices[::step][:NUM_SAMPLED].tolist():
        with contextlib.suppress(ExampleError):
            fact = modality.look(split.read(index)).fact
            if fact is not None:
                facts[index] = fact
    return facts


def _stored_digests(split: Split) -> list[str]:
    """Digests that a split's files bring along, of their bytes; empty for others."""
    stored = getattr(split.encoded, "digest", None)
    if stored is None or split.rows is None:
        return [""] * len(split)
    return [f"bytes-{stored[row]}" for row in split.rows]


def check_bad_share(bad: Sequence[BadFile], total: int, max_share: float, one: str, many: str) -> None:
    """DataError, naming the first of them, if more than `max_share` of `total` examples are bad, or all.

    `bad` may hold files that are none of the set but might have been; `total` counts them too. one, many: their name.
    """
    if len(bad) < total and len(bad) <= max_share * total:
        return
    lines = "".join(f"\n  {file.path}: {file.reason}" for file in bad[:10])
    more = "" if len(bad) <= 10 else f"\n  and {len(bad) - 10} more"
    raise DataError(
        f"{len(bad)} of {counted(total, one, many)} cannot be read, more than the {max_share:.0%} allowed:"
        f"{lines}{more}",
        where="data.max_bad_share",
        hint="mend or remove them (`mixlab check DATA` lists all), or allow more with --max-bad-share",
    )
