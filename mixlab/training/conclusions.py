"""What a training has shown, in sentences, for its report."""

import shlex
from pathlib import Path
from typing import Any

import numpy as np

from mixlab.checkpoint.store import Weights
from mixlab.evaluation.metrics import Evaluation
from mixlab.report.run_log import last_accuracies
from mixlab.report.tables import describe_coverage
from mixlab.training.keys import recipe_keys
from mixlab.training.plan import Plan
from mixlab.training.recipe import Recipe

NUM_CONFUSIONS = 3
BEST_TARGET = 0.95  # of right answers, for the one sentence on confidence


def conclusions(
    plan: Plan, weights: Weights, evaluation: Evaluation | None, rows: list[dict[str, Any]]
) -> list[str]:
    """The report's first sentences. rows: of the run's log."""
    found = []
    many = plan.modality.many
    if evaluation is not None:
        low, high = evaluation.top1_interval
        found.append(
            f"{100 * evaluation.top1:.1f} % of the {evaluation.num_images:,} test {many} are right. For other {many} "
            f"like these the 95 % interval is {100 * low:.1f} to {100 * high:.1f} %."
        )
        found += [f"{sentence}." for sentence in top_confusions(evaluation, many)]
        found.append(coverage_sentence(evaluation, many, has_validation=plan.data.val is not None))
    found.append(temperature_sentence(weights, evaluation, has_validation=plan.data.val is not None))
    sentence = training_below_validation(plan, rows)
    return found + ([sentence] if sentence else [])


def top_confusions(evaluation: Evaluation, many: str) -> list[str]:
    """The most frequent mistakes: `17 of the 200 test images of "cat" were predicted as "dog"`."""
    wrong = evaluation.label != evaluation.predicted
    pairs = np.stack([evaluation.label[wrong], evaluation.predicted[wrong]], axis=1)
    if not len(pairs):
        return [f"No test {many} were predicted wrongly"]
    kinds, counts = np.unique(pairs, axis=0, return_counts=True)
    found = []
    for place in np.argsort(-counts, kind="stable")[:NUM_CONFUSIONS]:
        true, predicted = (f"“{evaluation.class_names[i]}”" for i in kinds[place])
        of_class = int((evaluation.label == kinds[place][0]).sum())
        were = "was" if counts[place] == 1 else "were"
        found.append(
            f"{counts[place]} of the {of_class} test {many} of {true} {were} predicted as {predicted}"
        )
    return found


def best_coverage(evaluation: Evaluation) -> dict[str, Any] | None:
    """The row of `Evaluation.coverage` that says most: of BEST_TARGET, or the next that needs a threshold at all."""
    rows = evaluation.coverage
    selective = [row for row in rows if row["min_confidence"] > 0]
    stricter = [row for row in selective if row["target"] >= BEST_TARGET]
    return next(iter(stricter + selective[::-1] + rows[::-1]), None)


def coverage_sentence(evaluation: Evaluation, many: str, *, has_validation: bool) -> str:
    """What share of answers can be left unchecked, as validation promised and the test split shows."""
    if not has_validation:
        return "Nothing was held out for validation, so no confidence was chosen that is sure enough."
    row = best_coverage(evaluation)
    if row is None:
        return (
            "The validation split shows of no confidence that 90 % are right above it: too few "
            f"{many} or too many mistakes."
        )
    sentence = describe_coverage(row, many)
    found = f"there it holds for {100 * row['coverage']:.0f} %"
    if row["num_sure"]:
        found += f", of which {100 * row['accuracy']:.1f} % are right"
    chosen = "was chosen on validation and checked on the test split"
    return f"{sentence[0].upper()}{sentence[1:]}. This {chosen}: {found}."


def temperature_sentence(weights: Weights, evaluation: Evaluation | None, *, has_validation: bool) -> str:
    """How the probabilities were calibrated, and what that changed."""
    if not has_validation:
        return "Probabilities are not calibrated: there is no validation split to fit a temperature on."
    sentence = (
        f"Probabilities are calibrated: a temperature of {weights.temperature:g} was fitted on validation."
    )
    if evaluation is not None:
        sentence += (
            f" On the test split the calibration error is {100 * evaluation.ece:.1f} points with it and "
            f"{100 * evaluation.ece_raw:.1f} without."
        )
    return sentence


def training_below_validation(plan: Plan, rows: list[dict[str, Any]]) -> str | None:
    """Why training accuracy may be lower than validation accuracy, where at the end it is."""
    found = last_accuracies(rows)
    if found is None or found[0] >= found[1]:
        return None
    training, validation = found
    reasons = []
    recipe, augment = plan.recipe, plan.augment
    changes = ("crop", "flip", "policy", "erase_prob", "mixup_alpha", "cutmix_alpha")
    if any(getattr(augment, name, None) not in (None, False, 0, "none") for name in changes):
        reasons.append(f"training sees its {plan.modality.many} augmented")
    if recipe.ema_decay:
        reasons.append("validation measures a moving average of the weights")
    if plan.model_settings.get("stochastic_depth"):
        reasons.append("training drops blocks at random")
    reasons.append("training is measured while the weights still change")
    return (
        f"Training accuracy in the last epoch ({100 * training:.1f} %) is below validation accuracy "
        f"({100 * validation:.1f} %). That is no error: {_listed(reasons)}."
    )


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + ", and " + parts[-1]


def split_counts(plan: Plan) -> list[tuple[str, dict[str, int]]]:
    """By class how many examples each split has that could be read."""
    data = plan.data
    parts = {
        "train": data.train.split,
        "validation": None if data.val is None else data.val.split,
        "test": data.splits.get("test") if data.test is None else data.test.split,
    }
    counts = {
        name: np.bincount(split.labels, minlength=len(plan.class_names))
        for name, split in parts.items()
        if split is not None
    }
    return [
        (label, {name: int(column[number]) for name, column in counts.items()})
        for number, label in enumerate(plan.class_names)
    ]


def changed_keys(recipe: Recipe) -> list[tuple[str, str, str]]:
    """Key, value and default of every key that differs from its default."""
    found = []
    for name, key in recipe_keys().items():
        value = key.value_in(recipe)
        if value != key.default:
            found.append((name, key.text_of(value), key.default_text))
    return found


def next_commands(run: Path, evaluation: Evaluation | None) -> list[tuple[str, str]]:
    """What to do with the run, and the commands that do it."""
    name = shlex.quote(run.name)
    row = None if evaluation is None else best_coverage(evaluation)
    commands = [("Use it", f"mixlab predict {name} FILE")]
    if row is not None and row["min_confidence"] > 0:
        marked = f"mixlab predict {name} FILE --min-confidence {row['min_confidence']:g}"
        commands.append(("Mark what needs a second look", marked))
    return [
        *commands,
        ("Measure it on other data", f"mixlab evaluate {name} DATA"),
        ("Take it to another runtime", f"mixlab export {name} --to onnx"),
        ("Serve it, with a page to try it", f"mixlab serve {name}"),
    ]
