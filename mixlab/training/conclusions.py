"""What a training has shown, in sentences, for its report."""

import math
import shlex
from pathlib import Path
from typing import Any

import numpy as np

from mixlab.checkpoint.store import Weights
from mixlab.evaluation.metrics import Evaluation, wilson_interval
from mixlab.language import tell
from mixlab.report.run_log import last_accuracies
from mixlab.report.tables import describe_coverage
from mixlab.training.cautions import FEW, overfitting
from mixlab.training.keys import recipe_keys
from mixlab.training.plan import Plan
from mixlab.training.recipe import Recipe

NUM_CONFUSIONS = 3
BEST_TARGET = 0.95  # of right answers, for the one sentence on confidence
SURE_TEMPERATURE = 200  # validation examples, below which a temperature depends on the few that are wrong
NUM_ACTIONS = 3
LAST_PART = 0.2  # of the validations, whose mean is compared with the same number before
FRESH_MINUTES = 10  # of training, for a model that has learnt nothing yet
STILL_RISING = 0.005  # of accuracy, from which on that is worth more time
SMALL_SIDE = 64  # pixels, up to which the packaged weights resemble the images


def conclusions(
    plan: Plan, weights: Weights, evaluation: Evaluation | None, rows: list[dict[str, Any]]
) -> list[str]:
    """The report's first sentences. rows: of the run's log."""
    found = []
    many = plan.modality.many
    if evaluation is not None:
        low, high = evaluation.top1_interval
        found.append(
            tell(
                "{share:.1f} % of the {n:,} test {many} are right. For other {many} like these the 95 % interval is "
                "{low:.1f} to {high:.1f} %.",
                share=100 * evaluation.top1,
                n=evaluation.num_images,
                many=many,
                low=100 * low,
                high=100 * high,
            )
        )
        found += [f"{sentence}." for sentence in top_confusions(evaluation, many)]
        found.append(coverage_sentence(evaluation, many, has_validation=plan.data.val is not None))
    num_val = 0 if plan.data.val is None else len(plan.data.val)
    found.append(temperature_sentence(weights.temperature, evaluation, num_val, many))
    sentence = training_below_validation(plan, rows)
    return found + ([sentence] if sentence else [])


def top_confusions(evaluation: Evaluation, many: str) -> list[str]:
    """The most frequent mistakes: `17 of the 200 test images of "cat" were predicted as "dog"`."""
    wrong = evaluation.label != evaluation.predicted
    pairs = np.stack([evaluation.label[wrong], evaluation.predicted[wrong]], axis=1)
    if not len(pairs):
        return [tell("No test {many} were predicted wrongly", many=many)]
    kinds, counts = np.unique(pairs, axis=0, return_counts=True)
    found = []
    for place in np.argsort(-counts, kind="stable")[:NUM_CONFUSIONS]:
        true, predicted = (evaluation.class_names[i] for i in kinds[place])
        of_class = int((evaluation.label == kinds[place][0]).sum())
        values = {"of_class": of_class, "many": many, "true": true, "predicted": predicted}
        found.append(
            tell("1 of the {of_class} test {many} of “{true}” was predicted as “{predicted}”", **values)
            if counts[place] == 1
            else tell(
                "{n} of the {of_class} test {many} of “{true}” were predicted as “{predicted}”",
                n=counts[place],
                **values,
            )
        )
    return found


def best_coverage(evaluation: Evaluation) -> dict[str, Any] | None:
    """The row of `Evaluation.coverage` that says most: of BEST_TARGET, or the next that needs a threshold at all."""
    rows = evaluation.coverage
    selective = [row for row in rows if row["min_confidence"] > 0]
    stricter = [row for row in selective if row["target"] >= BEST_TARGET]
    return next(iter(stricter + selective[::-1] + rows[::-1]), None)


def coverage_sentence(evaluation: Evaluation, many: str, *, has_validation: bool) -> str:
    """How many answers need no second look, by a confidence that validation chose, and how many are right."""
    if not has_validation:
        return tell("Nothing was held out for validation, so nothing says which answers need no second look.")
    row = best_coverage(evaluation)
    if row is None:
        return tell(
            "On the validation split, at no confidence are 90 % of the surest answers right, so every answer needs a "
            "second look: there are too few {many}, or too many mistakes.",
            many=many,
        )
    chosen = tell("This confidence was chosen on the validation split; the numbers are of the test split.")
    return f"{describe_coverage(row, evaluation.num_images, many)} {chosen}"


def temperature_sentence(
    temperature: float, evaluation: Evaluation | None, num_val: int, many: str = "images"
) -> str:
    """On which split the probabilities were calibrated, how sure that is, and what it changed."""
    if not num_val:
        return tell("Probabilities are not calibrated: there is no validation split to fit a temperature on.")
    parts = [
        tell(
            "Probabilities are calibrated: a temperature of {temperature:g} was fitted on the {n:,} {many} of the "
            "validation split.",
            temperature=temperature,
            n=num_val,
            many=many,
        )
    ]
    if num_val < SURE_TEMPERATURE:
        parts.append(tell("With so few {many} that temperature is uncertain.", many=many))
    if evaluation is not None:
        parts.append(
            tell(
                "On the test split the calibration error is {after:.1f} points with it and {before:.1f} without.",
                after=100 * evaluation.ece,
                before=100 * evaluation.ece_raw,
            )
        )
    return " ".join(parts)


def training_below_validation(plan: Plan, rows: list[dict[str, Any]]) -> str | None:
    """Why training accuracy may be lower than validation accuracy, where at the end it is."""
    found = last_accuracies(rows)
    if found is None or found[0] >= found[1]:
        return None
    training, validation = found
    reasons: list[str] = []
    recipe, augment = plan.recipe, plan.augment
    changes = ("crop", "flip", "policy", "erase_prob", "mixup_alpha", "cutmix_alpha")
    if any(getattr(augment, name, None) not in (None, False, 0, "none") for name in changes):
        reasons.append(tell("training sees its {many} augmented", many=plan.modality.many))
    if recipe.ema_decay:
        reasons.append(tell("validation measures a moving average of the weights"))
    if plan.model_settings.get("stochastic_depth"):
        reasons.append(tell("training drops blocks at random"))
    reasons.append(tell("training is measured while the weights still change"))
    return tell(
        "Training accuracy in the last epoch ({training:.1f} %) is below validation accuracy ({validation:.1f} %). "
        "That is no error: {reasons}.",
        training=100 * training,
        validation=100 * validation,
        reasons="; ".join(reasons),
    )


def improvements(
    plan: Plan, evaluation: Evaluation | None, rows: list[dict[str, Any]], seconds: float
) -> list[tuple[str, str]]:
    """How to get a better model, as far as this run's own numbers speak for it: why, and a command ("" for none).

    At most NUM_ACTIONS, the most useful first. rows: of the run's log. seconds: that training took.
    """
    many, num_val = plan.modality.many, 0 if plan.data.val is None else len(plan.data.val)
    found = []
    by_heart = overfitting(rows, num_val, many) is not None
    if by_heart:
        found.append(_against_learning_by_heart(plan, many))
    guessing = None if by_heart else _no_better_than_guessing(evaluation)
    minutes = 2 * max(math.ceil(seconds / 60), 1)
    start = "train DATA" if plan.recipe.init_from is None else "finetune DATA --weights WEIGHTS"
    if guessing:
        return [(guessing, f"mixlab {start} --budget {max(minutes, FRESH_MINUTES)}m")]
    gain = gain_at_end(rows)
    if not by_heart and gain is not None and gain > max(STILL_RISING, 2 / max(num_val, 1)):
        text = tell(
            "Validation accuracy still rose in the last fifth of the training, by {gain:.1f} points: give it more "
            "time.",
            gain=100 * gain,
        )
        found.append((text, f"mixlab {start} --budget {minutes}m"))
    weak = _weakest_class(plan, evaluation)
    if weak:
        found.append((weak, "mixlab check DATA"))
    if not found:
        text = tell(
            "The numbers of this run show no weak point. More {many} or more time are what is left to try.",
            many=many,
        )
        found.append((text, ""))
    return found[:NUM_ACTIONS]


def _no_better_than_guessing(evaluation: Evaluation | None) -> str | None:
    """A sentence where always naming one class might be right as often; None else, and where there is one class."""
    if evaluation is None:
        return None
    counts = np.bincount(evaluation.label, minlength=len(evaluation.class_names))
    chance = counts.max() / evaluation.num_images
    if chance == 1 or evaluation.top1_interval[0] > chance:
        return None
    return tell(
        "The model is not clearly better than guessing: always naming “{name}” is right for {chance:.1f} %. Give it "
        "more time.",
        name=evaluation.class_names[int(counts.argmax())],
        chance=100 * chance,
    )


def _against_learning_by_heart(plan: Plan, many: str) -> tuple[str, str]:
    if plan.recipe.init_from is not None or plan.modality.name != "images":
        text = tell(
            "Training accuracy is far above validation accuracy: more {many} or stronger augmentation help most.",
            many=many,
        )
        return text, ""
    is_small = max(plan.preprocess.input_size) <= SMALL_SIDE
    weights = "mixer_pyramid_cifar:cifar10" if is_small else "mixer_b16:imagenet1k"
    text = tell(
        "Training accuracy is far above validation accuracy: start from trained weights, add {many}, or "
        "augment more.",
        many=many,
    )
    return text, f"mixlab finetune DATA --weights {weights}"


def gain_at_end(rows: list[dict[str, Any]]) -> float | None:
    """By how much mean validation accuracy of the last fifth is above that of the fifth before; None for too few."""
    top1 = [row["top1"] for row in rows if row["event"] == "validation" and row.get("top1") is not None]
    count = int(LAST_PART * len(top1))
    if not count:
        return None
    return float(np.mean(top1[-count:]) - np.mean(top1[-2 * count : -count]))


def _weakest_class(plan: Plan, evaluation: Evaluation | None) -> str | None:
    """A sentence on the class that needs examples most: one with very few, else one that is clearly found least."""
    counts = np.bincount(plan.data.train.split.labels, minlength=len(plan.class_names))
    least = int(np.argmin(counts))
    many = plan.modality.many
    if counts[least] < FEW:
        return tell(
            "The class “{name}” has only {n} training {many}: add some.",
            name=plan.class_names[least],
            n=counts[least],
            many=many,
        )
    tested = [] if evaluation is None else [row for row in evaluation.per_class() if row["num_images"]]
    if evaluation is None or not tested:
        return None
    row = min(tested, key=lambda row: row["recall"])
    if wilson_interval(row["num_correct"], row["num_images"])[1] >= evaluation.top1:
        return None  # it may be chance
    return tell(
        "The class “{name}” is found least often (recall {recall:.0f} %): add {many} of it, and look at its mistakes "
        "for wrong labels.",
        name=row["label"],
        recall=100 * row["recall"],
        many=many,
    )


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
    commands = [(tell("Use it"), f"mixlab predict {name} FILE")]
    if row is not None and row["min_confidence"] > 0:
        marked = f"mixlab predict {name} FILE --min-confidence {row['min_confidence']:g}"
        commands.append((tell("Mark what needs a second look"), marked))
    return [
        *commands,
        (tell("Measure it on other data"), f"mixlab evaluate {name} DATA"),
        (tell("Take it to another runtime"), f"mixlab export {name} --to onnx"),
        (tell("Serve it, with a page to try it"), f"mixlab serve {name}"),
    ]
