"""The data of a training, read: splits drawn so that copies stay together, examples read, what is odd."""

import time
from dataclasses import dataclass, replace

import numpy as np

from mixlab.data.copies import Copies, copy_groups, find_copies
from mixlab.data.dataset import Source, Split, everything
from mixlab.data.listing import describe_skipped
from mixlab.data.modality import BadFile, Modality, Preprocess
from mixlab.data.reading import (
    Examples,
    Reading,
    check_bad_share,
    read_again,
    read_examples,
    sample_facts,
)
from mixlab.device import memory_bytes
from mixlab.errors import DataError, UsageError
from mixlab.report.screen import Screen
from mixlab.training.recipe import Recipe
from mixlab.training.setup import build_preprocess, num_bytes_kept
from mixlab.training.splits import check_unchanged, draw_splits


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The data of a training: its examples, and the splits as they were drawn.

    test: the test examples, if they were read already. digests: of all examples of each split, empty where unknown.
    copies: what is there twice.
    """

    source: Source
    splits: dict[str, Split]
    train: Examples
    val: Examples | None
    preprocess: Preprocess
    seconds_per_read: float  # to read and preprocess one example
    test: Examples | None
    digests: dict[str, list[str]]
    copies: Copies

    @property
    def validation(self) -> Examples:
        """The validation examples, for who has made sure that there are some."""
        if self.val is None:
            raise AssertionError("nothing was held out")
        return self.val

    @property
    def bad_files(self) -> list[BadFile]:
        """Unreadable examples met so far, and files that are left out and may be some."""
        lost = [BadFile(path, reason) for path, reason in self.source.lost]
        return lost + self.train.bad + (self.val.bad if self.val else [])


def read_new(recipe: Recipe, source: Source, screen: Screen) -> tuple[Recipe, Prepared]:
    """Read all examples of `source`, draw the splits so that copies stay together, and say what is odd.

    `recipe` is resolved; the one that is returned also has what the training examples decide (`Modality.learn`).
    """
    joined, places = everything(source), draw_splits(source, recipe)
    if recipe.data.train_fraction < 1 and "all" not in source.splits:
        needed = np.sort(np.concatenate(list(places.values())))
    else:
        needed = np.arange(len(joined))
    part = joined if len(needed) == len(joined) else joined.take(needed)
    began = time.monotonic()
    reading = _read(recipe, part, source.modality, source.modality.many, screen)
    seconds_per_read = (time.monotonic() - began) / len(part)
    number = np.full(len(joined), -1)
    number[needed] = np.arange(len(needed))
    copies = copy_groups(reading.digests)
    if copies is not None:
        groups = np.arange(len(joined))
        groups[needed] = needed[copies]
        places = draw_splits(source, recipe, groups)
    places = {name: number[place] for name, place in places.items()}
    modality = source.modality
    facts = reading.facts if reading.is_read else sample_facts(part, places["train"], modality)
    learnt, sentence = modality.learn(recipe.data, [facts[i] for i in places["train"].tolist() if i in facts])
    recipe = replace(recipe, data=learnt)
    preprocess = build_preprocess(recipe, modality)
    if preprocess != reading.preprocess:
        reading = read_again(reading, preprocess)
    if sentence is not None:
        screen.say(sentence)
    digests = {name: [reading.digests[i] for i in place] for name, place in places.items()}
    examples = {name: reading.examples(place) for name, place in places.items()}
    splits = {name: part.take(place) for name, place in places.items()}
    prepared = _prepared(recipe, source, splits, examples, digests, seconds_per_read)
    if source.skipped:
        screen.say(describe_skipped(source.skipped))
    for warning in prepared.copies.sentences(modality.one, modality.many):
        screen.say(f"warning: {warning}")
    return recipe, prepared


def prepare(
    recipe: Recipe,
    source: Source,
    splits: dict[str, Split],
    screen: Screen,
    digests: dict[str, list[str]] | None = None,
) -> Prepared:
    """Read the training and validation examples of known splits. `recipe` is resolved.

    digests: those that were noted of each split. DataError if an example has another one now.
    """
    began = time.monotonic()
    readings = {
        name: _read(recipe, split, source.modality, name, screen)
        for name, split in splits.items()
        if name != "test"
    }
    seconds_per_read = (time.monotonic() - began) / sum(len(splits[name]) for name in readings)
    for name, reading in readings.items():
        if digests is not None:
            check_unchanged(splits[name].names, digests[name], reading.digests, source.name)
    examples = {name: reading.examples() for name, reading in readings.items()}
    if digests is None:
        digests = {name: [""] * len(split) for name, split in splits.items()}
        digests |= {name: reading.digests for name, reading in readings.items()}
    return _prepared(recipe, source, splits, examples, digests, seconds_per_read)


def _read(recipe: Recipe, split: Split, modality: Modality, name: str, screen: Screen) -> Reading:
    preprocess = build_preprocess(recipe, modality)
    num_bytes = len(split) * num_bytes_kept(preprocess)
    if recipe.data.in_memory and num_bytes > memory_bytes():
        raise UsageError(
            f"{len(split)} {modality.many} of this size take {num_bytes / 2**30:.0f} GiB, more than this machine has",
            where="data.in_memory",
            hint=f"--in-memory false, or smaller {modality.many}",
        )
    with screen.progress(f"reading {name}", len(split)) as bar:
        return read_examples(
            split,
            preprocess,
            in_memory=bool(recipe.data.in_memory),
            progress=lambda done, total: bar.update(done),
        )


def _prepared(
    recipe: Recipe,
    source: Source,
    splits: dict[str, Split],
    examples: dict[str, Examples],
    digests: dict[str, list[str]],
    seconds_per_read: float,
) -> Prepared:
    train, val = examples["train"], examples.get("val")
    lost = [BadFile(path, reason) for path, reason in source.lost]
    bad = train.bad + (val.bad if val else []) + lost
    total = len(splits["train"]) + len(splits.get("val", ())) + len(lost)
    check_bad_share(bad, total, recipe.data.max_bad_share, source.modality.one, source.modality.many)
    if len(np.unique(train.split.labels)) < 2:
        many = source.modality.many
        raise DataError(f"fewer than two classes have readable training {many}", where=source.name)
    return Prepared(
        source=source,
        splits=splits,
        train=train,
        val=val if val else None,
        preprocess=build_preprocess(recipe, source.modality),
        seconds_per_read=seconds_per_read,
        test=examples.get("test"),
        digests=digests,
        copies=find_copies(
            {name: split.names for name, split in splits.items()},
            {name: [source.class_names[i] for i in split.labels] for name, split in splits.items()},
            digests,
        ),
    )
