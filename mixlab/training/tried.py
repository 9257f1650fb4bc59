"""What was tried in short trainings before a run, kept beside it: which learning rates, and what they gave."""

import json
from pathlib import Path
from typing import Any

from mixlab.files import write_atomically
from mixlab.language import tell
from mixlab.records import read_json, take, take_list

TRIED_NAME = "lr_grid.json"


def write_tried(run: Path, tried: dict[str, Any] | None) -> None:
    """Keep what was tried, if anything was: {"share", "steps", "lr", "tried": [{"lr", "top1", "loss"}]}."""
    if tried is not None:
        write_atomically(run / TRIED_NAME, (json.dumps(tried, indent=2) + "\n").encode())


def read_tried(run: Path) -> dict[str, Any] | None:
    """What was tried before the run, if anything was."""
    path = run / TRIED_NAME
    if not path.is_file():
        return None
    values, where = read_json(path), str(path)
    take(values, "steps", int, where)
    for row in take_list(values, "tried", dict, where):
        take(row, "lr", float, where)
        if take(row, "top1", float, where, optional=True) is None:
            take(row, "failed", str, where)
    return values


def describe_tried(tried: dict[str, Any]) -> str:
    """What was found, as a sentence."""
    rates = [
        f"{row['lr']:g} (" + (row["failed"] if row["top1"] is None else f"{100 * row['top1']:.2f} %") + ")"
        for row in tried["tried"]
    ]
    return tell(
        "The learning rate is the best on the validation split of those tried for {steps} steps each: {rates}.",
        steps=tried["steps"],
        rates=", ".join(rates),
    )
