"""How many steps a run with a deadline has: set anew while it trains, because machines change their speed.

Without it a run that was measured in a slow moment would end minutes before its deadline, and one that was measured
in a fast moment would be cut off before its learning rate has come down. Every change is written to the run, so that
a resumed one takes the same steps at the same rates.
"""

import json
import time
from pathlib import Path

from mixlab.errors import TrainingError
from mixlab.files import write_atomically
from mixlab.records import read_json, take

PACE_NAME = "pace.json"
SHARE = (
    1 / 8
)  # of the time that is left, until the next look at the clock; or half of the steps, where that is sooner
SHORTEST, SHORTEST_HALF = 2.0, 0.5  # seconds between two looks
HASTY = (
    1 / 4
)  # of the time: as long as more is left, a look takes away no more than half of the steps that are left


class Pace:
    """The number of steps of the run `run`; changes: how it was changed in earlier sittings (`read_changes`)."""

    def __init__(self, run: Path, changes: dict[int, int]) -> None:
        self.run, self.changes = run, dict(changes)
        self.begin(0, None)

    def begin(self, step: int, deadline: float | None) -> None:
        """A sitting begins with `step`; deadline: on time.monotonic(), None never changes anything."""
        self._looks, self._deadline = [(time.monotonic(), step)], deadline

    def look(self, step: int, steps: int) -> int:
        """How many steps there should be in all, after `step` of `steps`; 0 if that is not to change.

        It looks at the clock from time to time. The speed is the mean over at least the last half of the sitting,
        with all validations and saves in it: a machine may stand still for a while, or have done so.
        """
        now, deadline = time.monotonic(), self._deadline
        began, first = self._looks[0]
        if (
            deadline is None
            or now >= deadline
            or step == first
            or not self._is_due(now, step, steps, deadline)
        ):
            return 0
        since, done = next(look for look in reversed(self._looks) if look[0] - began <= (now - began) / 2)
        self._looks.append((now, step))
        if step == done:  # nothing since: as if this were the first of those steps
            return 0
        fitting = step + int((deadline - now) * (step - done) / (now - since))
        if deadline - now > HASTY * (deadline - began):
            fitting = max(fitting, step + (steps - step) // 2)
        fitting = max(fitting, step if step == steps else step + 1)
        return fitting if fitting != steps else 0

    def _is_due(self, now: float, step: int, steps: int, deadline: float) -> bool:
        if step >= steps:  # the last one, perhaps too early
            return deadline - now > SHORTEST
        last, seen = self._looks[-1]
        is_half = step - seen >= (steps - seen) / 2 and now - last >= SHORTEST_HALF
        return is_half or now - last >= max(SHARE * (deadline - last), SHORTEST)

    def change(self, step: int, steps: int) -> None:
        """From after `step` on there are `steps`. DiskError if that cannot be written down."""
        self.changes[step] = steps
        write_atomically(self.run / PACE_NAME, (json.dumps(self.changes, indent=1) + "\n").encode())

    def at(self, step: int, steps: int) -> int:
        """How many steps there are after `step`, of a run that began with `steps`."""
        before = [changed for changed in self.changes if changed <= step]
        return self.changes[max(before)] if before else steps


def read_changes(run: Path) -> dict[int, int]:
    """After which step of a run its number of steps became which."""
    if not (run / PACE_NAME).is_file():
        return {}
    where = str(run / PACE_NAME)
    found = read_json(run / PACE_NAME)
    if not all(step.isdecimal() and len(step) < 19 for step in found):
        raise TrainingError(
            "this is no list of changes of a run's length",
            where=where,
            hint="it was damaged; without it the run cannot be resumed to the same weights",
        )
    return {int(step): take(found, step, int, where, low=1) for step in found}
