"""What is trained on, validated on and tested on: drawn for a new run, found again for an old one."""

import os
from pathlib import Path

import numpy as np

from mixlab.data.dataset import Source, Split
from mixlab.data.sources import read_split_csv
from mixlab.data.splits import hold_out, stratified_split
from mixlab.errors import DataError
from mixlab.training.recipe import Recipe

AUTO_FRACTIONS = (0.8, 0.1, 0.1)  # train, val, test, where a source names no splits
MAX_VAL_IMAGES = 5_000


def split_source(source: Source, recipe: Recipe) -> dict[str, Split]:
    """`train`, and `val` and `test` where there are any: the source's own splits, or stratified ones."""
    seed = recipe.data.split_seed
    splits = dict(source.splits)
    if "all" in splits:
        everything = splits.pop("all")
        parts = stratified_split(everything.labels, AUTO_FRACTIONS, seed)
        splits = {
            name: everything.take(part) for name, part in zip(("train", "val", "test"), parts, strict=True)
        }
        if recipe.data.val_fraction == 0:
            both = np.sort(np.concatenate([parts[0], parts[1]]))
            splits = {"train": everything.take(both), "test": splits["test"]}
    if "train" not in splits:
        raise DataError(
            "there is no train split to learn from", where=source.name, hint="add a folder train/CLASS/*"
        )
    if recipe.data.val_fraction == 0 and "val" in splits:
        splits["train"] = _join(splits["train"], splits.pop("val"))
    if recipe.data.train_fraction < 1:
        fractions = (recipe.data.train_fraction, 1 - recipe.data.train_fraction)
        splits["train"] = splits["train"].take(stratified_split(splits["train"].labels, fractions, seed)[0])
    if "val" not in splits and recipe.data.val_fraction > 0:
        rest, held = hold_out(splits["train"].labels, recipe.data.val_fraction, MAX_VAL_IMAGES, seed)
        splits |= {"val": splits["train"].take(held), "train": splits["train"].take(rest)}
    return {name: split for name, split in splits.items() if len(split)}


def _join(a: Split, b: Split) -> Split:
    pixels = None if a.pixels is None or b.pixels is None else np.concatenate([a.pixels, b.pixels])
    rows = None if a.rows is None or b.rows is None else np.concatenate([a.rows, b.rows])
    labels = np.concatenate([a.labels, b.labels])
    return Split(names=a.names + b.names, labels=labels, pixels=pixels, encoded=a.encoded, rows=rows)


def reopen_splits(source: Source, split_csv: Path) -> dict[str, Split]:
    """The splits that a run wrote down, found again in `source`. DataError if images are gone."""
    joined = None
    for split in source.splits.values():
        joined = split if joined is None else _join(joined, split)
    assert joined is not None
    position = {_key(name, joined): i for i, name in enumerate(joined.names)}
    if len(position) != len(joined):
        raise DataError("two images of this data set have the same name", where=source.name)
    splits = {}
    for name, wanted in read_split_csv(split_csv).items():
        missing = [image for image in wanted if image not in position]
        if missing:
            raise DataError(
                f"{len(missing)} images of this run's {name} split are gone, the first is {missing[0]}",
                where=source.name,
                hint="bring them back, or name another data set",
            )
        splits[name] = joined.take(np.array([position[image] for image in wanted], dtype=np.int64))
    return splits


def _key(name: str, split: Split) -> str:
    return os.path.abspath(name) if split.has_files else name
