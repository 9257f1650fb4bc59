"""From a split to batches: in memory as one uint8 array where it fits, else streamed through workers.

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

from mixlab.data.augment import AugmentConfig, augment, crop_boxes, draw_crops
from mixlab.data.order import batch_indices
from mixlab.data.preprocess import Box
from mixlab.data.reading import BadFile, Images, read_picture
from mixlab.data.workers import items_of_workers
from mixlab.errors import DataError, ImageError
from mixlab.threads import num_sharing, one_core_each, shared

UNLABELLED = torch.empty(0, dtype=torch.int64)  # nothing that another process would have to hand over


@dataclass(frozen=True)
class Batch:
    """image (B, channels, H, W), float32 and normalised where a model sees it; label, index int64 (B,).

    index: numbers in the split. shard_sizes: how many of the images belong to each shard of a training step that
    this process takes, if the step is shared out. step_size: images of the whole step, those of other processes and
    unreadable ones included. view: number of the epoch whose draws a training step's images have. bad: files that
    can no longer be read.
    """

    image: Tensor
    label: Tensor
    index: np.ndarray
    shard_sizes: tuple[int, ...] = ()
    step_size: int = 0
    view: int = 0
    bad: tuple[BadFile, ...] = ()


def evaluation_batches(
    images: Images,
    batch_size: int,
    on_bad: Callable[[BadFile], None] | None = None,
    first: int = 0,
    every: int = 1,
) -> Iterator[Batch]:
    """Every picture once, in order, without augmentation; the last batch may be smaller.

    A file that went bad since `images` was made is left out and given to `on_bad`. first, every: of all batches
    only number `first` and every `every`-th after it.
    """
    for start in range(first * batch_size, len(images), every * batch_size):
        index = np.arange(start, min(start + batch_size, len(images)))
        try:
            pixels = images.pictures(index)
        except ImageError:
            pixels, index = _readable(images, index, on_bad)
        if len(index):
            label = torch.from_numpy(images.split.labels[index])
            yield Batch(images.preprocess.normalize(pixels), label, index)


def _readable(
    images: Images, index: np.ndarray, on_bad: Callable[[BadFile], None] | None
) -> tuple[Tensor, np.ndarray]:
    pixels, good = [], []
    for i in index:
        try:
            pixels.append(images.pictures([int(i)]))
            good.append(i)
        except ImageError as error:
            if on_bad is not None:
                on_bad(BadFile(images.split.names[i], error.message))
    return torch.cat(pixels) if pixels else torch.empty(0), np.array(good, dtype=np.int64)


@dataclass(frozen=True, kw_only=True)
class TrainingDataset(torch.utils.data.Dataset[Batch]):
    """The batches of training, one a step, images uint8, without labels: `training_batches` adds them.

    A batch depends only on its step: any worker may make it.

    num_shards: equal parts of each step's images, of which `shards` are wanted here. views: epochs whose draws the
    images have in turn, for who must know all of them; 0 draws anew in every epoch.
    """

    images: Images
    augment: AugmentConfig
    batch_size: int
    seed: int

    num_shards: int = 1
    shards: range = range(1)
    views: int = 0

    def __getitem__(self, step: int) -> Batch:
        split = self.images.split
        window = split.encoded.window if split.encoded is not None else 0
        epoch, whole = batch_indices(
            len(split), self.batch_size, seed=self.seed, step=step, rows=split.rows, window=window
        )
        parts = np.array_split(whole, self.num_shards)
        index = np.concatenate([parts[shard] for shard in self.shards])
        bad: list[BadFile] = []
        view = epoch % self.views if self.views else epoch
        pixels, good = self.drawn(view, index, bad)
        if self.num_shards == 1:
            return Batch(pixels, UNLABELLED, good, view=view, bad=tuple(bad))
        sizes = tuple(int(np.isin(parts[shard], good).sum()) for shard in self.shards)
        return Batch(pixels, UNLABELLED, good, sizes, len(whole), view, tuple(bad))

    def drawn(self, view: int, index: np.ndarray, bad: list[BadFile]) -> tuple[Tensor, np.ndarray]:
        """uint8 (n, channels, H, W): the pictures at `index` with the draws of epoch `view`, and the numbers of them.

        Those that cannot be read any more are left out, and added to `bad`.
        """
        encoded = self.images.split.encoded
        is_stream = encoded is not None and encoded.window > 0  # which is read in order
        num_parts = 1 if is_stream else max(min(num_sharing(), len(index)), 1)
        parts = shared(partial(self._drawn, view), np.array_split(index, num_parts))
        pixels, good, gone = zip(*parts, strict=True)
        bad += itertools.chain.from_iterable(gone)
        if not any(map(len, good)) and self.num_shards == 1:  # a shard of a few pictures may have bad luck
            raise DataError(
                f"no picture of a whole batch can be read any more, {bad[0].path}: {bad[0].reason}",
                hint="was the data set moved or deleted during training?",
            )
        return torch.cat(pixels), np.concatenate(good)

    def _drawn(self, view: int, index: np.ndarray) -> tuple[Tensor, np.ndarray, list[BadFile]]:
        """Some of them; no draw and no bit depends on which."""
        bad: list[BadFile] = []
        if self.images.pixels is not None and not self.augment.cuts_boxes:
            pixels, good = self.images.pictures(index), index
        else:
            pixels, good = self._cut(view, index, bad)
        return augment(pixels, self.augment, seed=self.seed, epoch=view, index=good), good, bad

    def _cut(self, epoch: int, index: np.ndarray, bad: list[BadFile]) -> tuple[Tensor, np.ndarray]:
        """Decode (or take from memory), cut and scale each picture; leave out those that fail."""
        preprocess, good, pixels = self.images.preprocess, [], []
        # Without a drawn box a picture must be the same as where the set is kept in memory.
        cut = preprocess.cut_for_training if self.augment.cuts_boxes else preprocess.cut
        for i, draws in zip(index, draw_crops(self.seed, epoch, index), strict=True):
            try:
                picture, box = self._read(int(i), draws)
            except ImageError as error:
                bad.append(BadFile(self.images.split.names[i], error.message))
                continue
            pixels.append(cut(picture, box))
            good.append(i)
        shape = (0, preprocess.channels, *preprocess.image_size)
        stacked = np.stack(pixels) if pixels else np.empty(shape, dtype=np.uint8)
        return torch.from_numpy(stacked), np.array(good, dtype=np.int64)

    def _read(self, index: int, draws: np.ndarray) -> tuple[np.ndarray, Box]:
        """A picture and the part of it to take; decoded no larger than that part needs. draws: for its crop."""
        preprocess = self.images.preprocess

        def drawn_box(height: int, width: int) -> Box:
            left, top, right, bottom = crop_boxes(draws[None], height, width, self.augment)[0].tolist()
            return left, top, right, bottom

        def reduction(height: int, width: int) -> float:
            left, top, right, bottom = drawn_box(height, width)
            return min((bottom - top) / preprocess.image_size[0], (right - left) / preprocess.image_size[1])

        is_drawn = self.augment.cuts_boxes
        if self.images.pixels is not None:
            picture = self.images.pictures([index])[0].numpy().transpose(1, 2, 0)
        else:
            grey_max = preprocess.grey_max
            picture = read_picture(self.images.split, index, reduction if is_drawn else None, grey_max)
        return picture, (drawn_box if is_drawn else preprocess.box)(*picture.shape[:2])


def training_batches(
    dataset: TrainingDataset,
    *,
    first_step: int,
    num_steps: int,
    num_workers: int,
    on_bad: Callable[[BadFile], None],
    timeout_seconds: float = 300.0,
) -> Iterator[Batch]:
    """The batches of steps first_step ... num_steps - 1, normalised; calls `on_bad` for each new bad file.

    timeout_seconds: DataError if a worker needs longer for one batch.
    """
    if dataset.images.pixels is not None or num_workers == 0:
        items: Any = (dataset[step] for step in range(first_step, num_steps))
    else:
        items = items_of_workers(dataset, first_step, num_steps, num_workers, timeout_seconds)
    labels = torch.from_numpy(dataset.images.split.labels)
    normalize = dataset.images.preprocess.normalize
    while True:
        with one_core_each():
            batch = next(items, None)
            if batch is None:
                return
            label = labels[torch.from_numpy(batch.index)]
            batch = replace(batch, image=normalize(batch.image), label=label)
        for file in batch.bad:
            on_bad(file)
        yield batch
