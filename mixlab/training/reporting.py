"""The report of a run: all it says, in every language, is kept as report.json, and drawn from there, also later.

What is drawn needs the run folder only: report.json, metrics.jsonl, predictions.csv and figures/samples.png.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mixlab.errors import WeightsError
from mixlab.escape import from_csv, readable
from mixlab.evaluation.metrics import calibration_bins, merged_bins
from mixlab.files import write_atomically
from mixlab.language import LANGUAGES, Language, speaking, tell
from mixlab.records import read_json, read_table, take, take_list
from mixlab.report import figures
from mixlab.report.fonts import describe_undrawable, drawable_names, undrawable
from mixlab.report.page import Mistake, Report, write_report
from mixlab.report.run_log import read_run_log
from mixlab.report.screen import Screen

RECORD_NAME, PREDICTIONS_NAME, SAMPLES_NAME = "report.json", "predictions.csv", "samples.png"
SOUND = "data:audio/wav;base64,"  # how the address of a sound begins
FEWEST_IN_BIN = 10  # examples of a bar of the calibration figure
_PAIRS = ("headline", "improvements", "next_commands", "cost")  # of texts, in each language
_TEXTS = ("conclusions", "notes")


@dataclass(frozen=True, kw_only=True)
class Spoken:
    """What a report says in one language; as the fields of `Report`."""

    headline: list[tuple[str, str]]
    conclusions: list[str]
    improvements: list[tuple[str, str]]
    next_commands: list[tuple[str, str]]
    notes: list[str]
    cost: list[tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a report says in all languages; as the fields of `Report`.

    ece: calibration error, a fraction. chosen: share of the examples, and of them that are right, at the confidence
    that validation chose; both None where nothing was tested or chosen.
    """

    title: str
    many: str
    class_names: Sequence[str]
    ece: float | None
    chosen: tuple[float, float] | None
    per_class: list[dict[str, Any]]
    split_counts: list[tuple[str, dict[str, int]]]
    changed_keys: list[tuple[str, str, str]]
    recipe_text: str
    environment: dict[str, Any]
    mistakes: list[Mistake]


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The test split's labels and predictions as numbers of classes, int64 (n,), and confidences, float64 (n,)."""

    label: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray


def keep_report(run: Path, facts: Facts, say: Callable[[], Spoken]) -> None:
    """Write report.json. say: called once in each language."""
    record: dict[str, Any] = {"facts": asdict(facts)}
    for language in LANGUAGES:
        with speaking(language):
            record[language] = asdict(say())
    content = json.dumps(record, ensure_ascii=False, allow_nan=False).encode("utf-8", errors="replace")
    write_atomically(run / RECORD_NAME, content + b"\n")


def draw_report(
    run: Path, language: Language, screen: Screen, *, with_figures: bool = True
) -> dict[str, Any]:
    """Draw figures and report.html of what the run folder holds; the `report --json` object.

    What cannot be drawn is said on the screen and left out. WeightsError if report.json is missing or damaged.
    """
    facts, spoken = _read(run, language)
    drawn: list[tuple[str, str, Path]] = []
    with speaking(language):
        shown = drawable_names(facts.class_names)
        key = [(place, name) for place, name in zip(shown, facts.class_names, strict=True) if place != name]
        notes = list(spoken.notes)
        if key:
            notes.append(describe_undrawable(key) + ".")
            with speaking("en"):  # as all on the screen
                screen.say(describe_undrawable(key))
        # Korean words in boxes are worse than English ones.
        is_drawable = language == "en" or not undrawable(tell("Accuracy"))
        if not is_drawable:
            notes.append(
                tell(
                    "The figures are in English, as no font here has Korean (Debian, Ubuntu: fonts-noto-cjk)."
                )
            )
        if with_figures:
            with screen.working("drawing figures"):
                drawn = _draw(run, facts, shown, screen, language if is_drawable else "en")
        report = Report(
            title=facts.title,
            many=facts.many,
            headline=spoken.headline,
            conclusions=spoken.conclusions,
            improvements=spoken.improvements,
            next_commands=spoken.next_commands,
            notes=notes,
            cost=spoken.cost,
            figures=drawn,
            per_class=facts.per_class,
            split_counts=facts.split_counts,
            changed_keys=facts.changed_keys,
            recipe_text=facts.recipe_text,
            environment=facts.environment,
            mistakes=facts.mistakes,
            name_key=key,
        )
        with screen.working("writing the report"):
            write_report(report, run / "report.html")
    return {"run": str(run), "report": str(run / "report.html"), "language": language}


def _read(run: Path, language: Language) -> tuple[Facts, Spoken]:
    where = str(run / RECORD_NAME)
    if not (run / RECORD_NAME).is_file():
        raise WeightsError(
            "this run has no report.json, of which its report is drawn",
            where=str(run),
            hint="it is written at the end of a training; `mixlab train --resume RUN` gets there, with the data",
        )
    record = read_json(run / RECORD_NAME)
    said, facts = take(record, language, dict, where), take(record, "facts", dict, where)
    spoken = {
        name: [_texts(pair, 2, where) for pair in take_list(said, name, list, where)] for name in _PAIRS
    }
    texts = {name: list(take_list(said, name, str, where)) for name in _TEXTS}
    chosen = facts.get("chosen")
    if chosen is not None:
        chosen = take_list(facts, "chosen", float, where, low=0.0, high=1.0)
    rows = take_list(facts, "per_class", dict, where)
    for row in rows:
        take(row, "label", str, where)
        for name in ("num_images", "num_correct"):
            take(row, name, int, where)
        for name in ("precision", "recall", "f1"):
            take(row, name, float, where, optional=True)
    mistakes = take_list(facts, "mistakes", dict, where)
    for one in mistakes:
        if not take(one, "src", str, where).startswith(("data:image/png;base64,", "data:image/jpeg;base64,")):
            raise WeightsError("a picture in it is no picture of a report", where=where)
        if not (take(one, "media", str, where, optional=True) or SOUND).startswith(SOUND):
            raise WeightsError("a sound in it is no sound of a report", where=where)
    kinds = {"src": str, "name": str, "label": str, "predicted": str, "probability": float}
    return (
        Facts(
            **{name: take(facts, name, str, where) for name in ("title", "many", "recipe_text")},
            class_names=take_list(facts, "class_names", str, where),
            ece=take(facts, "ece", float, where, optional=True),
            chosen=chosen,
            per_class=list(rows),
            split_counts=[_counts(pair, where) for pair in take_list(facts, "split_counts", list, where)],
            changed_keys=[_texts(row, 3, where) for row in take_list(facts, "changed_keys", list, where)],
            environment=take(facts, "environment", dict, where),
            mistakes=[
                Mistake(
                    media=one.get("media"),
                    **{key: take(one, key, kind, where) for key, kind in kinds.items()},
                )
                for one in mistakes
            ],
        ),
        Spoken(**spoken, **texts),
    )


def _texts(values: list[Any], count: int, where: str) -> Any:
    if len(values) != count or not all(isinstance(value, str) for value in values):
        raise WeightsError(f"a row of it is not {count} texts", where=where)
    return tuple(values)


def _counts(pair: list[Any], where: str) -> tuple[str, dict[str, int]]:
    if len(pair) != 2 or not isinstance(pair[0], str) or not isinstance(pair[1], dict):
        raise WeightsError("a row of split_counts is not a class and its counts", where=where)
    return pair[0], {name: take(pair[1], name, int, where) for name in pair[1]}


def read_answers(run: Path, class_names: Sequence[str]) -> Answers:
    """predictions.csv of a run. WeightsError if it cannot be read or is of other classes."""
    path = run / PREDICTIONS_NAME
    rows = read_table(path, ("label", "prediction", "probability"))
    numbers = {readable(name): number for number, name in enumerate(class_names)}
    try:
        label, predicted = (
            np.array([numbers[readable(from_csv(row[name]))] for row in rows], dtype=np.int64)
            for name in ("label", "prediction")
        )
        confidence = np.array([float(row["probability"]) for row in rows])
    except (KeyError, ValueError) as error:
        raise WeightsError(f"it holds what is no class or probability: {error}", where=str(path)) from None
    if not ((confidence >= 0) & (confidence <= 1)).all():
        raise WeightsError("it holds a probability that is none", where=str(path))
    return Answers(label=label, predicted=predicted, confidence=confidence)


def _draw(
    run: Path, facts: Facts, names: list[str], screen: Screen, language: Language
) -> list[tuple[str, str, Path]]:
    """Draw and save every figure; heading, explanation and file of each. names: of the classes, as they are drawn.

    language: of the text in the figures.
    """
    folder, many, drawn = run / "figures", facts.many, []

    def add(name: str, heading: str, text: str, make: Callable[[], Any]) -> None:
        with speaking(language):
            figures.save_figure(make(), folder / f"{name}.png")
        drawn.append((heading, text, folder / f"{name}.png"))

    rows = read_run_log(run / "metrics.jsonl")
    text = tell(
        "Loss, accuracy, learning rate and speed over the epochs. The training loss is of {many} as training changes "
        "them, the validation loss of {many} as they are.",
        many=many,
    )
    add("curves", tell("Learning curves"), text, lambda: figures.learning_curves(rows, many))
    if facts.ece is not None and not (run / PREDICTIONS_NAME).is_file():
        screen.say(
            f"{PREDICTIONS_NAME} is missing: confusion matrix, calibration and confidence cannot be drawn again"
        )
    elif facts.ece is not None:
        _draw_answers(read_answers(run, facts.class_names), facts, names, add)
    samples = folder / SAMPLES_NAME
    if samples.is_file() and not samples.is_symlink():
        text = tell("The first {many} of training after augmentation, as the model saw them.", many=many)
        drawn.append((tell("Training {many} as the model saw them", many=many), text, samples))
    return drawn


def _draw_answers(answers: Answers, facts: Facts, names: list[str], add: Callable[..., None]) -> None:
    """The figures of what the test split gave. add: as in `_draw`."""
    many, ece, count = facts.many, facts.ece or 0.0, len(names)
    correct = answers.predicted == answers.label
    cells = np.bincount(answers.label * count + answers.predicted, minlength=count**2).reshape(count, count)
    text = tell("Rows are the true classes, columns the predicted ones; colour is the share of the row.")
    add("confusion", tell("Confusion matrix"), text, lambda: figures.confusion_matrix(cells, names))
    bins, num_merged = merged_bins(calibration_bins(answers.confidence, correct), FEWEST_IN_BIN)
    text = tell(
        "How often the model is right when it claims a given probability; on the diagonal the claim is true."
    )
    if num_merged:
        text += " " + tell(
            "{n} bins of fewer than {few} {many} are drawn with their neighbours.",
            n=num_merged,
            few=FEWEST_IN_BIN,
            many=many,
        )
    add("reliability", tell("Calibration"), text, lambda: figures.reliability_diagram(bins, ece, many))
    text = tell(
        "How many are right, if only the {many} of which the model is surest are left unchecked.", many=many
    )
    add(
        "coverage",
        tell("Confidence"),
        text,
        lambda: figures.coverage_curve(answers.confidence, correct, facts.chosen),
    )
