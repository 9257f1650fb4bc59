"""What a run folder holds, and what its log, weights and checkpoints say of each other, before anything is written.

A run folder may come from somebody else: no link in it is followed. A resumed training writes over its log and
weights, so it goes on only from a checkpoint; beginning again is a word of the person, and keeps what was there.
"""

import os
import stat
import time
from pathlib import Path
from typing import Any, Literal

from mixlab.checkpoint.checkpoints import CHECKPOINTS_NAME, checkpoint_paths
from mixlab.checkpoint.store import CONFIG_NAME, NEXT_CONFIG_NAME, WEIGHTS_NAME
from mixlab.errors import DiskError, TrainingError, WeightsError
from mixlab.records import read_json
from mixlab.report.run_log import read_run_log
from mixlab.training.clock import CHANGES_NAME
from mixlab.training.run_folder import read_bad_files
from mixlab.training.tried import read_tried

LOG_NAME = "metrics.jsonl"
# What a training makes after its beginning; recipe.toml, split.csv and what an objective keeps are of before that.
_MADE = (
    LOG_NAME, WEIGHTS_NAME, CONFIG_NAME, NEXT_CONFIG_NAME, CHECKPOINTS_NAME, CHANGES_NAME, "predictions.csv",
    "report.html", "report.json", "figures", "nonfinite.csv",
)  # fmt: skip
StartOver = Literal["never", "if unfinished", "always"]


def check_links(run: Path) -> None:
    """WeightsError if the run holds a link, a pipe or a device where a training reads, writes or deletes."""
    for folder in (run, run / CHECKPOINTS_NAME, run / "figures", *checkpoint_paths(run / CHECKPOINTS_NAME)):
        if not folder.is_dir():
            continue
        with os.scandir(folder) as found:
            entries = list(found)
        for entry in entries:
            mode = entry.stat(follow_symlinks=False).st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                what = "a link" if stat.S_ISLNK(mode) else "no regular file"
                raise WeightsError(
                    f"{entry.name} is {what}, and in a run folder none is used",
                    where=entry.path,
                    hint="put the file or folder itself there; links around the run folder are fine",
                )


def check_resumable(run: Path, start_over: StartOver = "never") -> bool:
    """Whether the training of `run` must begin again rather than go on. TrainingError if that would lose anything.

    It begins again without being told only where nothing was kept yet: a run that was killed in its first moments.
    start_over: `if unfinished` begins again also where there are weights or validations, but no end.
    """
    rows = _log(run)
    # What is read when the training has ended, and would be a pity to find damaged then.
    read_json(run / "environment.json")
    read_bad_files(run)
    read_tried(run)
    if start_over == "always":
        return True
    if checkpoint_paths(run / CHECKPOINTS_NAME):
        return False
    ended = any(row["event"] == "end" for row in rows)
    validations = sum(row["event"] == "validation" for row in rows)
    found = [f"{validations} validations in its log"] if validations else []
    found += ["its end in the log"] if ended else []
    found += ["weights"] if (run / WEIGHTS_NAME).exists() else []
    if found and (ended or start_over == "never"):
        raise TrainingError(
            f"there is no checkpoint to go on from, but this run has {' and '.join(found)}, which a new beginning "
            "would write over",
            where=str(run / CHECKPOINTS_NAME),
            hint="bring them back; or begin again with --start-over, which keeps what is there beside",
        )
    return bool(found)


def set_aside(run: Path) -> Path | None:
    """Move all that a training has made in `run` into a folder of its own there, so that it can begin again."""
    made = [name for name in _MADE if os.path.lexists(run / name)]
    if not made:
        return None
    place = run / time.strftime("before_%Y%m%d-%H%M%S")
    number = 1
    while os.path.lexists(place):
        number += 1
        place = run / time.strftime(f"before_%Y%m%d-%H%M%S_{number}")
    try:
        place.mkdir()
        for name in made:
            (run / name).rename(place / name)
    except OSError as error:
        raise DiskError(f"could not set aside what is there: {error.strerror}", where=str(place)) from error
    return place


def _log(run: Path) -> list[dict[str, Any]]:
    return read_run_log(run / LOG_NAME) if os.path.lexists(run / LOG_NAME) else []


def check_end(run: Path, step: int) -> None:
    """TrainingError if going back to a checkpoint of `step` would take away the end that a run has reached."""
    last = max((row["step"] for row in _log(run) if row["event"] == "end"), default=-1)
    if last > step:
        raise TrainingError(
            f"this run has ended after step {last}, and its newest checkpoint that can be read is of step {step}",
            where=str(run / CHECKPOINTS_NAME),
            hint="its weights and report are as they were; --start-over trains again and keeps them beside",
        )
