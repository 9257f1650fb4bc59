"""How many steps a run with a deadline has: set anew while it trains, because machines change their speed.

Without it a run that was measured in a slow moment would end minutes before its deadline, and one that was measured
in a fast moment would be cut off before its learning rate has come down. Every change is written to the run, so that
a resumed one takes the same steps at the same rates.
"""

import json
import time
from pathlib import Path

from mixlab.checkpoint.store import read_json
from mixlab.errors import TrainingError
from mixlab.files import write_atomically

PACE_NAME = "pace.json"
SHARE = 1 / 8  # of the time that is left, until the next look at the clock
SHORTEST = 2.0  # seconds between two looks


class Pace:
    """The number of steps of the run `run`; changes: how it was changed in earlier sittings (`read_changes`)."""

    def __init__(self, run: Path, changes: dict[int, int]) -> None:
        self.run, self.changes = run, dict(changes)
        self.begin(0, None)

    def begin(self, step: int, deadline: float | None) -> None:
        """A sitting begins with `step`; deadline: on time.monotonic(), None never changes anything."""
        self._began, self._first, self._deadline = time.monotonic(), step, deadline
        self._next = self._after(self._began)

    def look(self, step: int, steps: int) -> int:
        """How many steps there should be in all, after `step` of `steps`; 0 if that is not to change.

        It looks at the clock from time to time. The speed is the mean since the sitting began, with all validations
        and saves in it.
        """
        now = time.monotonic()
        if self._deadline is None or not self._next <= now < self._deadline or step == self._first:
            return 0
        self._next = self._after(now)
        seconds_per_step = (now - self._began) / (step - self._first)
        fitting = max(step + int((self._deadline - now) / seconds_per_step), step + 1)
        return fitting if fitting != steps else 0

    def change(self, step: int, steps: int) -> None:
        """From after `step` on there are `steps`. DiskError if that cannot be written down."""
        self.changes[step] = steps
        write_atomically(self.run / PACE_NAME, (json.dumps(self.changes, indent=1) + "\n").encode())

    def at(self, step: int, steps: int) -> int:
        """How many steps there are after `step`, of a run that began with `steps`."""
        before = [changed for changed in self.changes if changed <= step]
        return self.changes[max(before)] if before else steps

    def _after(self, now: float) -> float:
        return now if self._deadline is None else now + max(SHARE * (self._deadline - now), SHORTEST)


def read_changes(run: Path) -> dict[int, int]:
    """After which step of a run its number of steps became which."""
    if not (run / PACE_NAME).is_file():
        return {}
    found = read_json(run / PACE_NAME)
    try:
        return {int(step): int(steps) for step, steps in found.items()}
    except (TypeError, ValueError):
        raise TrainingError(
            "this is no list of changes of a run's length",
            where=str(run / PACE_NAME),
            hint="it was damaged; without it the run cannot be resumed to the same weights",
        ) from None
