"""After the last step: the test split, read once, then figures and report.html."""

import csv
import io
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

from mixlab.checkpoint.store import Weights, load_weights
from mixlab.cpu.cost import Cost, measure_cost
from mixlab.data.modality import BadFile
from mixlab.data.reading import Examples, load_examples
from mixlab.escape import for_csv
from mixlab.evaluation.metrics import Evaluation, Predictions, summarize
from mixlab.files import write_atomically
from mixlab.report.run_log import RunLog, read_run_log
from mixlab.report.screen import Screen
from mixlab.training.cautions import early_cautions, run_caution
from mixlab.training.course import TrainingCourse
from mixlab.training.distributed import classify_shared
from mixlab.training.exchanges import Exchange
from mixlab.training.plan import Plan
from mixlab.training.reporting import draw_report, keep_report
from mixlab.training.run_folder import add_bad_files, read_bad_files
from mixlab.training.saying import Tested, gather_facts, mean_speed, put_into_words, why_untested
from mixlab.training.session import Session
from mixlab.training.setup import fits_in_memory
from mixlab.training.small_sets import describe_absent
from mixlab.training.tried import read_tried
from mixlab.words import counted


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
    untested = why_untested(plan)
    rows = read_run_log(run / "metrics.jsonl")
    learnt = run_caution(plan, rows)
    warnings = early_cautions(plan) + ([] if learnt is None else [learnt])
    result = _result(run, plan, course, cost, tested, untested, rows) | {"warnings": warnings}
    logged = {key: value for key, value in result.items() if key != "steps"}
    RunLog(run / "metrics.jsonl").write("end", step=result["steps"], **logged)
    recipe = replace(plan.recipe, steps=course.clock.step)  # where the plan was another
    with session.screen.working("gathering the report"):
        facts = gather_facts(run, plan, tested, recipe, session)
        keep_report(run, facts, lambda: put_into_words(run, plan, weights, tested, course, cost, session))
    draw_report(run, session.language, session.screen, with_figures=session.figures)
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
        evaluation = replace(evaluation, num_trained_on=known, modality=plan.modality.name)
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
        "images_per_second": mean_speed(rows),
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
