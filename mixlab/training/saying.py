"""What the report of a run says: gathered at the end of a training, and put into words in each language."""

import resource
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mixlab.checkpoint.store import Weights
from mixlab.cpu.cost import Cost
from mixlab.data.listing import describe_skipped
from mixlab.data.reading import Examples
from mixlab.escape import without_places
from mixlab.evaluation.metrics import Evaluation, Predictions
from mixlab.language import tell
from mixlab.models.catalog import display_name
from mixlab.records import read_json
from mixlab.report import figures
from mixlab.report.fonts import drawable_names
from mixlab.report.run_log import read_run_log
from mixlab.report.screen import format_seconds
from mixlab.training.cautions import early_cautions, run_caution
from mixlab.training.conclusions import (
    best_coverage,
    changed_keys,
    conclusions,
    improvements,
    next_commands,
    split_counts,
)
from mixlab.training.course import TrainingCourse
from mixlab.training.gallery import training_sample, worst_mistakes
from mixlab.training.keys import to_toml
from mixlab.training.plan import Plan
from mixlab.training.recipe import Recipe
from mixlab.training.reporting import SAMPLES_NAME, Facts, Spoken
from mixlab.training.run_folder import read_bad_files
from mixlab.training.session import Session
from mixlab.training.small_sets import describe_absent, why_not_tested
from mixlab.training.tried import describe_tried, read_tried


@dataclass(frozen=True, kw_only=True)
class Tested:
    """What came of the test split. examples: those that could be read; the rest is None where nothing was tested."""

    examples: Examples | None = None
    predictions: Predictions | None = None
    evaluation: Evaluation | None = None


def gather_facts(run: Path, plan: Plan, tested: Tested, recipe: Recipe, session: Session) -> Facts:
    """What the report says in every language; draws what needs the examples. recipe: as it was trained."""
    evaluation, mistakes = tested.evaluation, []
    samples = run / "figures" / SAMPLES_NAME
    samples.unlink(missing_ok=True)  # of an earlier end of this run
    if session.figures and session.with_pictures:
        names = drawable_names(plan.class_names)
        figures.save_figure(figures.picture_grid(*training_sample(plan, names)), samples)
        if tested.examples is not None and tested.predictions is not None:
            mistakes = worst_mistakes(plan, tested.examples, tested.predictions)
    at = None if evaluation is None else best_coverage(evaluation)
    environment = without_places(read_json(run / "environment.json"))
    command = environment.get("command")
    if isinstance(command, list):
        environment["command"] = shlex.join(map(str, command))
    return Facts(
        title=run.name,
        many=plan.modality.many,
        class_names=plan.class_names,
        ece=None if evaluation is None else evaluation.ece,
        chosen=None if at is None or not at["num_sure"] else (at["coverage"], at["accuracy"]),
        per_class=[] if evaluation is None else evaluation.per_class(),
        split_counts=split_counts(plan),
        changed_keys=without_places(changed_keys(recipe)),
        recipe_text=to_toml(recipe, without=without_places),
        environment=environment,
        mistakes=mistakes,
    )


def put_into_words(
    run: Path,
    plan: Plan,
    weights: Weights,
    tested: Tested,
    course: TrainingCourse,
    cost: Cost,
    session: Session,
) -> Spoken:
    """What the report says in the language of now."""
    evaluation, rows = tested.evaluation, read_run_log(run / "metrics.jsonl")
    learnt = run_caution(plan, rows)
    warnings = early_cautions(plan) + ([] if learnt is None else [learnt])
    notes = [str(note) for note in course.notes]
    notes += [f"{text[0].upper()}{text[1:]}." for text in warnings] + _notes(plan, run, evaluation)
    return Spoken(
        headline=_headline(plan, weights, evaluation, cost.num_parameters, course.seconds),
        conclusions=conclusions(plan, weights, evaluation, rows),
        improvements=improvements(plan, evaluation, rows, course.seconds),
        next_commands=next_commands(run, evaluation),
        notes=[without_places(note) for note in notes],
        cost=_costs(plan, course, cost, mean_speed(rows), session),
    )


def _headline(
    plan: Plan,
    weights: Weights,
    evaluation: Evaluation | None,
    num_parameters: int,
    seconds: float,
) -> list[tuple[str, str]]:
    provenance = weights.provenance
    cards = []
    if evaluation is not None:
        accuracy = tell(
            "{share:.2f} % ({right:,} of {n:,})",
            share=100 * evaluation.top1,
            right=evaluation.num_correct,
            n=evaluation.num_images,
            many=plan.modality.many,
        )
        low, high = evaluation.top1_interval
        cards.append((tell("Test accuracy"), accuracy))
        cards.append(
            (tell("95 % interval"), tell("{low:.1f} to {high:.1f} %", low=100 * low, high=100 * high))
        )
        if evaluation.balanced_accuracy is not None:
            cards.append((tell("Balanced accuracy"), _percent(evaluation.balanced_accuracy)))
    if "validation_top1" in provenance:
        cards.append(
            (tell("Validation accuracy of the kept weights"), _percent(provenance["validation_top1"]))
        )
    if evaluation is not None:
        error = tell("{points:.1f} points", points=100 * evaluation.ece)
        cards.append((tell("Calibration error (ECE)"), error))
    name = display_name(weights.model_settings["name"])
    cards.append((tell("Model"), tell("{name}, {n:,} parameters", name=name, n=num_parameters)))
    size = " x ".join(str(side) for side in plan.preprocess.input_size)
    num_train, num_classes = len(plan.data.train), len(plan.class_names)
    data = tell(
        "{name}: {n:,} training {many}, {classes:,} classes, input {size}",
        name=plan.data.source.name,
        n=num_train,
        many=plan.modality.many,
        classes=num_classes,
        size=size,
    )
    cards.append((tell("Data"), data))
    cards += plan.objective.cards
    cards.append((tell("Training time"), format_seconds(seconds)))
    return cards


def _notes(plan: Plan, run: Path, evaluation: Evaluation | None) -> list[str]:
    notes: list[str] = []
    data, many = plan.data, plan.modality.many
    bad = read_bad_files(run)
    if bad:
        notes.append(
            tell(
                "{n:,} {many} could not be read and were left out; bad_files.csv says why.",
                n=len(bad),
                many=many,
            )
            if len(bad) > 1
            else tell(
                "1 {one} could not be read and was left out; bad_files.csv says why.", one=plan.modality.one
            )
        )
    if data.copies.num_within:
        notes.append(
            tell(
                "{n:,} {many} are exact copies of others in the same split.",
                n=data.copies.num_within,
                many=many,
            )
        )
    if data.source.skipped:
        notes.append(describe_skipped(data.source.skipped).capitalize() + ".")
    if plan.recipe.data.grey_max is not None:
        notes.append(tell("16-bit grey: the value {n:,} is white.", n=plan.recipe.data.grey_max))
    tried = read_tried(run)
    if tried is not None:
        notes.append(describe_tried(tried))
    if data.val is None:
        notes.append(tell("Nothing was held out for validation: the weights are those after the last step."))
    if evaluation is None:
        notes.append(
            tell(
                "Nothing was tested, so nothing here says how good the model is on new {many}: {reason}.",
                many=many,
                reason=why_untested(plan),
            )
        )
    elif evaluation.balanced_accuracy is not None:
        notes.append(
            tell("The classes differ in size by more than 1.5 times, so read the balanced accuracy first.")
        )
    notes += [f"{sentence}." for sentence in describe_absent(plan.data.source, plan.data.splits).values()]
    if data.source.splits.keys() == {"all"}:
        notes.append(tell("The data had no splits; they were drawn by class, and split.csv lists them."))
    return notes


def why_untested(plan: Plan) -> str:
    return why_not_tested(plan.data.source, plan.data.splits) or tell(
        "no test {one} could be read", one=plan.modality.one
    )


def _costs(
    plan: Plan, course: TrainingCourse, cost: Cost, per_second: float | None, session: Session
) -> list[tuple[str, str]]:
    """What the run took, and what one image takes."""
    recipe, clock = plan.recipe, course.clock
    usages = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    core_seconds = sum(usage.ru_utime + usage.ru_stime for usage in usages)
    num_seen = clock.step * min(recipe.batch_size, len(plan.data.train))
    return [
        (tell("Time in training and validation"), format_seconds(course.seconds)),
        (tell("Whole command so far"), format_seconds(time.monotonic() - session.started)),
        (tell("Core-seconds of this part of the run"), f"{core_seconds:,.0f}"),
        (tell("Training compute (3 x forward)"), f"{3 * cost.flops * num_seen:.3g} FLOP"),
        (tell("One {one}, forward", one=plan.modality.one), _macs(cost.macs)),
        (
            tell("Mean training speed"),
            tell("{n:,.0f} {many}/s", n=per_second, many=plan.modality.many)
            if per_second
            else tell("not measured"),
        ),
    ]


def _macs(macs: float) -> str:
    """Multiply-accumulates, rounded: English counts them in millions, Korean in units of 10,000."""
    return tell(
        "{millions:,.1f} million multiply-accumulates", millions=macs / 1e6, ten_thousands=round(macs / 1e4)
    )


def _percent(fraction: float) -> str:
    return tell("{share:.2f} %", share=100 * fraction)


def mean_speed(rows: list[dict[str, Any]]) -> float | None:
    """Images a second over the run: the median of the rows of its log."""
    speeds = [
        row["images_per_second"]
        for row in rows
        if row["event"] == "train" and row.get("images_per_second") is not None
    ]
    return float(np.median(speeds)) if speeds else None
