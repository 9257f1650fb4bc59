"""metrics.jsonl: what happened during a run, one JSON object a line, only ever appended to."""

import json
import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from mixlab.errors import DiskError, WeightsError
from mixlab.files import write_atomically
from mixlab.records import LARGEST, MAX_LINES_BYTES, parse_json, read_bytes, take

# Of every row that has them; null where a value was not finite.
_NUMBERS = (
    "step", "seconds", "epoch", "epochs", "loss", "accuracy", "top1", "lr", "images_per_second", "ece",
    "balanced_accuracy",
)  # fmt: skip
_COUNTS = ("num_images", "num_correct")  # of a test
_NEEDED = {"validation": ("step", "top1"), "end": ("step",)}


class RunLog:
    """Appends events to metrics.jsonl; each is on disk as soon as `write` returns."""

    def __init__(self, path: Path) -> None:
        """Open or begin the log. Mends a last line cut short by a crash, lest the next one be glued to it."""
        self.path = Path(path)
        if self.path.exists():
            content = _read_bytes(self.path)
            if content and not content.endswith(b"\n"):
                self._rewrite(_complete_lines(content, self.path))

    def write(self, event: str, **values: Any) -> None:
        """Append one line. Numpy values are accepted; NaN and infinity become null. Raises DiskError."""
        row = _plain({"event": event, **values})
        line = json.dumps(row, allow_nan=False) + "\n"
        try:
            # Opened anew for each line: nothing stays open or unflushed, whatever happens in between.
            with open(self.path, "ab", opener=_no_link) as file:
                file.write(line.encode())
        except OSError as error:
            message = f"could not write to the run log: {error.strerror or error}"
            raise DiskError(message, where=str(self.path)) from error

    def truncate_after(self, step: int) -> None:
        """Drop every line whose step is larger than `step`: a resumed run will write those steps again."""
        if self.path.exists():
            lines = _complete_lines(_read_bytes(self.path), self.path)
            self._rewrite([(line, row) for line, row in lines if (row.get("step") or 0) <= step])

    def _rewrite(self, lines: list[tuple[bytes, dict[str, Any]]]) -> None:
        write_atomically(self.path, b"".join(line + b"\n" for line, _ in lines))


def read_run_log(path: Path) -> list[dict[str, Any]]:
    """Every row of a run log, in order; a last line cut short by a crash is left out.

    Raises WeightsError, with the line number, for any other line that is not a JSON object.
    """
    path = Path(path)
    return [row for _, row in _complete_lines(_read_bytes(path), path)]


def last_accuracies(rows: list[dict[str, Any]]) -> tuple[float, float] | None:
    """Training accuracy of the steps before the last validation, since the one before it, and its own; fractions."""
    tried = [row for row in rows if row["event"] == "validation" and row.get("top1") is not None]
    if not tried:
        return None
    since, last = tried[-2]["step"] if len(tried) > 1 else 0, tried[-1]
    trained = [
        row["accuracy"]
        for row in rows
        if row["event"] == "train" and since < row["step"] <= last["step"] and row.get("accuracy") is not None
    ]
    return (sum(trained) / len(trained), float(last["top1"])) if trained else None


def _complete_lines(content: bytes, path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Each line as written, without its line break, and what it says."""
    *lines, tail = content.split(b"\n")
    parsed = [(line, _parse(line, number, path)) for number, line in enumerate(lines, start=1)]
    if tail:
        with suppress(WeightsError):  # Cut short by a crash: it says nothing that can be trusted.
            parsed.append((tail, _parse(tail, len(lines) + 1, path)))
    return parsed


def _parse(line: bytes, number: int, path: Path) -> dict[str, Any]:
    where = f"{path}:{number}"
    row = None
    with suppress(WeightsError):
        row = parse_json(line, where)
    if not isinstance(row, dict) or not isinstance(row.get("event"), str):
        raise WeightsError(
            f"line {number} of the run log is not a JSON object with an event",
            where=where,
            hint="mend or delete that line",
        )
    needed = _NEEDED.get(row["event"], ())
    for key in _NUMBERS:
        if key in needed and key not in row:
            take(row, key, float, where)
        if key in row:
            kind = int if key == "step" else float
            take(row, key, kind, where, low=-LARGEST, high=LARGEST, optional=key != "step")
    if row["event"] == "end" and take(row, "test", dict, where, optional=True) is not None:
        for key in _COUNTS:
            take(row["test"], key, int, where, low=1 if key == "num_images" else 0, optional=True)
        for key in ("top1", "ece"):
            take(row["test"], key, float, where, optional=True)
    return row


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def _read_bytes(path: Path) -> bytes:
    try:
        return read_bytes(path, MAX_LINES_BYTES)
    except WeightsError as error:
        raise WeightsError(f"could not read the run log: {error.message}", where=str(path)) from error


def _plain(value: Any) -> Any:
    """The same value out of what JSON knows."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
