"""How a process runs a command: all that may be another when the same training is gone on with."""

import time
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from mixlab.language import Language, language_of
from mixlab.report.screen import Screen
from mixlab.training.distributed import ALONE, World


@dataclass(frozen=True, kw_only=True)
class Session:
    """The circumstances of one call, handed on whole.

    device_name: `auto`, `cpu`, `cuda` or `mps`. world: the processes that train as one. started: on time.monotonic(),
    from which budgets count. with_pictures: pixels of the data set may stand in the report. figures: whether any are
    drawn. language: of the report; by default the locale's.
    """

    device_name: str = "auto"
    world: World = ALONE
    screen: Screen = field(default_factory=Screen)
    tracker: str | None = None
    started: float = field(default_factory=lambda: time.monotonic())
    with_pictures: bool = True
    figures: bool = True
    language: Language = field(default_factory=language_of)

    @cached_property
    def device(self) -> torch.device:
        """What this process computes on. All ranks ask for it at the same point: they compare their cards."""
        return self.world.device(self.device_name)

    def within(self, world: World) -> "Session":
        """The same in a world that it has joined."""
        return replace(self, world=world)

    def silent(self) -> "Session":
        """The same, without a word to the person: for what is tried and thrown away."""
        changed = replace(self, screen=Screen(quiet=True))
        changed.__dict__["device"] = self.device
        return changed
