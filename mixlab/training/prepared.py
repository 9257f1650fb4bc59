"""The data of a training, read: splits drawn so that copies stay together, pictures read, what is odd."""

import time
from dataclasses import dataclass, replace

import numpy as np

from mixlab.data.copies import Copies, copy_groups, find_copies
from mixlab.data.dataset import Source, Split, everything
from mixlab.data.decode import GREY16_MAX, grey_range
from mixlab.data.listing import describe_skipped
from mixlab.data.preprocess import Preprocess
from mixlab.data.reading import (
    BadFile,
    Images,
    Reading,
    check_bad_share,
    read_again,
    read_images,
    sample_peaks,
)
from mixlab.device import memory_bytes
from mixlab.errors import DataError, UsageError
from mixlab.report.screen import Screen
from mixlab.training.recipe import Recipe
from mixlab.training.setup import build_preprocess
from mixlab.training.splits import check_unchanged, draw_splits


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The data of a training: its images, and the splits as they were drawn.

    test: the test images, if they were read already. digests: of all images of each split, empty where unknown.
    copies: what is there twice.
    """

    source: Source
    splits: dict[str, Split]
    train: Images
    val: Images | None
    preprocess: Preprocess
    seconds_per_read: float  # to read and preprocess one picture
    test: Images | None
    digests: dict[str, list[str]]
    copies: Copies

    @property
    def validation(self) -> Images:
        """The validation images, for who has made sure that there are some."""
        if self.val is None:
            raise AssertionError("nothing was held out")
        return self.val

    @property
    def bad_files(self) -> list[BadFile]:
        """Unreadable pictures met so far, and files that are left out and may be pictures."""
        lost = [BadFile(path, reason) for path, reason in self.source.lost]
        return lost + self.train.bad + (self.val.bad if self.val else [])


def read_new(recipe: Recipe, source: Source, screen: Screen) -> tuple[Recipe, Prepared]:
    """Read all pictures of `source`, draw the splits so that copies stay together, and say what is odd.

    `recipe` is resolved; the one that is returned also says what grey of 16 bits means, measured on the training
    pictures.
    """
    joined, places = everything(source), draw_splits(source, recipe)
    if recipe.data.train_fraction < 1 and "all" not in source.splits:
        needed = np.sort(np.concatenate(list(places.values())))
    else:
        needed = np.arange(len(joined))
    part = joined if len(needed) == len(joined) else joined.take(needed)
    began = time.monotonic()
    reading = _read(recipe, part, "pictures", screen)
    seconds_per_read = (time.monotonic() - began) / len(part)
    number = np.full(len(joined), -1)
    number[needed] = np.arange(len(needed))
    copies = copy_groups(reading.digests)
    if copies is not None:
        groups = np.arange(len(joined))
        groups[needed] = needed[copies]
        places = draw_splits(source, recipe, groups)
    places = {name: number[place] for name, place in places.items()}
    peaks = reading.peaks if reading.is_read else sample_peaks(part, places["train"])
    peak = max((peaks[i] for i in places["train"].tolist() if i in peaks), default=None)
    if recipe.data.grey_max is None and peak is not None:
        recipe = replace(recipe, data=replace(recipe.data, grey_max=grey_range(peak)))
        if recipe.data.grey_max != GREY16_MAX:
            reading = read_again(reading, build_preprocess(recipe.data))
        screen.say(_describe_grey(recipe, peak))
    digests = {name: [reading.digests[i] for i in place] for name, place in places.items()}
    images = {name: reading.images(place) for name, place in places.items()}
    splits = {name: part.take(place) for name, place in places.items()}
    prepared = _prepared(recipe, source, splits, images, digests, seconds_per_read)
    if source.skipped:
        screen.say(describe_skipped(source.skipped))
    for sentence in prepared.copies.sentences():
        screen.say(f"warning: {sentence}")
    return recipe, prepared


def prepare(
    recipe: Recipe,
    source: Source,
    splits: dict[str, Split],
    screen: Screen,
    digests: dict[str, list[str]] | None = None,
) -> Prepared:
    """Read the training and validation pictures of known splits. `recipe` is resolved.

    digests: those that were noted of each split. DataError if a picture has another one now.
    """
    began = time.monotonic()
    readings = {name: _read(recipe, split, name, screen) for name, split in splits.items() if name != "test"}
    seconds_per_read = (time.monotonic() - began) / sum(len(splits[name]) for name in readings)
    for name, reading in readings.items():
        if digests is not None:
            check_unchanged(splits[name].names, digests[name], reading.digests, source.name)
    images = {name: reading.images() for name, reading in readings.items()}
    if digests is None:
        digests = {name: [""] * len(split) for name, split in splits.items()}
        digests |= {name: reading.digests for name, reading in readings.items()}
    return _prepared(recipe, source, splits, images, digests, seconds_per_read)


def _read(recipe: Recipe, split: Split, name: str, screen: Screen) -> Reading:
    preprocess = build_preprocess(recipe.data)
    num_bytes = len(split) * preprocess.channels * preprocess.image_size[0] * preprocess.image_size[1]
    if recipe.data.in_memory and num_bytes > memory_bytes():
        raise UsageError(
            f"{len(split)} pictures of this size take {num_bytes / 2**30:.0f} GiB, more than this machine has",
            where="data.in_memory",
            hint="--in-memory false, or smaller pictures",
        )
    with screen.progress(f"reading {name}", len(split)) as bar:
        return read_images(
            split,
            preprocess,
            in_memory=bool(recipe.data.in_memory),
            progress=lambda done, total: bar.update(done),
        )


def _describe_grey(recipe: Recipe, peak: int) -> str:
    bits = (recipe.data.grey_max or GREY16_MAX).bit_length()
    return (
        f"16-bit grey pictures: values up to {peak:,}, taken as {bits} bits (--grey-max sets what is white)"
    )


def _prepared(
    recipe: Recipe,
    source: Source,
    splits: dict[str, Split],
    images: dict[str, Images],
    digests: dict[str, list[str]],
    seconds_per_read: float,
) -> Prepared:
    train, val = images["train"], images.get("val")
    lost = [BadFile(path, reason) for path, reason in source.lost]
    bad = train.bad + (val.bad if val else []) + lost
    total = len(splits["train"]) + len(splits.get("val", ())) + len(lost)
    check_bad_share(bad, total, recipe.data.max_bad_share)
    if len(np.unique(train.split.labels)) < 2:
        raise DataError("fewer than two classes have readable training images", where=source.name)
    return Prepared(
        source=source,
        splits=splits,
        train=train,
        val=val if val else None,
        preprocess=build_preprocess(recipe.data),
        seconds_per_read=seconds_per_read,
        test=images.get("test"),
        digests=digests,
        copies=find_copies(
            {name: split.names for name, split in splits.items()},
            {name: [source.class_names[i] for i in split.labels] for name, split in splits.items()},
            digests,
        ),
    )
