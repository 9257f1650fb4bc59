"""metrics.jsonl: what happened during a run, one JSON object a line, only ever appended to."""

import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from mixlab.errors import DiskError, WeightsError
from mixlab.files import write_atomically


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
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Opened anew for each line: nothing stays open or unflushed, whatever happens in between.
            with self.path.open("ab") as file:
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


def _complete_lines(content: bytes, path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Each line as written, without its line break, and what it says."""
    *lines, tail = content.split(b"\n")
    parsed = [(line, _parse(line, number, path)) for number, line in enumerate(lines, start=1)]
    if tail:
        with suppress(WeightsError):  # Cut short by a crash: it says nothing that can be trusted.
            parsed.append((tail, _parse(tail, len(lines) + 1, path)))
    return parsed


def _parse(line: bytes, number: int, path: Path) -> dict[str, Any]:
    try:
        row = json.loads(line, parse_constant=_refuse_constant)
    except ValueError:  # Includes bytes that are not UTF-8.
        row = None
    if not isinstance(row, dict) or not isinstance(row.get("event"), str):
        raise WeightsError(
            f"line {number} of the run log is not a JSON object with an event",
            where=f"{path}:{number}",
            hint="mend or delete that line",
        )
    return row


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        message = f"could not read the run log: {error.strerror or error}"
        raise WeightsError(message, where=str(path)) from error


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
