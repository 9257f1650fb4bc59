"""The folder of one run: what is written before the first step, and how it is found again."""

import csv
import io
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mixlab.checkpoint.store import RUNS
from mixlab.data.csv_files import write_split_csv
from mixlab.data.modality import BadFile
from mixlab.device import describe_machine
from mixlab.errors import DiskError, MixlabError, UsageError
from mixlab.escape import for_csv, from_csv
from mixlab.files import can_be_written, take_lock, write_atomically, written_whole
from mixlab.records import read_json, read_table
from mixlab.report.screen import Screen
from mixlab.training.keys import to_toml
from mixlab.training.plan import Plan
from mixlab.training.recipe import Recipe
from mixlab.training.tried import write_tried

BAD_FILES_NAME = "bad_files.csv"
NONFINITE_NAME = "nonfinite.csv"
LOCK_NAME = ".lock"


@contextmanager
def locked(run: Path, screen: Screen | None = None) -> Iterator[None]:
    """One training at a time in a run's folder: UsageError if another process has it, DiskError if it is read-only.

    The lock belongs to the process, so a killed one leaves none behind, whatever the file says. Where the file system
    has no locks it goes on without, and says so on `screen`.
    """
    try:
        file = (run / LOCK_NAME).open("a")
    except OSError as error:
        raise DiskError(f"the run folder cannot be written: {error.strerror}", where=str(run)) from error
    with file:
        try:
            is_locked = take_lock(file)
        except BlockingIOError:
            raise UsageError(
                "another process is training in this run",
                where=str(run),
                hint="wait for it, or stop it first",
            ) from None
        if not is_locked and screen is not None:
            screen.say_once(
                "warning: this file system has no locks: nothing keeps a second process out of the run's folder"
            )
        yield


def default_run_path(recipe: Recipe) -> Path:
    """runs/DATA-MODEL-YYYYmmdd-HHMMSS."""
    data = (
        Path(recipe.data.source).resolve().name if Path(recipe.data.source).exists() else recipe.data.source
    )
    model = (recipe.model.name or "model").removeprefix("timm/")
    stem = re.sub(r"[^A-Za-z0-9_.-]+", "_", f"{Path(data).stem}-{model}")
    path = RUNS / f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    number = 1
    while path.exists():  # two runs in one second
        number += 1
        path = path.with_name(f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}-{number}")
    return path


def check_place(run: Path) -> None:
    """DiskError if the folder of a new run cannot be made, before the data is read for it."""
    if not can_be_written(run.parent):
        raise DiskError(
            "the run folder cannot be made: no right to write",
            where=os.path.abspath(run.parent),
            hint="--run PATH names another place, such as --run ~/runs/NAME",
        )


def create_run(run: Path, plan: Plan) -> Path:
    """Make the folder with what is known before the first step, whole or not at all."""
    with written_whole(
        run
    ) as temporary:  # a folder without its recipe could be neither resumed nor made again
        temporary.mkdir()
        _describe_run(temporary, plan)
    return run


def is_of_this_command(run: Path) -> bool:
    """Whether the command that this process runs began `run`, word for word."""
    try:
        environment = read_json(run / "environment.json")
    except MixlabError:
        return False
    return bool(environment.get("command") == sys.argv)


def _describe_run(run: Path, plan: Plan) -> None:
    data = plan.data
    write_atomically(run / "recipe.toml", to_toml(plan.recipe, with_comments=True).encode())
    environment = describe_machine() | {
        "command": sys.argv,
        "commit": _commit(),
        "threads": plan.recipe.threads,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    write_atomically(run / "environment.json", (json.dumps(environment, indent=2) + "\n").encode())
    write_split_csv(data.splits, plan.class_names, run / "split.csv", data.digests)
    write_bad_files(run, data.bad_files)
    write_tried(run, plan.tried)
    plan.objective.keep(run)


def write_bad_files(run: Path, bad_files: list[BadFile]) -> None:
    """bad_files.csv: path, reason."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "reason"])
    writer.writerows([for_csv(file.path), for_csv(file.reason)] for file in bad_files)
    write_atomically(run / BAD_FILES_NAME, text.getvalue().encode("utf-8", errors="surrogateescape"))


def add_bad_files(run: Path, files: list[BadFile]) -> None:
    """Add unreadable files to bad_files.csv, those that are not listed yet."""
    listed = read_bad_files(run)
    paths = {file.path for file in listed}
    fresh = [file for file in files if file.path not in paths]
    if fresh:
        write_bad_files(run, listed + fresh)


def read_bad_files(run: Path) -> list[BadFile]:
    """The unreadable files that the run has met."""
    if not os.path.lexists(run / BAD_FILES_NAME):
        return []
    rows = read_table(run / BAD_FILES_NAME, ("path", "reason"))
    return [BadFile(from_csv(row["path"]), from_csv(row["reason"])) for row in rows]


def add_nonfinite_batch(run: Path, step: int, what: str, indices: np.ndarray, names: list[str]) -> None:
    """Add the images of a batch whose loss or gradient was not finite to nonfinite.csv: step, what, index, name."""
    path = run / NONFINITE_NAME
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if not path.exists():
        writer.writerow(["step", "what", "index", "name"])
    rows = zip(indices, names, strict=True)
    writer.writerows([step, what, int(index), for_csv(name)] for index, name in rows)
    try:
        with path.open("ab") as file:
            file.write(text.getvalue().encode("utf-8", errors="surrogateescape"))
    except OSError as error:
        raise DiskError(f"could not write: {error.strerror}", where=str(path)) from error


def _commit() -> str | None:
    """The commit of mixlab's own source tree, if it is run from one."""
    import subprocess

    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def list_runs(folder: Path) -> list[dict[str, Any]]:
    """A row for each run under `folder`, best first: by validation accuracy, on which runs are chosen.

    After them come those that held nothing out, by test accuracy. unreadable: why the log of a run cannot be read.
    """
    from mixlab.report.run_log import read_run_log

    rows = []
    for run in sorted(path.parent for path in folder.glob("*/recipe.toml")):
        log: list[dict[str, Any]] = []
        unreadable = None
        try:
            if os.path.lexists(run / "metrics.jsonl"):
                log = read_run_log(run / "metrics.jsonl")
        except MixlabError as error:  # one damaged log must not hide the other runs
            unreadable = error.message
        last: dict[str, dict[str, Any]] = {row["event"]: row for row in log}
        validations = [row["top1"] for row in log if row["event"] == "validation" and row["top1"] is not None]
        rows.append(
            {
                "run": str(run),
                "test_top1": ((last.get("end") or {}).get("test") or {}).get("top1"),
                "validation_top1": max(validations) if validations else None,
                "steps": max((row.get("step") or 0 for row in log), default=0),
                "seconds": max((row.get("seconds") or 0.0 for row in log), default=0.0),
                "finished": "end" in last,
                "unreadable": unreadable,
            }
        )
    return sorted(rows, key=lambda row: (row["validation_top1"] or -1, row["test_top1"] or -1), reverse=True)
