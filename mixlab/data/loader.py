"""From a split to batches: in memory as one array where it fits, else streamed through workers.

Sample order and every draw depend on (seed, epoch, index) alone, so the number of workers changes nothing.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mixlab.data.modality import BadFile
from mixlab.data.order import batch_indices
from mixlab.data.reading import Examples
from mixlab.data.workers import items_of_workers
from mixlab.errors import DataError
from mixlab.threads import num_sharing, one_core_each, shared

UNLABELLED = torch.empty(0, dtype=torch.int64)  # nothing that another process would have to hand over


@dataclass(frozen=True)
class Batch:
    """inputs (B, channels, H, W), float32, where a model sees them, else kept examples; label, index int64 (B,).

    index: numbers in the split. shard_sizes: how many of the examples belong to each shard of a training step that
    this process takes, if the step is shared out. step_size: examples of the whole step, those of other processes and
    unreadable ones included. view: number of the epoch whose draws a training step's examples have. bad: files that
    can no longer be read. owner: int64, of each input the example that it is a part of, where examples are measured
    in parts (`Preprocess.windows`).
    """

    inputs: Tensor
    label: Tensor
    index: np.ndarray
    shard_sizes: tuple[int, ...] = ()
    step_size: int = 0
    view: int = 0
    bad: tuple[BadFile, ...] = ()
    owner: Tensor | None = None


def evaluation_batches(
    examples: Examples,
    batch_size: int,
    on_bad: Callable[[BadFile], None] | None = None,
    first: int = 0,
    every: int = 1,
) -> Iterator[Batch]:
    """Every example once, in order, without augmentation; the last batch may be smaller.

    A file that went bad since `examples` was made is left out and given to `on_bad`. first, every: of all batches
    only number `first` and every `every`-th after it.
    """
    for start in range(first * batch_size, len(examples), every * batch_size):
        kept, index, bad = examples.readable(np.arange(start, min(start + batch_size, len(examples))))
        if on_bad is not None:
            for file in bad:
                on_bad(file)
        if len(index):
            label = torch.from_numpy(examples.split.labels[index])
            inputs, owner = examples.preprocess.windows(kept)
            yield Batch(inputs, label, index, owner=owner)


@dataclass(frozen=True, kw_only=True)
class TrainingDataset(torch.utils.data.Dataset[Batch]):
    """The batches of training, one a step, of kept examples without labels: `training_batches` adds them.

    A batch depends only on its step: any worker may make it.

    augment: how they are changed, as their modality has it. num_shards: equal parts of each step's examples, of which
    `shards` are wanted here. views: epochs whose draws the examples have in turn, for a caller that must know all of
    them; 0 draws anew in every epoch.
    """

    examples: Examples
    augment: Any
    batch_size: int
    seed: int

    num_shards: int = 1
    shards: range = range(1)
    views: int = 0

    def __getitem__(self, step: int) -> Batch:
        split = self.examples.split
        window = split.encoded.window if split.encoded is not None else 0
        epoch, whole = batch_indices(
            len(split), self.batch_size, seed=self.seed, step=step, rows=split.rows, window=window
        )
        parts = np.array_split(whole, self.num_shards)
        index = np.concatenate([parts[shard] for shard in self.shards])
        bad: list[BadFile] = []
        view = epoch % self.views if self.views else epoch
        kept, good = self.drawn(view, index, bad)
        if self.num_shards == 1:
            return Batch(kept, UNLABELLED, good, view=view, bad=tuple(bad))
        sizes = tuple(int(np.isin(parts[shard], good).sum()) for shard in self.shards)
        return Batch(kept, UNLABELLED, good, sizes, len(whole), view, tuple(bad))

    def drawn(self, view: int, index: np.ndarray, bad: list[BadFile]) -> tuple[Tensor, np.ndarray]:
        """(n, *kept_shape): the examples at `index` with the draws of epoch `view`, and the numbers of them.

        Those that cannot be read any more are left out, and added to `bad`.
        """
        examples, encoded = self.examples, self.examples.split.encoded
        is_stream = encoded is not None and encoded.window > 0  # which is read in order
        num_parts = 1 if is_stream else max(min(num_sharing(), len(index)), 1)
        # No draw and no bit depends on which part an example is in.
        draw = partial(_drawn, examples, self.augment, self.seed, view)
        kept, good, gone = zip(*shared(draw, np.array_split(index, num_parts)), strict=True)
        bad += itertools.chain.from_iterable(gone)
        if not any(map(len, good)) and self.num_shards == 1:  # a shard of a few examples may have bad luck
            raise DataError(
                f"no {examples.preprocess.modality.one} of a whole batch can be read any more, "
                f"{bad[0].path}: {bad[0].reason}",
                hint="was the data set moved or deleted during training?",
            )
        return torch.cat(kept), np.concatenate(good)

    def to_input(self, kept: Tensor, view: int, index: np.ndarray) -> Tensor:
        """What `drawn` gave, as a model sees it: float32 (n, channels, H, W)."""
        preprocess = self.examples.preprocess
        inputs = preprocess.to_input(kept)
        return preprocess.modality.augment_input(
            inputs, self.augment, seed=self.seed, epoch=view, index=index
        )


def _drawn(
    examples: Examples, augment: Any, seed: int, view: int, index: np.ndarray
) -> tuple[Tensor, np.ndarray, list[BadFile]]:
    modality = examples.preprocess.modality
    return modality.drawn(examples, augment, seed=seed, epoch=view, index=index)


def training_batches(
    dataset: TrainingDataset,
    *,
    first_step: int,
    num_steps: int,
    num_workers: int,
    on_bad: Callable[[BadFile], None],
    timeout_seconds: float = 300.0,
) -> Iterator[Batch]:
    """The batches of steps first_step ... num_steps - 1, as a model sees them; calls `on_bad` for each new bad file.

    timeout_seconds: DataError if a worker needs longer for one batch.
    """
    if dataset.examples.kept is not None or num_workers == 0:
        items: Any = (dataset[step] for step in range(first_step, num_steps))
    else:
        items = items_of_workers(dataset, first_step, num_steps, num_workers, timeout_seconds)
    labels = torch.from_numpy(dataset.examples.split.labels)
    while True:
        with one_core_each():
            batch = next(items, None)
            if batch is None:
                return
            label = labels[torch.from_numpy(batch.index)]
            inputs = dataset.to_input(batch.inputs, batch.view, batch.index)
            batch = replace(batch, inputs=inputs, label=label)
        for file in batch.bad:
            on_bad(file)
        yield batch
