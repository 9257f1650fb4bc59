"""`mixlab fewshot`: a linear probe on a model's frozen features, from a few examples of each class."""

from pathlib import Path
from typing import Any

import numpy as np

from mixlab.checkpoint.open import open_weights
from mixlab.checkpoint.store import Weights
from mixlab.data.dataset import Source, Split
from mixlab.data.loader import evaluation_batches
from mixlab.data.modality import BadFile
from mixlab.data.reading import load_examples
from mixlab.device import pick_device
from mixlab.errors import DataError, UsageError
from mixlab.evaluation.few_shot import extract_features, few_shot_accuracy
from mixlab.report.screen import Screen
from mixlab.training.choose_split import choose_split
from mixlab.training.evaluate import EVALUATION_BATCH, check_modality
from mixlab.training.setup import fits_in_memory


def few_shot(
    name: str | Path,
    data: str | None = None,
    *,
    shots: tuple[int, ...] = (1, 5, 10, 25),
    num_seeds: int = 3,
    l2: float = 2.0**10,
    image_size: tuple[int, int] | None = None,
    data_dir: str | None = None,
    device: str = "auto",
    screen: Screen | None = None,
) -> dict[str, Any]:
    """Accuracy on the test split of probes fitted to `shots` images a class of the train split.

    name: a run, weights file or published name. data: None takes the run's own data; a set without splits is
    split as for training. The result is what `mixlab fewshot --json` prints.
    """
    screen = screen or Screen()
    if num_seeds < 1:
        raise UsageError(f"seeds must be at least 1, got {num_seeds}", where="--seeds")
    with screen.progress_if_any("downloading") as progress:
        weights = open_weights(name, image_size=image_size, progress=progress)
    bad: list[BadFile] = []
    features, labels = {}, {}
    for split_name in ("train", "test"):
        source, split = choose_split(Path(name), data, split_name, data_dir, screen, split_whole=True)
        check_modality(source, weights)
        features[split_name], labels[split_name] = _extract(weights, source, split, device, bad, screen)
    num_classes = len(source.class_names)
    present = np.unique(labels["train"])
    if len(present) < num_classes:
        absent = source.class_names[int(np.setdiff1d(np.arange(num_classes), present)[0])]
        raise DataError(f"class {absent} has no readable training example", where=source.name)
    table = few_shot_accuracy(
        features["train"],
        labels["train"],
        features["test"],
        labels["test"],
        num_classes=num_classes,
        shots=shots,
        seeds=range(num_seeds),
        l2=l2,
    )
    rows = [
        {
            "shots": shot,
            "top1": float(column.mean()),
            "lowest": float(column.min()),
            "highest": float(column.max()),
            "by_seed": column.tolist(),
        }
        for shot, column in zip(shots, table.T, strict=True)
    ]
    return {
        "shots": rows,
        "num_seeds": num_seeds,
        "l2": l2,
        "num_classes": num_classes,
        "num_features": int(features["train"].shape[1]),
        "num_train": len(labels["train"]),
        "num_test": len(labels["test"]),
        "bad": [vars(file) for file in bad],
    }


def _extract(
    weights: Weights, source: Source, split: Split, device: str, bad: list[BadFile], screen: Screen
) -> tuple[np.ndarray, np.ndarray]:
    with screen.progress(f"reading {source.name}", len(split)) as bar:
        examples = load_examples(
            split,
            weights.preprocess,
            in_memory=fits_in_memory(len(split), weights.preprocess),
            progress=lambda done, total: bar.update(done),
        )
    bad += examples.bad
    torch_device = pick_device(device)
    batches = evaluation_batches(examples, EVALUATION_BATCH, on_bad=bad.append)
    return extract_features(weights.model.to(torch_device), batches, torch_device)
