"""A table of trainings under one shared recipe, filled cell by cell, safe to kill at any time.

OUT/results.csv has a row for each finished cell, OUT/curves.csv its validation accuracy against steps, OUT/runs/ the
runs. A second call resumes the run it was killed in and goes on. Cells of a model have as many steps as its first
one, for which they are planned once from the minutes of a cell, so that settings and seeds differ in nothing else.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mixlab.cpu.describe import describe_settings
from mixlab.data.sources import open_source
from mixlab.device import machine_name
from mixlab.errors import DataError, UsageError
from mixlab.planning.draft import Request
from mixlab.planning.train import resume, train
from mixlab.recipes import compose
from mixlab.records import read_json, take_list
from mixlab.report.run_log import read_run_log
from mixlab.studies.harness import Options
from mixlab.studies.presets import Preset, data_of
from mixlab.studies.rows import Row, distinct, make_folder, read_rows, write_rows
from mixlab.training.history import check_links
from mixlab.training.keys import from_toml, override, to_toml
from mixlab.training.recipe import Recipe
from mixlab.training.run_folder import locked
from mixlab.training.session import Session
from mixlab.training.setup import model_settings, with_absolute_paths
from mixlab.training.splits import split_source

RESULTS, CURVES = "results.csv", "curves.csv"
KEY = ("model", "setting", "seed")
COLUMNS = (
    *KEY, "top1", "num_correct", "num_images", "val_top1", "train_loss", "steps", "epochs", "num_parameters", "macs",
    "recipe", "commit", "machine", "images_per_second", "core_seconds",
)  # fmt: skip
TIMED = ("images_per_second", "core_seconds")  # columns that another run of the same cell has otherwise
CURVE_COLUMNS = (*KEY, "step", "epoch", "top1", "loss")
SMOKE = {"steps": 3, "batch_size": 16, "checkpoint_seconds": 0.0}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training. model, setting: as tables name them. changes: keys of the recipe, on top of what all share."""

    model: str
    setting: str
    seed: int
    changes: dict[str, Any]

    @property
    def key(self) -> Row:
        return {"model": self.model, "setting": self.setting, "seed": str(self.seed)}

    @property
    def folder_name(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", f"{self.model} {self.setting} {self.seed}".lower()).strip("-")


def train_cell(recipe: Recipe, run: Path, minutes: float | None, options: Options) -> dict[str, Any]:
    """Train one cell in `run`, or go on with it; what `mixlab train --json` prints."""
    session = Session(
        device_name=options.device, with_pictures=False, figures=not options.smoke, screen=options.screen
    )
    if (run / "recipe.toml").is_file():
        return resume(run, session, start_over="if unfinished")
    seconds = 60 * minutes if minutes is not None and recipe.steps is None else None
    return train(Request(recipe=recipe, run=run, budget_seconds=seconds, follow_clock=False), session)


def fill(
    options: Options,
    preset: Preset,
    cells: Sequence[Cell],
    *,
    extra_columns: Sequence[str] = (),
    measure: Callable[[Path, Cell], dict[str, Any]] | None = None,
    train: Callable[[Recipe, Path, float | None, Options], dict[str, Any]] = train_cell,
) -> tuple[list[Row], list[Row]]:
    """Train what is missing, and return the rows of results.csv and curves.csv, in the order of `cells`.

    measure: what else to write down of a finished run, for `extra_columns`. train: as `train_cell`. DataError if the
    set has no test split; UsageError if the folder holds cells of another recipe.
    """
    out, screen = options.out, options.screen
    minutes = preset.minutes_of(options)
    shared = preset.shared | (SMOKE if options.smoke else {})
    data = data_of(options)
    base = compose(data, recipe=preset.recipe, overrides=shared, has_budget=minutes is not None)
    base = replace(base, threads=options.threads)
    source = open_source(base.data.source, data_dir=base.data.data_dir)
    if "test" not in split_source(
        source, base
    ):  # which a set of a few images has not, even where it is drawn
        raise DataError("a study reports on a test split, and there is none", where=source.name)
    columns = (*COLUMNS, *extra_columns)
    make_folder(out)
    check_links(out)
    with locked(out, screen):
        rows, curves = read_rows(out / RESULTS), read_rows(out / CURVES)
        recipes = {cell.folder_name: override(base, cell.changes | {"seed": cell.seed}) for cell in cells}
        digests = {name: _digests(recipe, minutes) for name, recipe in recipes.items()}
        _check_same(rows, cells, digests, out)
        missing = [cell for cell in cells if _find(rows, cell) is None]
        if missing:
            if minutes is not None:
                length = f"{minutes:g} minutes each, {len(missing) * minutes / 60:.1f} hours in all"
            else:
                length = f"{base.steps} steps each" if base.steps else f"{base.epochs or 10:g} epochs each"
            screen.say(f"{len(missing)} of {len(cells)} trainings to do, {length}")
            screen.say("a call that is stopped goes on where it was")
        for number, cell in enumerate(missing, start=1):
            screen.say(f"training {number} of {len(missing)}: {cell.model}, {cell.setting}, seed {cell.seed}")
            recipe = recipes[cell.folder_name]
            run = out / "runs" / cell.folder_name
            leader = next((row for row in rows if row["model"] == cell.model), None)
            if leader is not None and minutes is not None:
                recipe = replace(recipe, steps=int(leader["steps"]))
            result = train(recipe, run, minutes, options)
            result_row = cell.key | _row(run, result) | {"recipe": digests[cell.folder_name][0]}
            result_row |= {
                key: _text(value) for key, value in (measure(run, cell) if measure else {}).items()
            }
            curves = [old for old in curves if not _is_of(old, cell)] + _curve(run, cell)
            write_rows(out / CURVES, CURVE_COLUMNS, curves)
            rows.append(result_row)
            write_rows(out / RESULTS, columns, rows)
        chosen = [row for row in curves if any(_is_of(row, cell) for cell in cells)]
        return [known for cell in cells if (known := _find(rows, cell)) is not None], chosen


def _row(run: Path, result: dict[str, Any]) -> Row:
    """What every study writes down of a run."""
    recipe = read_recipe(run)
    environment = read_json(run / "environment.json")
    log = read_run_log(run / "metrics.jsonl")
    losses = [row.get("loss") for row in log if row["event"] == "train"]
    tops = [row["top1"] for row in log if row["event"] == "validation"]
    config = run / "config.json"
    settings = model_settings(recipe, len(take_list(read_json(config), "class_names", str, str(config))))
    test = result["test"]
    speed = result["images_per_second"]
    return {
        "top1": _text(test["num_correct"] / test["num_images"]),
        "num_correct": str(test["num_correct"]),
        "num_images": str(test["num_images"]),
        "val_top1": _text(tops[-1] if tops else None),
        "train_loss": _text(losses[-1] if losses else None),
        "steps": str(result["steps"]),
        "epochs": _text(round(result["epochs"], 4)),
        "num_parameters": str(result["num_parameters"]),
        "macs": str(describe_settings(settings, batch_size=1)["macs"]),
        "commit": str(environment["commit"]),
        "machine": machine_name(environment),
        "images_per_second": "" if speed is None else f"{speed:.1f}",
        "core_seconds": f"{result['seconds'] * (recipe.threads or 1):.1f}",
    }


def read_recipe(run: Path) -> Recipe:
    """The resolved recipe of a run."""
    return override(Recipe(), from_toml(run / "recipe.toml"))


def _curve(run: Path, cell: Cell) -> list[Row]:
    rows = [row for row in read_run_log(run / "metrics.jsonl") if row["event"] == "validation"]
    return [cell.key | {key: _text(row.get(key)) for key in CURVE_COLUMNS[len(KEY) :]} for row in rows]


def describe_origin(rows: list[Row]) -> list[tuple[str, str]]:
    """Where and by which code the trainings were made."""
    return [("Machine", distinct(rows, "machine")), ("Commit", distinct(rows, "commit"))]


def describe_trainings(rows: list[Row]) -> str:
    """How many there are, and how long those of each model are."""
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(row["model"], row)
    steps = ", ".join(
        f"{row['model']} {row['steps']} ({float(row['epochs']):.1f} epochs)" for row in first.values()
    )
    return f"{len(rows)}; steps of each model: {steps}"


def _check_same(rows: list[Row], cells: Sequence[Cell], digests: dict[str, list[str]], out: Path) -> None:
    for cell in cells:
        row = _find(rows, cell)
        if row is not None and row["recipe"] not in digests[cell.folder_name]:
            raise UsageError(
                f"it has a result of {cell.model}, {cell.setting}, seed {cell.seed} by another recipe, data set "
                "or --minutes",
                where=str(out / RESULTS),
                hint="give what it was made with, or choose another --out",
            )


def _digests(recipe: Recipe, minutes: float | None) -> list[str]:
    """What decides the result of a cell, however the data's folder is spelt and whatever the machine has of cores.

    The others are those of the same recipe as it was written before, newest first.
    """
    same = to_toml(with_absolute_paths(replace(recipe, threads=None)))
    return [
        hashlib.sha256(f"{text}minutes = {minutes}\n".encode()).hexdigest()[:12]
        for text in (same, before_sounds(same), as_older(same))
    ]


def before_sounds(toml: str) -> str:
    """A recipe's TOML as it was written when there were images only."""
    return re.sub(r"(?ms)^\[audio\]\n.*?(?=^\[|\Z)", "", toml)


def as_older(toml: str) -> str:
    """A recipe's TOML as it was written when it had the retired keys (`keys.RETIRED`)."""
    toml = re.sub(
        r"(?m)^(skip_nonfinite = .*)$", r"\1\ncoarse_share = 0.0\ncoarse_factor = 2", before_sounds(toml)
    )
    toml = re.sub(r"(?m)^(gsam_alpha = .*)$", r"\1\nsam_from = 0.0", toml)
    return toml.replace("\nstage_mixing =", "\ntoken_mix =")


def _find(rows: list[Row], cell: Cell) -> Row | None:
    return next((row for row in rows if _is_of(row, cell)), None)


def _is_of(row: Row, cell: Cell) -> bool:
    return all(row[key] == value for key, value in cell.key.items())


def _text(value: Any) -> str:
    return "" if value is None else repr(value) if isinstance(value, float) else str(value)
