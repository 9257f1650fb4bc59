"""Which images a person means: a split of a run's own data, wherever that is now, or other data."""

import difflib
import os
from pathlib import Path

import numpy as np

from mixlab.data.copies import copy_groups
from mixlab.data.csv_files import read_record
from mixlab.data.dataset import Source, Split, everything
from mixlab.data.modality import Modality
from mixlab.data.reading import digests_of, look_at
from mixlab.data.sources import open_source
from mixlab.errors import DataError, ExampleError, UsageError
from mixlab.report.screen import Screen
from mixlab.training.keys import from_toml, override
from mixlab.training.recipe import Recipe
from mixlab.training.setup import open_data, with_absolute_paths
from mixlab.training.splits import Recorded, find_splits, split_source

NUM_COMPARED = 64  # examples, by which a set is recognised whose paths are the same


def choose_split(
    run: Path,
    data: str | None,
    split: str | None,
    data_dir: str | None,
    screen: Screen,
    *,
    moved_to: str | None = None,
    split_whole: bool = False,
) -> tuple[Source, Split]:
    """The images that a person means: a split of the run's own data, or of `data`.

    data: if it is the run's own set, here or at another place, the run's splits are taken; without them, training
    images would count as a test. moved_to: where the run's own data is now. split_whole: a set that has no splits is
    split as for training; otherwise all of it is taken.
    """
    if data is None:
        return _own_split(run, split or "test", data_dir, moved_to)
    if has_record(run):
        recipe = recipe_of(run, to_train=False)
        here = with_absolute_paths(override(recipe, {"data.source": data})).data.source
        if here == recipe.data.source:
            return _own_split(run, split or "test", data_dir, None)
    source = open_source(data, data_dir=data_dir, for_evaluation=not split_whole)
    if has_record(run):
        found = _recognise(source, run, recipe.data.source)
        if found is not None:
            screen.say(f"{data} is the run's own data: its own splits are used")
            return source, _pick(_taken(source, found), split or "test", source.name)
    if split_whole and "all" in source.splits:
        keep_all = override(Recipe(), {"data.val_fraction": 0.0})
        return source, _pick(split_source(source, keep_all, _groups(source)), split or "test", source.name)
    if "all" in source.splits and split is None:
        screen.say(
            f"{source.name} has no splits: all {len(source.splits['all'])} {source.modality.many} are used"
        )
    return source, _pick(
        dict(source.splits), split or ("all" if "all" in source.splits else "test"), source.name
    )


def known_digests(run: Path) -> dict[str, set[str]] | None:
    """The digests of a run's examples by split; None for weights alone, and for runs of versions that noted none."""
    if not has_record(run):
        return None
    digests = {
        split: {digest for _, digest in rows if digest}
        for split, rows in read_record(run / "split.csv").items()
    }
    return digests if any(digests.values()) else None


def has_record(run: Path) -> bool:
    """Whether `run` is a run that wrote down its splits, not weights alone."""
    return (run / "recipe.toml").is_file() and (run / "split.csv").is_file()


def recipe_of(run: Path, *, to_train: bool = True) -> Recipe:
    """The recipe that a run wrote down. UsageError for a folder that is no run's.

    to_train: see `keys.override`.
    """
    if not (run / "recipe.toml").is_file():
        raise UsageError("these weights have no data set of their own", where=str(run), hint="name one: DATA")
    where = str(run / "recipe.toml")
    return override(Recipe(), from_toml(run / "recipe.toml"), where=where, to_train=to_train)


def open_own_data(run: Path, recipe: Recipe, moved_to: str | None = None) -> tuple[Source, Recorded]:
    """The data set of a run, at `moved_to` if it was moved, and the run's splits in it. DataError if it is gone.

    recipe: the run's.
    """
    root = recipe.data.source
    if moved_to is not None:
        recipe = with_absolute_paths(override(recipe, {"data.source": moved_to}))
    if os.path.isabs(recipe.data.source) and not os.path.exists(recipe.data.source):
        raise DataError(
            "the run's data set is not there any more" if moved_to is None else "there is no such data set",
            where=recipe.data.source,
            hint="say where it is now: --data PATH",
        )
    source = open_data(recipe)
    found = find_splits(source, run / "split.csv", None if moved_to is None else root)
    if moved_to is not None and not _is_same(source, found):
        raise DataError(
            "the examples here have the same names as the run's, but are others", where=recipe.data.source
        )
    return source, found


def _own_split(run: Path, name: str, data_dir: str | None, moved_to: str | None) -> tuple[Source, Split]:
    recipe = recipe_of(run, to_train=False)
    if data_dir is not None:
        recipe = override(recipe, {"data.data_dir": data_dir})
    source, found = open_own_data(run, recipe, moved_to)
    return source, _pick(_taken(source, found), name, source.name)


def _taken(source: Source, found: Recorded) -> dict[str, Split]:
    joined = everything(source)
    return {name: joined.take(places) for name, places in found.places.items()}


def _recognise(source: Source, run: Path, root: str) -> Recorded | None:
    """The run's splits in `source`, if that is the set that the run learnt from, at another place."""
    try:
        found = find_splits(source, run / "split.csv", root)
    except DataError:
        return None
    has_digests = any(digest for digests in found.digests.values() for digest in digests)
    is_by_name = not has_digests and all(split.has_files for split in source.splits.values())
    return found if is_by_name or (has_digests and _is_same(source, found)) else None


def _is_same(source: Source, found: Recorded) -> bool:
    """Whether some examples, evenly chosen, have the digests that were noted."""
    joined = everything(source)
    pairs = [
        (int(place), digest)
        for name, places in found.places.items()
        for place, digest in zip(places, found.digests[name], strict=True)
        if digest and not digest.startswith("bytes-")
    ]
    chosen = np.unique(np.linspace(0, len(pairs) - 1, min(len(pairs), NUM_COMPARED)).astype(int))
    return all(_digest(joined, pairs[i][0], source.modality) in (None, pairs[i][1]) for i in chosen)


def _digest(split: Split, index: int, modality: Modality) -> str | None:
    try:
        return look_at(split, index, modality).digest
    except ExampleError:  # damaged since: the others tell
        return None


def _groups(source: Source) -> np.ndarray | None:
    """Which examples of a source are copies of each other, as for a training on it."""
    return copy_groups(digests_of(everything(source), source.modality))


def _pick(splits: dict[str, Split], name: str, where: str) -> Split:
    if name not in splits:
        close = difflib.get_close_matches(name, splits, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(splits)}"
        raise UsageError(f"there is no split {name!r}", where=where, hint=hint)
    return splits[name]
