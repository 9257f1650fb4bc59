"""A training with doubles at its seams: the screen, its course, its decisions, its clock."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from mixlab.planning import train as way
from mixlab.planning.budget import parse_duration
from mixlab.planning.draft import Draft, Request, Trials
from mixlab.planning.make_plan import DECISIONS, Decision
from mixlab.recipes import compose
from mixlab.report.screen import Bar, Screen
from mixlab.training.course import TrainingCourse
from mixlab.training.session import Session

QUIET = Screen(quiet=True)
# A Mixer that takes next to no time.
TINY = {
    "model__hidden_dim": 8,
    "model__token_mlp_dim": 8,
    "model__channel_mlp_dim": 16,
    "model__num_blocks": 1,
}


class Listening(Screen):
    """A silent screen that keeps what it is told in `said`."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.said: list[str] = []

    def say(self, text: str = "") -> None:
        self.said.append(text)


class StopAfter(Screen):
    """A silent screen that sends this process a signal when it is told that a step is done."""

    def __init__(self, step: int, number: int = signal.SIGTERM) -> None:
        super().__init__(quiet=True)
        self.step, self.number = step, number

    @contextmanager
    def progress(self, label: str, total: int, start: int = 0) -> Iterator[Bar]:
        yield _StoppingBar(self, label, total, start, None)


class _StoppingBar(Bar):
    has_sent = False

    def update(self, done: int, note: str = "", *, is_news: bool = False) -> None:
        screen = self._screen
        if isinstance(screen, StopAfter) and self._label == "training" and done == screen.step:
            if not self.has_sent:
                os.kill(os.getpid(), screen.number)
            self.has_sent = True


def train(
    data: str | Path,
    recipe: str,
    run: Path,
    *,
    budget: str | None = None,
    trials: Trials | None = None,
    screen: Screen = QUIET,
    doubles: Any = None,
    **options: Any,
) -> dict[str, Any]:
    """`mixlab.train` without figures and images. doubles: those that `planning.train.train` takes."""
    overrides = {key.replace("__", "."): value for key, value in options.items()}
    composed = compose(str(data), recipe=recipe, overrides=overrides, has_budget=budget is not None)
    seconds = None if budget is None else parse_duration(budget)
    request = Request(recipe=composed, run=run, budget_seconds=seconds, trials=trials)
    return way.train(request, _session(screen), **(doubles or {}))


def resume(run: Path, *, screen: Screen = QUIET, **doubles: Any) -> dict[str, Any]:
    """`mixlab.resume` without figures and images. doubles: those that `planning.train.resume` takes."""
    return way.resume(run, _session(screen), **doubles)


def _session(screen: Screen) -> Session:
    return Session(screen=screen, figures=False, with_pictures=False)


def before_steps(act: Callable[[TrainingCourse], object]) -> type[TrainingCourse]:
    """A course with which `act` is called before each step; `clock.step` of them are done."""

    class Watched(TrainingCourse):
        def is_over(self) -> bool:
            act(self)
            return super().is_over()

    return Watched


def with_decisions(**doubles: Decision) -> tuple[Decision, ...]:
    """The decisions of a plan, with doubles for those of these names."""
    assert doubles.keys() <= {decide.__name__ for decide in DECISIONS}
    return tuple(doubles.get(decide.__name__, decide) for decide in DECISIONS)


def steps_of(num_steps: int, *, deadline: float | None = None) -> Decision:
    """A double for `decide_steps`: so many, whatever the machine's speed."""

    def decide(draft: Draft) -> Draft:
        recipe = replace(draft.recipe, epochs=None)
        return replace(draft, recipe=recipe, deadline=deadline).with_steps(num_steps)

    return decide
