"""What a person should know before trusting a training: few or uneven examples, learning by heart.

The same sentences stand on the terminal, in the report and in `train --json`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mixlab.evaluation.metrics import wilson_interval
from mixlab.language import tell
from mixlab.report.run_log import last_accuracies
from mixlab.training.plan import Plan

FEW = 10  # training examples of a class, below which it is called small
FEW_VALIDATION = 100  # below it a share has an interval of 20 points and more
UNEVEN = 10  # times that the largest class has the examples of the smallest
GAP = 0.1  # of accuracy, by which training is above all that validation can be
NUM_NAMED = 3  # classes


def class_cautions(names: Sequence[str], labels: np.ndarray, many: str = "images") -> list[str]:
    """Sentences where classes are small, or of very different sizes. labels: int64 (n,), of the training examples."""
    counts = np.bincount(labels, minlength=len(names))
    order = np.argsort(counts, kind="stable")
    found = []
    small = [f"{names[i]} ({counts[i]})" for i in order if counts[i] < FEW]
    if small:
        names_of_small = ", ".join(small[:NUM_NAMED])
        if len(small) > NUM_NAMED:
            names_of_small += tell(" and {n:,} more", n=len(small) - NUM_NAMED)
        values = {"n": len(small), "few": FEW, "many": many, "names": names_of_small}
        found.append(
            tell(
                "1 class has fewer than {few} training {many}: {names}. Add {many}, or start from trained weights "
                "with `mixlab finetune`",
                **values,
            )
            if len(small) == 1
            else tell(
                "{n:,} classes have fewer than {few} training {many}: {names}. Add {many}, or start from trained "
                "weights with `mixlab finetune`",
                **values,
            )
        )
    present = [i for i in order if counts[i]]
    least, most = present[0], present[-1]
    if counts[most] > UNEVEN * counts[least]:
        found.append(
            tell(
                "the classes are uneven: {largest} has {most:,} training {many}, {smallest} has {least:,}. Read the "
                "balanced accuracy, and add {many} of the small classes",
                largest=names[most],
                most=counts[most],
                smallest=names[least],
                least=counts[least],
                many=many,
            )
        )
    return found


def overfitting(rows: list[dict[str, Any]], num_val: int, many: str = "images") -> str | None:
    """A sentence where training accuracy ended above all that validation can be; None else.

    rows: of the run's log. num_val: examples in validation, of which that depends.
    """
    found = last_accuracies(rows)
    if not num_val or found is None:
        return None
    accuracy, top1 = found
    _, highest = wilson_interval(min(round(top1 * num_val), num_val), num_val)
    if accuracy <= highest + GAP:
        return None
    return tell(
        "the model has learnt its training {many} by heart: accuracy {training:.0f} % in training, {validation:.0f} "
        "% on validation. Try more {many}, stronger augmentation, a smaller model, or trained weights with "
        "`mixlab finetune`",
        many=many,
        training=100 * accuracy,
        validation=100 * top1,
    )


def few_validation(number: int, one: str, many: str) -> str | None:
    """A sentence where `number` examples are too few to choose and to calibrate by; None else, and without any."""
    if not 0 < number < FEW_VALIDATION:
        return None
    return tell(
        "validation has only {n:,} {many}: its accuracy, the best weights chosen by it and the calibration of "
        "probabilities are rough",
        n=number,
        many=one if number == 1 else many,
    )


def data_cautions(plan: Plan) -> list[str]:
    """What is odd in the training and validation examples, known before the first step."""
    one, many = plan.modality.one, plan.modality.many
    found = class_cautions(plan.class_names, plan.data.train.split.labels, many)
    few = few_validation(0 if plan.data.val is None else len(plan.data.val), one, many)
    return found if few is None else [*found, few]


def run_caution(plan: Plan, rows: list[dict[str, Any]]) -> str | None:
    """What shows in a finished run only. rows: of its log."""
    return overfitting(rows, 0 if plan.data.val is None else len(plan.data.val), plan.modality.many)


def early_cautions(plan: Plan) -> list[str]:
    """All that is known before the first step, copies among the splits included."""
    return [*plan.data.copies.sentences(plan.modality.one, plan.modality.many), *data_cautions(plan)]
