"""What is trained on, validated on and tested on: drawn for a new run, found again for an old one."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mixlab.data.csv_files import read_record
from mixlab.data.dataset import Source, Split, everything
from mixlab.data.splits import hold_out, stratified_split
from mixlab.errors import DataError
from mixlab.training.recipe import Recipe

AUTO_FRACTIONS = (0.8, 0.1, 0.1)  # train, val, test, where a source names no splits
MAX_VAL_IMAGES = 5_000


def split_source(source: Source, recipe: Recipe, groups: np.ndarray | None = None) -> dict[str, Split]:
    """`train`, and `val` and `test` where there are any: the source's own splits, or stratified ones."""
    joined = everything(source)
    return {name: joined.take(places) for name, places in draw_splits(source, recipe, groups).items()}


def draw_splits(source: Source, recipe: Recipe, groups: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """`split_source` as indices into `everything(source)`.

    groups: int64, a number for each of all images; those with the same one stay in one drawn split.
    """
    seed, data = recipe.data.split_seed, recipe.data
    labels = np.concatenate([split.labels for split in source.splits.values()])
    ends = np.cumsum([len(split) for split in source.splits.values()])
    starts = [0, *ends[:-1]]
    places = {
        name: np.arange(start, end) for name, start, end in zip(source.splits, starts, ends, strict=True)
    }

    def of(part: np.ndarray) -> np.ndarray | None:
        return None if groups is None else groups[part]

    if "all" in places:
        whole = places.pop("all")
        parts = [whole[i] for i in stratified_split(labels[whole], AUTO_FRACTIONS, seed, of(whole))]
        places = dict(zip(("train", "val", "test"), parts, strict=True))
        if data.val_fraction == 0:
            places = {"train": np.sort(np.concatenate(parts[:2])), "test": parts[2]}
    if "train" not in places:
        raise DataError(
            "there is no train split to learn from", where=source.name, hint="add a folder train/CLASS/*"
        )
    if data.val_fraction == 0 and "val" in places:
        places["train"] = np.concatenate([places["train"], places.pop("val")])
    train = places["train"]
    if data.train_fraction < 1:
        fractions = (data.train_fraction, 1 - data.train_fraction)
        train = places["train"] = train[stratified_split(labels[train], fractions, seed)[0]]
    if "val" not in places and data.val_fraction > 0:
        rest, held = hold_out(labels[train], data.val_fraction, MAX_VAL_IMAGES, seed, of(train))
        places |= {"val": train[held], "train": train[rest]}
    return {name: part for name, part in places.items() if len(part)}


@dataclass(frozen=True)
class Recorded:
    """Splits that a run wrote down, found again: where in `everything(source)`, and the digests that were noted."""

    places: dict[str, np.ndarray]
    digests: dict[str, list[str]]


def reopen_splits(source: Source, split_csv: Path, root: str | Path | None = None) -> dict[str, Split]:
    """The splits that a run wrote down, found again in `source`. DataError if images are gone.

    root: where the run had its data, if `source` is somewhere else now; images are then found by their path below it.
    """
    joined = everything(source)
    return {name: joined.take(places) for name, places in find_splits(source, split_csv, root).places.items()}


def find_splits(source: Source, split_csv: Path, root: str | Path | None = None) -> Recorded:
    """`reopen_splits` as indices into `everything(source)`, and the digests of the record."""
    joined = everything(source)
    keys = [_key(name, joined, source.root if root is not None else None) for name in joined.names]
    position = {key: i for i, key in enumerate(keys)}
    if len(position) != len(joined):
        raise DataError(f"two {source.modality.many} of this data set have the same name", where=source.name)
    places, digests = {}, {}
    for name, rows in read_record(split_csv).items():
        wanted = [_key(image, joined, root) for image, _ in rows]
        missing = [image for image in wanted if image not in position]
        if missing:
            raise DataError(
                f"{len(missing)} {source.modality.many} of this run's {name} split are gone, "
                f"the first is {missing[0]}",
                where=str(source.root or source.name),
                hint="bring them back, or say where they are now: --data PATH",
            )
        places[name] = np.array([position[image] for image in wanted], dtype=np.int64)
        digests[name] = [digest for _, digest in rows]
    return Recorded(places, digests)


def _key(name: str, split: Split, root: str | Path | None) -> str:
    """By what an image is found again: its absolute path, or the one below `root`; its name where it is no file."""
    if not split.has_files:
        return name
    if root is None:
        return os.path.abspath(name)
    folder = Path(root)
    # A CSV file's images lie beside it.
    folder = folder.parent if folder.suffix.lower() in (".csv", ".tsv") else folder
    return os.path.relpath(os.path.abspath(name), os.path.abspath(folder))


def check_unchanged(names: Sequence[str], noted: Sequence[str], found: Sequence[str], where: str) -> None:
    """DataError if images have other digests than a run noted; an unknown one (empty) is no change."""
    changed = [name for name, old, new in zip(names, noted, found, strict=True) if old and new and old != new]
    if changed:
        raise DataError(
            f"{len(changed)} of the run's examples are not what they were, the first is {changed[0]}",
            where=where,
            hint="bring the old ones back, or begin a new run on what there is now",
        )
