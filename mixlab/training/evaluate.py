"""`mixlab evaluate`: a run's weights on a split of its own data, or on any other labelled data."""

import difflib
from dataclasses import replace
from pathlib import Path

import numpy as np

from mixlab.checkpoint.open import open_weights
from mixlab.checkpoint.store import Weights
from mixlab.data.dataset import Source, Split
from mixlab.data.imagenet import numbers_by_name, read_real_labels, real_labels_of
from mixlab.data.loader import BadFile, load_images
from mixlab.data.preprocess import Fit
from mixlab.data.sources import open_source
from mixlab.device import set_threads
from mixlab.errors import DataError, UsageError
from mixlab.evaluation.metrics import Evaluation, accuracy_of_any, summarize
from mixlab.report.screen import Screen
from mixlab.training.distributed import classify_shared, joined
from mixlab.training.recipe import Recipe, from_toml, override
from mixlab.training.setup import fits_in_memory, open_data, with_absolute_paths
from mixlab.training.splits import reopen_splits, split_source

EVALUATION_BATCH = 128
WAIT_SECONDS = 300.0  # of one process for another
# The paper's two ways to measure (Section 3, Tables 2 and 3), 256 pixels cut to 224 or in proportion, and the one of
# its fine-tuning script. The filter stays the weights' own: the authors' code has other ones (docs/formats.md).
FITS: dict[str, tuple[Fit, float]] = {
    "resize-crop": ("resize-crop", 224 / 256),
    "resmall-crop": ("crop", 224 / 256),
    "stretch": ("stretch", 1.0),
}


def evaluate(
    run: str | Path,
    data: str | None = None,
    *,
    split: str | None = None,
    image_size: tuple[int, int] | None = None,
    fit: str | None = None,
    labels: str | None = None,
    data_dir: str | None = None,
    device: str = "auto",
    threads: int | None = None,
    screen: Screen | None = None,
) -> tuple[Evaluation, list[BadFile]]:
    """Metrics of the weights in `run`, and the images that could not be read.

    run: a run or weights folder, a weights file, or a published name. image_size: resample a Mixer to it first.
    data: None takes the run's own data set and the splits it was trained with. split: by default `test`, or
    everything where `data` has no splits. fit: one of FITS instead of the weights' own. labels: ReaL's
    (data/imagenet.py), measured beside the data's own.
    """
    screen = screen or Screen()
    acceptable = (
        None if labels is None else read_real_labels(labels)
    )  # before the weights, which may take long
    with joined(WAIT_SECONDS) as world:
        weights = open_weights(run, image_size=image_size)
        if fit is not None:
            weights = with_fit(weights, fit)
        source, images_split = choose_split(Path(run), data, split, data_dir, screen)
        images_split = with_class_numbers(images_split, source, weights.class_names)
        if acceptable is not None:  # what does not belong together is found before the pictures are read
            real_labels_of(images_split.names, acceptable, weights.class_names)
        torch_device = world.device(device)
        set_threads(threads)
        in_memory = fits_in_memory(world.local_size * len(images_split), weights.preprocess)
        with screen.progress("reading", len(images_split)) as bar:
            images = load_images(
                images_split,
                weights.preprocess,
                in_memory=in_memory,
                progress=lambda done, total: bar.update(done),
            )
        model = weights.model.to(torch_device)
        bad: list[BadFile] = []
        predictions = classify_shared(world, model, images, EVALUATION_BATCH, torch_device, on_bad=bad.append)
        bad = images.bad + [file for files in world.gather(bad) for file in files]
    evaluation = summarize(predictions, weights.class_names)
    if acceptable is not None:
        names = [images.split.names[i] for i in predictions.index]
        of_images = real_labels_of(names, acceptable, weights.class_names)
        evaluation = replace(evaluation, real=accuracy_of_any(predictions, of_images))
    return evaluation, bad


def with_fit(weights: Weights, fit: str) -> Weights:
    """The same weights with another way from picture to input; UsageError for an unknown one."""
    if fit not in FITS:
        raise UsageError(f"there is no fit {fit!r}", where="--fit", hint=f"there are {', '.join(FITS)}")
    name, crop_fraction = FITS[fit]
    return replace(weights, preprocess=replace(weights.preprocess, fit=name, crop_fraction=crop_fraction))


def choose_split(
    run: Path,
    data: str | None,
    split: str | None,
    data_dir: str | None,
    screen: Screen,
    *,
    split_whole: bool = False,
) -> tuple[Source, Split]:
    """The images that a person means: a split of the run's own data, or of `data`.

    split_whole: a set that has no splits is split as for training; otherwise all of it is taken.
    """
    if data is None:
        return _own_split(run, split or "test", data_dir)
    return _other_split(run, data, split, data_dir, screen, split_whole)


def _own_split(run: Path, name: str, data_dir: str | None) -> tuple[Source, Split]:
    if not (run / "recipe.toml").is_file():
        raise UsageError("these weights have no data set of their own", where=str(run), hint="name one: DATA")
    recipe = override(Recipe(), from_toml(run / "recipe.toml"), where=str(run / "recipe.toml"))
    if data_dir is not None:
        recipe = override(recipe, {"data.data_dir": data_dir})
    source = open_data(recipe)
    return source, _pick(reopen_splits(source, run / "split.csv"), name, source.name)


def _other_split(
    run: Path, data: str, name: str | None, data_dir: str | None, screen: Screen, split_whole: bool
) -> tuple[Source, Split]:
    if (run / "recipe.toml").is_file() and (run / "split.csv").is_file():
        own = override(Recipe(), from_toml(run / "recipe.toml"))
        if with_absolute_paths(override(own, {"data.source": data})).data.source == own.data.source:
            # What the run learnt from: without its own splits, training images would count as a test.
            return _own_split(run, name or "test", data_dir)
    source = open_source(data, data_dir=data_dir)
    if split_whole and "all" in source.splits:
        splits = split_source(source, override(Recipe(), {"data.val_fraction": 0.0}))
        return source, _pick(splits, name or "test", source.name)
    if "all" in source.splits and name is None:
        screen.say(f"{source.name} has no splits: all {len(source.splits['all'])} images are used")
    return source, _pick(
        dict(source.splits), name or ("all" if "all" in source.splits else "test"), source.name
    )


def _pick(splits: dict[str, Split], name: str, where: str) -> Split:
    if name not in splits:
        close = difflib.get_close_matches(name, splits, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(splits)}"
        raise UsageError(f"there is no split {name!r}", where=where, hint=hint)
    return splits[name]


def with_class_numbers(split: Split, source: Source, class_names: tuple[str, ...]) -> Split:
    """The same images with labels numbered as the model numbers its classes, which may be ImageNet's by any name."""
    number = {name: i for i, name in enumerate(class_names)}
    used = [source.class_names[i] for i in np.unique(split.labels)]
    if not number.keys() >= set(used):
        number = numbers_by_name(class_names)
    unknown = [name for name in used if name not in number]
    if unknown:
        some = ", ".join(unknown[:10]) + (", ..." if len(unknown) > 10 else "")
        raise DataError(
            f"the model does not know {len(unknown)} of the classes: {some}",
            where=source.name,
            hint=f"it knows {', '.join(class_names[:10])}{', ...' if len(class_names) > 10 else ''}",
        )
    table = np.array([number.get(name, -1) for name in source.class_names], dtype=np.int64)
    return replace(split, labels=table[split.labels])
