"""The folder of one run: what is written before the first step, and how it is found again."""

import csv
import fcntl
import io
import json
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mixlab.checkpoint.store import RUNS
from mixlab.data.loader import BadFile
from mixlab.data.sources import write_split_csv
from mixlab.device import describe_machine
from mixlab.errors import DiskError, MixlabError, UsageError
from mixlab.files import write_atomically, written_whole
from mixlab.training.recipe import Recipe, to_toml
from mixlab.training.setup import Prepared

BAD_FILES_NAME = "bad_files.csv"
NONFINITE_NAME = "nonfinite.csv"
LR_GRID_NAME = "lr_grid.json"  # what learning rates were tried before the run began
LOCK_NAME = ".lock"


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """One training at a time in a run's folder: UsageError if another process has it, DiskError if it is read-only.

    The lock belongs to the process, so a killed one leaves none behind, whatever the file says.
    """
    try:
        file = (run / LOCK_NAME).open("a")
    except OSError as error:
        raise DiskError(f"the run folder cannot be written: {error.strerror}", where=str(run)) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(
                "another process is training in this run",
                where=str(run),
                hint="wait for it, or stop it first",
            ) from None
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


def create_run(run: Path, prepared: Prepared, tried: dict[str, Any] | None = None) -> None:
    """Make the folder with recipe.toml, environment.json, split.csv and bad_files.csv, whole or not at all.

    tried: for lr_grid.json, if learning rates were.
    """
    with written_whole(
        run
    ) as temporary:  # a folder without its recipe could be neither resumed nor made again
        temporary.mkdir()
        _describe_run(temporary, prepared)
        if tried is not None:
            write_atomically(temporary / LR_GRID_NAME, (json.dumps(tried, indent=2) + "\n").encode())


def is_of_this_command(run: Path) -> bool:
    """Whether the command that this process runs began `run`, word for word."""
    try:
        environment = json.loads((run / "environment.json").read_text())
    except (OSError, ValueError):
        return False
    return bool(environment.get("command") == sys.argv)


def _describe_run(run: Path, prepared: Prepared) -> None:
    write_atomically(run / "recipe.toml", to_toml(prepared.recipe).encode())
    environment = describe_machine() | {
        "command": sys.argv,
        "commit": _commit(),
        "threads": prepared.recipe.threads,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    write_atomically(run / "environment.json", (json.dumps(environment, indent=2) + "\n").encode())
    write_split_csv(prepared.splits, prepared.source.class_names, run / "split.csv")
    write_bad_files(run, prepared.bad_files)


def read_lr_grid(run: Path) -> dict[str, Any] | None:
    """What learning rates were tried before the run (lr_grid.choose_lr), if any were."""
    path = run / LR_GRID_NAME
    if not path.is_file():
        return None
    values: dict[str, Any] = json.loads(path.read_text())
    return values


def write_bad_files(run: Path, bad_files: list[BadFile]) -> None:
    """bad_files.csv: path, reason."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "reason"])
    writer.writerows([file.path, file.reason] for file in bad_files)
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
    try:
        text = (run / BAD_FILES_NAME).read_text(encoding="utf-8", errors="surrogateescape")
    except FileNotFoundError:
        return []
    return [BadFile(row["path"], row["reason"]) for row in csv.DictReader(io.StringIO(text))]


def add_nonfinite_batch(run: Path, step: int, what: str, indices: np.ndarray, names: list[str]) -> None:
    """Add the images of a batch whose loss or gradient was not finite to nonfinite.csv: step, what, index, name."""
    path = run / NONFINITE_NAME
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if not path.exists():
        writer.writerow(["step", "what", "index", "name"])
    writer.writerows([step, what, int(index), name] for index, name in zip(indices, names, strict=True))
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

    After them come those that held nothing out, by test accuracy.
    """
    from mixlab.report.run_log import read_run_log

    rows = []
    for run in sorted(path.parent for path in folder.glob("*/recipe.toml")):
        try:
            log = read_run_log(run / "metrics.jsonl") if (run / "metrics.jsonl").exists() else []
        except MixlabError:  # one damaged log must not hide the other runs
            log = []
        last: dict[str, dict[str, Any]] = {row["event"]: row for row in log}
        validations = [row["top1"] for row in log if row["event"] == "validation"]
        rows.append(
            {
                "run": str(run),
                "test_top1": ((last.get("end") or {}).get("test") or {}).get("top1"),
                "validation_top1": max(validations) if validations else None,
                "steps": max((row.get("step") or 0 for row in log), default=0),
                "seconds": max((row.get("seconds") or 0.0 for row in log), default=0.0),
                "finished": "end" in last,
            }
        )
    return sorted(rows, key=lambda row: (row["validation_top1"] or -1, row["test_top1"] or -1), reverse=True)
