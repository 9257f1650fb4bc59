"""A training while it is being planned: the request, and what has been decided so far."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from mixlab.checkpoint.store import Weights
from mixlab.data.order import steps_per_epoch
from mixlab.training.objectives import Objective, Preparation
from mixlab.training.plan import Plan
from mixlab.training.prepared import Prepared
from mixlab.training.recipe import Recipe
from mixlab.training.session import Session

UNKNOWN_STEPS = 1_000_000  # of a trial whose end is not that of its steps


class Trials(Protocol):
    """Short trainings before the requested one, by which something of it is chosen."""

    @property
    def num_trials(self) -> int: ...
    @property
    def share(self) -> float:
        """Of the steps of the training, for each."""
        ...

    def check(self, has_validation: bool) -> None:
        """UsageError if nothing can be chosen."""

    def decide(self, draft: "Draft", num_steps: int) -> "Draft":
        """The draft of a training of `num_steps`, with what was chosen, and `tried`."""
        ...


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a person asks for, beside the recipe's keys.

    run: the folder; None takes one of the recipe's name. budget_seconds: total time, which sets the number of steps;
    follow_clock: and goes on setting it while the machine's speed changes. trials: short trainings that
    choose something first. download: fetch a public set that is not there.
    """

    recipe: Recipe
    run: Path | None = None
    budget_seconds: float | None = None
    follow_clock: bool = True
    trials: Trials | None = None
    download: bool = False


@dataclass(frozen=True, kw_only=True)
class Draft:
    """What is known of a training that is being planned. Each decision takes a draft and returns the next.

    recipe: as far as it is decided. objective: as in `Plan`; the labels' until `preparation` has made its own.
    may_choose_size: whether the person left the size of the model open.
    num_steps, deadline, tried: as in `Plan`; None is not decided yet, or absent.
    """

    request: Request
    session: Session
    recipe: Recipe
    data: Prepared
    initial: Weights | None
    preparation: Preparation
    objective: Objective
    may_choose_size: bool
    num_steps: int | None = None
    deadline: float | None = None
    tried: dict[str, Any] | None = None

    @property
    def end(self) -> float | None:
        """When the whole command must be over, on time.monotonic()."""
        seconds = self.request.budget_seconds
        return None if seconds is None else self.session.started + seconds

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(len(self.data.train), self.recipe.batch_size)

    def with_steps(self, num_steps: int) -> "Draft":
        """The draft of a training of `num_steps`, with the augmentation that suits so many."""
        return replace(self, num_steps=num_steps).with_augment(num_steps)

    def with_augment(self, num_steps: int) -> "Draft":
        """The draft with its augmentation decided for a training of `num_steps`."""
        modality = self.data.source.modality
        settled = modality.settled(self.recipe.part_of(modality), num_steps / self.steps_per_epoch)
        return replace(self, recipe=replace(self.recipe, **{modality.part: settled}))

    def plan(self, num_steps: int, recipe: Recipe | None = None) -> Plan:
        """The plan of a training of `num_steps`, which may be one that is thrown away; recipe: another one."""
        return Plan(
            recipe=recipe or self.recipe,
            data=self.data,
            num_steps=num_steps,
            deadline=self.deadline,
            initial=self.initial,
            objective=self.objective,
            tried=self.tried,
        )

    def finished(self) -> Plan:
        """The plan when all is decided; its recipe says its length."""
        if self.num_steps is None:
            raise AssertionError("nothing has decided how many steps there are")
        recipe = replace(self.recipe, steps=self.num_steps)
        return self.plan(self.num_steps, recipe)
