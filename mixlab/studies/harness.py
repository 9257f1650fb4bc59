"""What every study has: a question, options, a folder that is filled once, findings, and a page."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from matplotlib.figure import Figure

from mixlab.report.figures import save_figure
from mixlab.report.page import StudyPage, write_study_page
from mixlab.report.screen import Screen
from mixlab.training.signals import stopped_at_once


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a person asks of a study.

    subject: its data set, or weights. preset: `cpu`, or `paper` for the paper's own setting. smoke: every cell tiny.
    seeds: instead of the preset's number. minutes: of each training, instead of the preset's. out: the folder.
    """

    subject: str | None = None
    preset: Literal["cpu", "paper"] = "cpu"
    smoke: bool = False
    seeds: int | None = None
    minutes: float | None = None
    out: Path
    threads: int | None = None
    device: str = "auto"
    screen: Screen = field(default_factory=Screen)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A statement of the paper beside what was measured.

    verdict: `holds` or `does not hold`, at the scale of this study, or `open`. limits: what cannot be concluded.
    """

    statement: str
    paper: str
    here: str
    verdict: Literal["holds", "does not hold", "open"]
    limits: str


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A figure: its file name without ending, heading, a sentence on it, and the drawing."""

    name: str
    heading: str
    text: str
    figure: Figure


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a study has to say, once it is measured: plain data for its page.

    settings: name and value. tables: title, column names, rows.
    """

    settings: list[tuple[str, str]]
    findings: list[Finding]
    tables: list[tuple[str, list[str], list[list[str]]]]
    figures: list[Shown]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Study:
    """One of the paper's questions. run: measures what is missing below `options.out`, and answers.

    subject: what it takes: `DATA` to train on, `WEIGHTS`, or nothing.
    """

    name: str
    title: str
    question: str
    paper: str
    run: Callable[[Options], Answer]
    subject: Literal["DATA", "WEIGHTS", ""] = "DATA"


def conduct(study: Study, options: Options) -> dict[str, Any]:
    """Run a study; figures and report.html into `options.out`. Returns what `mixlab study --json` prints."""
    with stopped_at_once(
        options.out, "on the way; what is finished is kept", "the same call again goes on from there"
    ):
        return _conduct(study, options)


def _conduct(study: Study, options: Options) -> dict[str, Any]:
    answer = study.run(options)
    out = options.out
    figures = []
    for shown in answer.figures:
        path = out / "figures" / f"{shown.name}.png"
        save_figure(shown.figure, path)
        figures.append((shown.heading, shown.text, path))
    notes = list(answer.notes)
    if options.smoke:
        notes.insert(0, "This was a trial of the machinery (--smoke): its numbers mean nothing.")
    page = StudyPage(
        title=study.title,
        question=study.question,
        paper=study.paper,
        settings=answer.settings,
        findings=[asdict(finding) for finding in answer.findings],
        tables=answer.tables,
        figures=figures,
        notes=notes,
    )
    write_study_page(page, out / "report.html")
    return {
        "study": study.name,
        "out": str(out),
        "report": str(out / "report.html"),
        "findings": page.findings,
        "tables": [
            {"title": title, "rows": [dict(zip(columns, row, strict=True)) for row in rows]}
            for title, columns, rows in answer.tables
        ],
    }
