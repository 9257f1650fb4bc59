"""Examples to look at in a report: the worst mistakes, and what training saw."""

import contextlib
from pathlib import PurePath

import numpy as np
import torch
import torch.nn.functional as F

from mixlab.data.loader import TrainingDataset, training_batches
from mixlab.data.mixing import mix
from mixlab.data.reading import Examples, read_example
from mixlab.errors import ExampleError
from mixlab.evaluation.metrics import Predictions
from mixlab.report.page import Mistake, address, thumbnail
from mixlab.training.plan import Plan

NUM_MISTAKES = 32
NUM_SAMPLES = 32
IMAGE_SIDE = 96  # in a figure, pixels of the larger side at most


def worst_mistakes(plan: Plan, examples: Examples, predictions: Predictions) -> list[Mistake]:
    """Those with the largest loss, worst first, as they came; what cannot be read any more is left out."""
    wrong = np.flatnonzero(predictions.predicted != predictions.label)
    found = []
    for i in wrong[np.argsort(-predictions.loss[wrong], kind="stable")][:NUM_MISTAKES]:
        index = int(predictions.index[i])
        name = examples.split.names[index]
        with contextlib.suppress(ExampleError):
            example = read_example(examples.split, index, examples.preprocess)
            heard = examples.preprocess.modality.playable(example, examples.preprocess)
            found.append(
                Mistake(
                    src=thumbnail(_original(examples, example)),
                    media=None if heard is None else address(*heard),
                    name=PurePath(name).name if PurePath(name).is_absolute() else name,
                    label=plan.class_names[predictions.label[i]],
                    predicted=plan.class_names[predictions.predicted[i]],
                    probability=float(predictions.confidence[i]),
                )
            )
    return found


def _original(examples: Examples, example: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 1 or 3): the example before it is brought to the model's size, where that can be looked at."""
    preprocess = examples.preprocess
    picture = preprocess.modality.picture(example)
    return (
        preprocess.render(torch.from_numpy(preprocess.keep(example))[None])[0] if picture is None else picture
    )


def training_sample(plan: Plan, names: list[str]) -> tuple[list[np.ndarray], list[str]]:
    """The first examples of training as the model saw them, and what each was labelled. names: of the classes."""
    recipe = plan.recipe
    dataset = TrainingDataset(
        examples=plan.data.train, augment=plan.augment, batch_size=recipe.batch_size, seed=recipe.seed
    )
    batches = training_batches(dataset, first_step=0, num_steps=1, num_workers=0, on_bad=lambda file: None)
    batch = next(iter(batches))
    target = F.one_hot(batch.label, len(names)).float()
    inputs, target = mix(batch.inputs, target, recipe.augment, seed=recipe.seed, step=0, shard=0)
    seen = plan.preprocess.render_input(inputs[:NUM_SAMPLES])
    captions = []
    for row in target[:NUM_SAMPLES]:
        top = row.topk(2)
        pair = [(names[int(i)], float(share)) for share, i in zip(*top, strict=True) if share > 0]
        captions.append(
            pair[0][0] if len(pair) == 1 else "\n".join(f"{name} {share:.0%}" for name, share in pair)
        )
    return _thinned(seen), captions


def _thinned(images: list[np.ndarray]) -> list[np.ndarray]:
    """uint8 (H, W, channels) each, thinned to IMAGE_SIDE so that reports stay small."""
    strides = [max(max(image.shape[:2]) // IMAGE_SIDE, 1) for image in images]
    return [image[::stride, ::stride] for image, stride in zip(images, strides, strict=True)]
