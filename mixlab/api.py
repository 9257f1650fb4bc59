"""What a program calls beside training and loading: `mixlab.evaluate` and `mixlab.check`."""

import os
from typing import Any

from mixlab.data.check import CheckResult
from mixlab.data.check import check as check_source
from mixlab.data.sources import open_source
from mixlab.errors import path_text
from mixlab.evaluation.metrics import Evaluation
from mixlab.report.screen import Screen
from mixlab.training.evaluate import evaluate as evaluate_weights


def evaluate(
    run: str | os.PathLike[str], data: str | os.PathLike[str] | None = None, **options: Any
) -> Evaluation:
    """Metrics of a run, a weights file or a published name, on its own test split or on other labelled data.

    options: split, image_size (a side, or (height, width)), fit, labels, data_dir, device, threads and screen, as
    `mixlab evaluate` has them. Examples that cannot be read are named on the screen and not counted.
    """
    size = options.get("image_size")
    if isinstance(size, int):
        options["image_size"] = (size, size)
    screen = options["screen"] = options.get("screen") or Screen()
    evaluation, bad = evaluate_weights(run, data, **options)
    for file in bad:
        screen.say(f"not counted, unreadable: {file.path}: {file.reason}")
    return evaluation


def check(
    data: str | os.PathLike[str], *, data_dir: str | None = None, download: bool = False
) -> CheckResult:
    """Read every example of a data set: counts, unreadable files, duplicates, contradictory labels."""
    name = path_text(data, "data", "a folder, a CSV file or the name of a data set")
    return check_source(open_source(name, data_dir=data_dir, download=download))
