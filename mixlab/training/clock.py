"""How far a training is: its step, how many steps it has, and when it must end.

With a deadline the number of steps is set anew while it trains, because machines change their speed. Without that a
run that was measured in a slow moment would end minutes before its deadline, and one that was measured in a fast
moment would be cut off before its learning rate has come down. Every change is written to the run before it takes
effect, so that a resumed one takes the same steps at the same rates.
"""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from mixlab.errors import TrainingError
from mixlab.files import write_atomically
from mixlab.language import Sentence
from mixlab.records import read_json, take

CHANGES_NAME = "pace.json"
SHARE = 1 / 8  # of the time that is left, until the next look; or half of the steps, where that comes first
SHORTEST, SHORTEST_HALF = 2.0, 0.5  # seconds between two looks
HASTY = 1 / 4  # of the time: as long as more is left, a look takes away no more than half of the steps left
NOTED_SHARE = 0.05  # of a plan, by which it must change to be mentioned


class Clock:
    """The step of a training, how many it has, and its deadline: all that changes about it while it runs.

    step: steps that are done. num_steps: in all; the learning rate and whatever depends on the length follow it.
    """

    def __init__(
        self,
        num_steps: int,
        *,
        step: int = 0,
        deadline: float | None = None,
        run: Path | None = None,
        changes: Mapping[int, int] | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """A training of `num_steps` as it was planned.

        deadline: on time.monotonic(), after which no step begins; None leaves the number of steps as it is.
        run: the folder where changes are written. changes: those of earlier parts (`read_changes`). now: the time.
        """
        self.planned_steps, self.deadline = num_steps, deadline
        self._run, self._changes, self._now = run, dict(changes or {}), now
        self.num_steps = num_steps
        self.go_to(step)

    def go_to(self, step: int) -> None:
        """A part of the training begins after `step`."""
        self.step = step
        self.num_steps = self._at(step)
        self._looks = [(self._now(), step)]

    @property
    def is_late(self) -> bool:
        """Whether the deadline is over."""
        return self.deadline is not None and self._now() > self.deadline

    @property
    def last_known_step(self) -> int | None:
        """The last step that there will be; None if that may change."""
        if self.deadline is not None:
            return None
        return self._changes[max(self._changes)] if self._changes else self.planned_steps

    @property
    def most_steps(self) -> int:
        """The most steps that the training was ever to have."""
        return max(self.planned_steps, *self._changes.values(), 0)

    def look(self) -> int:
        """How many steps there should be in all, after this one; 0 if that is not to change.

        It looks at the time now and then. The speed is the mean over at least the last half of this part of the
        training, with all validations and saves in it: a machine may stand still for a while, or have done so.
        """
        now, deadline, step, steps = self._now(), self.deadline, self.step, self.num_steps
        began, first = self._looks[0]
        if deadline is None or now >= deadline or step == first:
            return 0
        if not self._is_due(now, deadline):
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

    def _is_due(self, now: float, deadline: float) -> bool:
        step, steps = self.step, self.num_steps
        if step >= steps:  # the last one, perhaps too early
            return deadline - now > SHORTEST
        last, seen = self._looks[-1]
        is_half = step - seen >= (steps - seen) / 2 and now - last >= SHORTEST_HALF
        return is_half or now - last >= max(SHARE * (deadline - last), SHORTEST)

    def write(self, num_steps: int) -> None:
        """Note in the run that there are `num_steps` from this step on. DiskError if that fails."""
        if self._run is not None:
            changes = self._changes | {self.step: num_steps}
            write_atomically(self._run / CHANGES_NAME, (json.dumps(changes, indent=1) + "\n").encode())

    def change(self, num_steps: int) -> None:
        """From this step on there are `num_steps`; 0 leaves what is known of this step."""
        if num_steps:
            self._changes[self.step] = num_steps
        self.num_steps = self._at(self.step)

    def _at(self, step: int) -> int:
        """How many steps there are after `step`."""
        before = [changed for changed in self._changes if changed <= step]
        return self._changes[max(before)] if before else self.planned_steps

    def cut_off(self) -> Sentence | None:
        """That the budget ended before the last step; None where it did not."""
        if self.step >= self.num_steps:
            return None
        return Sentence(
            "The budget ended after {step} of {steps} planned steps, because the machine became slower than it was "
            "when it was measured.",
            step=self.step,
            steps=self.num_steps,
        )

    def notes(self) -> list[Sentence]:
        """Sentences for the report on how the plan was cut off, or changed by much."""
        planned, steps, cut_off = self.planned_steps, self.num_steps, self.cut_off()
        found = [] if cut_off is None else [cut_off]
        if abs(steps - planned) > NOTED_SHARE * planned:
            found.append(
                Sentence(
                    "The plan of {planned} steps became {steps}, as the machine's speed changed.",
                    planned=planned,
                    steps=steps,
                )
            )
        return found


def read_changes(run: Path) -> dict[int, int]:
    """After which step of a run its number of steps became which."""
    if not (run / CHANGES_NAME).is_file():
        return {}
    where = str(run / CHANGES_NAME)
    found = read_json(run / CHANGES_NAME)
    if not all(step.isdecimal() and len(step) < 19 for step in found):
        raise TrainingError(
            "this is no list of changes of a run's length",
            where=where,
            hint="it was damaged; without it the run cannot be resumed to the same weights",
        )
    return {int(step): take(found, step, int, where, low=1) for step in found}
