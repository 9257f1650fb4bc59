"""`mixlab evaluate`: a run's weights on a split of its own data, or on any other labelled data."""

import os
from dataclasses import replace
from pathlib import Path
from unicodedata import normalize

import numpy as np

from mixlab.checkpoint.open import open_weights
from mixlab.checkpoint.store import Weights
from mixlab.data.dataset import Source, Split
from mixlab.data.images.imagenet import numbers_by_name, read_real_labels, real_labels_of
from mixlab.data.images.preprocess import Fit, for_images
from mixlab.data.modality import BadFile
from mixlab.data.reading import Examples, load_examples
from mixlab.device import set_threads
from mixlab.errors import DataError, UsageError, path_text
from mixlab.evaluation.metrics import Evaluation, accuracy_of_any, summarize
from mixlab.report.screen import Screen
from mixlab.training.choose_split import choose_split, has_record, known_digests
from mixlab.training.distributed import classify_shared, joined
from mixlab.training.setup import fits_in_memory

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
    run: str | os.PathLike[str],
    data: str | os.PathLike[str] | None = None,
    *,
    moved_to: str | None = None,
    split: str | None = None,
    image_size: tuple[int, int] | None = None,
    fit: str | None = None,
    labels: str | None = None,
    calibrated: bool = True,
    data_dir: str | None = None,
    device: str = "auto",
    threads: int | None = None,
    screen: Screen | None = None,
) -> tuple[Evaluation, list[BadFile]]:
    """Metrics of the weights in `run`, and the images that could not be read.

    run: a run or weights folder, a weights file, or a published name. image_size: resample a Mixer to it first.
    data: None takes the run's own data set and the splits it was trained with, at `moved_to` if it was moved. split:
    by default `test`, or everything where `data` has no splits. Examples that the run was trained on are counted.
    fit: one of FITS instead of the weights' own. labels: ReaL's (images/imagenet.py), measured beside the data's own.
    calibrated: divide the logits by the weights' temperature before the softmax; accuracy and loss stay as they are.
    """
    screen = screen or Screen()
    run = path_text(run, "run", "a run, a weights file or a published name")
    data = None if data is None else path_text(data, "data", "a folder, a CSV file or the name of a data set")
    acceptable = (
        None if labels is None else read_real_labels(labels)
    )  # before the weights, which may take long
    with joined(WAIT_SECONDS) as world:
        weights = open_weights(run, image_size=image_size)
        if fit is not None:
            weights = with_fit(weights, fit)
        source, chosen = choose_split(Path(run), data, split, data_dir, screen, moved_to=moved_to)
        check_modality(source, weights)
        name = next((name for name, one in source.splits.items() if one is chosen), split or "test")
        of = "all" if name == "all" else f"the {name} split"
        screen.say(f"measured on {source.name}: {of}, {len(chosen):,} {source.modality.many}")
        chosen = with_class_numbers(chosen, source, weights.class_names)
        if acceptable is not None:  # what does not belong together is found before the images are read
            real_labels_of(chosen.names, acceptable, weights.class_names)
        torch_device = world.device(device)
        set_threads(threads)
        in_memory = fits_in_memory(world.local_size * len(chosen), weights.preprocess)
        with screen.progress("reading", len(chosen)) as bar:
            examples = load_examples(
                chosen,
                weights.preprocess,
                in_memory=in_memory,
                progress=lambda done, total: bar.update(done),
            )
        known = known_digests(Path(run))
        if data is not None and split is None and known is not None:
            examples = _without_training(examples, known, screen)
        model = weights.model.to(torch_device)
        bad: list[BadFile] = []
        predictions = classify_shared(
            world,
            model,
            examples,
            EVALUATION_BATCH,
            torch_device,
            on_bad=bad.append,
            temperature=weights.temperature if calibrated else 1.0,
        )
        bad = examples.bad + [file for files in world.gather(bad) for file in files]
    evaluation = replace(
        # Thresholds are of calibrated confidence.
        summarize(predictions, weights.class_names, weights.thresholds if calibrated else ()),
        num_trained_on=_num_trained_on(examples, predictions.index, known),
        modality=source.modality.name,
    )
    _say_what_is_known(
        evaluation, source.modality.many, screen, is_known=known is not None or not has_record(Path(run))
    )
    if acceptable is not None:
        names = [examples.split.names[i] for i in predictions.index]
        of_images = real_labels_of(names, acceptable, weights.class_names)
        evaluation = replace(evaluation, real=accuracy_of_any(predictions, of_images))
    return evaluation, bad


def _without_training(examples: Examples, known: dict[str, set[str]], screen: Screen) -> Examples:
    """Only the run's own test examples, where `examples` are all that it had, under whatever names."""
    tested, found = known.get("test", set()), set(examples.digests)
    if not tested or not tested <= found or not known["train"] & found:
        return examples
    own = np.flatnonzero([digest in tested and digest not in known["train"] for digest in examples.digests])
    screen.say(
        f"these are the run's own {examples.preprocess.modality.many}: the {len(own)} of its test split are used"
    )
    return examples.take(own)


def _num_trained_on(examples: Examples, index: np.ndarray, known: dict[str, set[str]] | None) -> int | None:
    """How many of the measured examples the run was trained on; None if that cannot be known."""
    if known is None or not any(examples.digests):
        return None
    return sum(examples.digests[i] in known["train"] for i in index)


def _say_what_is_known(evaluation: Evaluation, many: str, screen: Screen, *, is_known: bool) -> None:
    if evaluation.num_trained_on:
        screen.say(
            f"warning: the model was trained on {evaluation.num_trained_on:,} of these {evaluation.num_images:,} "
            f"{many}: the accuracy on new ones is lower"
        )
    if not is_known:
        screen.say(f"this run is of an older version: whether it was trained on these {many} cannot be known")


def with_fit(weights: Weights, fit: str) -> Weights:
    """The same weights with another way from image to input; UsageError for an unknown one."""
    if fit not in FITS:
        raise UsageError(f"there is no fit {fit!r}", where="--fit", hint=f"there are {', '.join(FITS)}")
    preprocess = for_images(weights.preprocess, "a fit", "--fit")
    name, crop_fraction = FITS[fit]
    return replace(weights, preprocess=replace(preprocess, fit=name, crop_fraction=crop_fraction))


def check_modality(source: Source, weights: Weights) -> None:
    """UsageError if the weights take another kind of example than the data has."""
    taken = weights.preprocess.modality
    if taken is not source.modality:
        raise UsageError(
            f"the data has {source.modality.many}, and these weights take {taken.many}", where=source.name
        )


def with_class_numbers(split: Split, source: Source, class_names: tuple[str, ...]) -> Split:
    """The same images with labels numbered as the model numbers its classes, which may be ImageNet's by any name."""
    number = {normalize("NFC", name): i for i, name in enumerate(class_names)}
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
