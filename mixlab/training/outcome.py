"""After the last step: the test split, read once, then figures and report.html."""

import csv
import io
import resource
import shlex
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mixlab.checkpoint.store import Weights, load_weights
from mixlab.cpu.cost import Cost, measure_cost
from mixlab.data.listing import describe_skipped
from mixlab.data.modality import BadFile
from mixlab.data.reading import Examples, load_examples
from mixlab.escape import for_csv, without_places
from mixlab.evaluation.metrics import Evaluation, Predictions, merged_bins, summarize
from mixlab.files import write_atomically
from mixlab.models.catalog import display_name
from mixlab.records import read_json
from mixlab.report import figures
from mixlab.report.fonts import describe_undrawable, drawable_names
from mixlab.report.page import Report, write_report
from mixlab.report.run_log import RunLog, read_run_log
from mixlab.report.screen import Screen, format_seconds
from mixlab.training.cautions import early_cautions, run_caution
from mixlab.training.conclusions import (
    best_coverage,
    changed_keys,
    conclusions,
    next_commands,
    split_counts,
)
from mixlab.training.course import TrainingCourse
from mixlab.training.distributed import classify_shared
from mixlab.training.exchanges import Exchange
from mixlab.training.gallery import training_sample, worst_mistakes
from mixlab.training.keys import to_toml
from mixlab.training.plan import Plan
from mixlab.training.run_folder import add_bad_files, read_bad_files
from mixlab.training.session import Session
from mixlab.training.setup import fits_in_memory
from mixlab.training.small_sets import describe_absent, why_not_tested
from mixlab.training.tried import describe_tried, read_tried
from mixlab.words import counted

FEWEST_IN_BIN = 10  # examples of a bar of the calibration figure


@dataclass(frozen=True, kw_only=True)
class Tested:
    """What came of the test split. examples: those that could be read; the rest is None where nothing was tested."""

    examples: Examples | None = None
    predictions: Predictions | None = None
    evaluation: Evaluation | None = None


def finish(run: Path, plan: Plan, course: TrainingCourse, session: Session) -> dict[str, Any]:
    """Evaluate the kept weights, write predictions.csv, figures and report.html; the `train --json` object.

    All ranks evaluate, rank 0 writes.
    """
    weights = load_weights(run)
    with session.screen.working("evaluating"):
        tested = _test(run, plan, weights, course.state.exchange, session)
    if not session.world.is_main:
        return {"run": str(run)}
    # Whole again, where each process had a part of it.
    model = load_weights(run).model if course.state.exchange.needs_all_ranks else weights.model.cpu()
    cost = measure_cost(model, plan.preprocess.input_size, in_channels=plan.preprocess.channels)
    untested = why_not_tested(plan.data.source, plan.data.splits) or (
        f"no test {plan.modality.one} could be read"
    )
    rows = read_run_log(run / "metrics.jsonl")
    learnt = run_caution(plan, rows)
    warnings = early_cautions(plan) + ([] if learnt is None else [learnt])
    result = _result(run, plan, course, cost, tested, untested, rows) | {"warnings": warnings}
    logged = {key: value for key, value in result.items() if key != "steps"}
    RunLog(run / "metrics.jsonl").write("end", step=result["steps"], **logged)
    costs = _costs(plan, course, cost, result["images_per_second"], session)
    notes = [*course.notes, *(f"{text[0].upper()}{text[1:]}." for text in warnings)]
    notes += _notes(plan, run, tested.evaluation, untested)
    shown = drawable_names(plan.class_names)
    key = [(place, name) for place, name in zip(shown, plan.class_names, strict=True) if place != name]
    if key:
        notes.append(describe_undrawable(key) + ".")
        session.screen.say(describe_undrawable(key))
    recipe = replace(plan.recipe, steps=course.clock.step)  # where the plan was another
    drawn, mistakes = [], []
    if session.figures:
        with session.screen.working("drawing figures"):
            drawn = _draw(plan, run, tested, session.with_pictures, shown, rows)
        if session.with_pictures and tested.examples is not None and tested.predictions is not None:
            mistakes = worst_mistakes(plan, tested.examples, tested.predictions)
    report = Report(
        title=run.name,
        conclusions=conclusions(plan, weights, tested.evaluation, rows),
        next_commands=next_commands(run, tested.evaluation),
        split_counts=split_counts(plan),
        mistakes=mistakes,
        changed_keys=without_places(changed_keys(recipe)),
        headline=_headline(plan, weights, tested.evaluation, cost.num_parameters, course.seconds),
        notes=[without_places(note) for note in notes],
        figures=drawn,
        per_class=[] if tested.evaluation is None else tested.evaluation.per_class(),
        recipe_text=to_toml(recipe, without=without_places),
        environment=without_places(read_json(run / "environment.json")),
        cost=costs,
        name_key=key,
    )
    with session.screen.working("writing the report"):
        write_report(report, run / "report.html")
    _say(result, plan, tested.evaluation, learnt, session.screen)
    return result


def _test(run: Path, plan: Plan, weights: Weights, exchange: Exchange, session: Session) -> Tested:
    """The kept weights on the test split, by all ranks; what could not be read is listed."""
    world, device, recipe = session.world, session.device, plan.recipe
    world.now("evaluating on the test split")
    if "test" not in plan.data.splits:
        return Tested()
    model = exchange.place(weights.model, device)
    test = plan.data.splits["test"]
    in_memory = fits_in_memory(world.local_size * len(test), plan.preprocess)
    examples = plan.data.test or load_examples(test, plan.preprocess, in_memory=in_memory)
    bad: list[BadFile] = []
    predictions, evaluation = None, None
    if len(examples):
        predictions = classify_shared(
            world,
            model,
            examples,
            recipe.batch_size,
            device,
            on_bad=bad.append,
            equally_often=exchange.needs_all_ranks,
            temperature=weights.temperature,
        )
        known = None if plan.data.copies.num_unknown else plan.data.copies.num_in_train["test"]
        evaluation = summarize(predictions, weights.class_names, weights.thresholds)
        evaluation = replace(evaluation, num_trained_on=known)
    bad = examples.bad + [file for files in world.gather(bad) for file in files]
    if world.is_main:
        add_bad_files(run, bad)
        if predictions is not None:
            write_predictions(run / "predictions.csv", examples, predictions, weights.class_names)
    return Tested(examples=examples, predictions=predictions, evaluation=evaluation)


def _result(
    run: Path,
    plan: Plan,
    course: TrainingCourse,
    cost: Cost,
    tested: Tested,
    untested: str,
    rows: list[dict[str, Any]],
) -> dict[str, Any]:
    """The object that `train --json` prints. rows: of the run's log."""
    batch_size, steps, evaluation = plan.recipe.batch_size, course.clock.step, tested.evaluation
    result = {
        "run": str(run),
        "num_parameters": cost.num_parameters,
        "epochs": steps * batch_size / max(len(plan.data.train), batch_size),
        "steps": steps,
        "seconds": course.seconds,
        "images_per_second": _mean_speed(rows),
        "num_bad_files": len(read_bad_files(run)),
        "skipped": [one.to_json() for one in plan.data.source.skipped],
        "copies": plan.data.copies.to_json(),
        "grey_max": plan.recipe.data.grey_max,
        "test": None if evaluation is None else evaluation.to_json(),
        "test_reason": untested if evaluation is None else None,
        "report": str(run / "report.html"),
    }
    tried = read_tried(run)
    return result if tried is None else result | {"grid": tried}


def _costs(
    plan: Plan, course: TrainingCourse, cost: Cost, per_second: float | None, session: Session
) -> list[tuple[str, str]]:
    """What the run took, and what one image takes."""
    recipe, clock = plan.recipe, course.clock
    usages = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    core_seconds = sum(usage.ru_utime + usage.ru_stime for usage in usages)
    num_seen = clock.step * min(recipe.batch_size, len(plan.data.train))
    return [
        ("Time in training and validation", format_seconds(course.seconds)),
        ("Whole command so far", format_seconds(time.monotonic() - session.started)),
        ("Core-seconds of this part of the run", f"{core_seconds:,.0f}"),
        ("Training compute (3 x forward)", f"{3 * cost.flops * num_seen:.3g} FLOP"),
        (f"One {plan.modality.one}, forward", f"{cost.macs / 1e6:,.1f} million multiply-accumulates"),
        (
            "Mean training speed",
            f"{per_second:,.0f} {plan.modality.many}/s" if per_second else "not measured",
        ),
    ]


def _say(
    result: dict[str, Any], plan: Plan, evaluation: Evaluation | None, learnt: str | None, screen: Screen
) -> None:
    """learnt: the warning that only the end of a run can give."""
    if evaluation is not None:
        low, high = evaluation.top1_interval
        tested = counted(evaluation.num_images, plan.modality.one, plan.modality.many)
        line = (
            f"test accuracy {100 * evaluation.top1:.2f} % ({evaluation.num_correct:,} of {tested}, "
            f"95 % interval {100 * low:.1f} to {100 * high:.1f} %)"
        )
        if evaluation.balanced_accuracy is not None:
            line += f", balanced {100 * evaluation.balanced_accuracy:.2f} %"
        screen.say(line)
        absent = describe_absent(plan.data.source, plan.data.splits)
        if "test" in absent:
            screen.say(absent["test"])
    else:
        screen.say(f"nothing was tested: {result['test_reason']}")
    if result["num_bad_files"]:
        were = "was" if result["num_bad_files"] == 1 else "were"
        number = counted(result["num_bad_files"], plan.modality.one, plan.modality.many)
        screen.say(f"{number} could not be read and {were} left out: {result['run']}/bad_files.csv")
    if learnt is not None:
        screen.say(f"warning: {learnt}")
    screen.say(f"report: {result['report']}")
    run = shlex.quote(result["run"])
    screen.say(f"next: mixlab predict {run} FILE")
    screen.say(f"      mixlab serve {run}")


def write_predictions(
    path: Path, examples: Examples, predictions: Predictions, class_names: tuple[str, ...]
) -> None:
    """path, label, prediction, probability for every example of the test split."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "label", "prediction", "probability"])
    for i, label, predicted, confidence in zip(
        predictions.index, predictions.label, predictions.predicted, predictions.confidence, strict=True
    ):
        writer.writerow(
            [for_csv(text) for text in (examples.split.names[i], class_names[label], class_names[predicted])]
            + [f"{confidence:.6f}"]
        )
    write_atomically(path, text.getvalue().encode("utf-8", errors="surrogateescape"))


def _mean_speed(rows: list[dict[str, Any]]) -> float | None:
    """Images a second over the run: the median of the rows of its log."""
    speeds = [
        row["images_per_second"]
        for row in rows
        if row["event"] == "train" and row.get("images_per_second") is not None
    ]
    return float(np.median(speeds)) if speeds else None


def _notes(plan: Plan, run: Path, evaluation: Evaluation | None, untested: str) -> list[str]:
    notes, data, many = [], plan.data, plan.modality.many
    bad = read_bad_files(run)
    if bad:
        notes.append(
            f"{len(bad)} {many} could not be read and were left out; bad_files.csv lists them with the reasons."
        )
    if data.copies.num_within:
        notes.append(f"{data.copies.num_within:,} {many} are exact copies of others in the same split.")
    if data.source.skipped:
        notes.append(describe_skipped(data.source.skipped).capitalize() + ".")
    if plan.recipe.data.grey_max is not None:
        notes.append(f"16-bit grey: the value {plan.recipe.data.grey_max:,} is white.")
    tried = read_tried(run)
    if tried is not None:
        notes.append(describe_tried(tried))
    if data.val is None:
        notes.append("Nothing was held out for validation: the weights are those after the last step.")
    if evaluation is None:
        notes.append(
            f"Nothing was tested, so nothing here says how good the model is on new {many}: {untested}."
        )
    elif evaluation.balanced_accuracy is not None:
        notes.append(
            "The classes differ in size by more than 1.5 times, so read the balanced accuracy first."
        )
    notes += [f"{sentence}." for sentence in describe_absent(plan.data.source, plan.data.splits).values()]
    if data.source.splits.keys() == {"all"}:
        notes.append("The data had no splits; they were drawn by class, and split.csv lists them.")
    return notes


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
        counts = f"{evaluation.num_correct:,} of {evaluation.num_images:,}"
        cards.append(("Test accuracy", f"{100 * evaluation.top1:.2f} % ({counts})"))
        low, high = evaluation.top1_interval
        cards.append(("95 % interval", f"{100 * low:.1f} to {100 * high:.1f} %"))
        if evaluation.balanced_accuracy is not None:
            cards.append(("Balanced accuracy", f"{100 * evaluation.balanced_accuracy:.2f} %"))
    if "validation_top1" in provenance:
        cards.append(
            ("Validation accuracy of the kept weights", f"{100 * provenance['validation_top1']:.2f} %")
        )
    if evaluation is not None:
        cards.append(("Calibration error (ECE)", f"{100 * evaluation.ece:.1f} points"))
    name = display_name(weights.model_settings["name"])
    cards.append(("Model", f"{name}, {num_parameters:,} parameters"))
    size = " x ".join(str(side) for side in plan.preprocess.input_size)
    num_train, num_classes = len(plan.data.train), len(plan.class_names)
    counts = f"{num_train:,} training {plan.modality.many}, {num_classes} classes"
    cards.append(("Data", f"{plan.data.source.name}: {counts}, input {size}"))
    cards += plan.objective.cards
    cards.append(("Training time", format_seconds(seconds)))
    return cards


def _draw(
    plan: Plan,
    run: Path,
    tested: Tested,
    with_pictures: bool,
    names: list[str],
    rows: list[dict[str, Any]],
) -> list[tuple[str, str, Path]]:
    """Draw and save every figure; heading, explanation and file of each.

    names: of the classes, as they are drawn. rows: of the run's log.
    """
    evaluation = tested.evaluation
    folder, many = run / "figures", plan.modality.many
    drawn: list[tuple[str, str, Path]] = []

    def add(name: str, heading: str, text: str, figure: Any) -> None:
        figures.save_figure(figure, folder / f"{name}.png")
        drawn.append((heading, text, folder / f"{name}.png"))

    text = "Loss, accuracy, learning rate and speed over the epochs."
    add("curves", "Learning curves", text, figures.learning_curves(rows))
    if evaluation is not None:
        text = "Rows are the true classes, columns the predicted ones; colour is the share of the row."
        add("confusion", "Confusion matrix", text, figures.confusion_matrix(evaluation.confusion, names))
        bins, num_merged = merged_bins(evaluation.bins, FEWEST_IN_BIN)
        text = "How often the model is right when it claims a given probability; on the diagonal the claim is true."
        if num_merged:
            text += (
                f" {num_merged} bins of fewer than {FEWEST_IN_BIN} {many} are drawn with their neighbours."
            )
        add("reliability", "Calibration", text, figures.reliability_diagram(bins, evaluation.ece))
        chosen = best_coverage(evaluation)
        text = f"How many are right, if only the {many} of which the model is surest are left unchecked."
        at = None if chosen is None or not chosen["num_sure"] else (chosen["coverage"], chosen["accuracy"])
        correct = evaluation.predicted == evaluation.label
        add("coverage", "Confidence", text, figures.coverage_curve(evaluation.confidence, correct, at))
    if with_pictures:
        grid, captions = training_sample(plan, names)
        text = f"The first {many} of training after augmentation, as the model saw them."
        add("samples", f"Training {many} as the model saw them", text, figures.picture_grid(grid, captions))
    return drawn
