"""The learning rate over a run, as a factor of its base value."""

import math
from dataclasses import dataclass
from typing import Literal

from mixlab.errors import UsageError
from mixlab.settings import setting


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Linear warm-up from 0, then decay.

    decay: `cosine`, `linear` or `constant`. end_factor: where the linear decay ends, times the base rate.
    warmup_steps: how many; None takes warmup_fraction of all steps.
    """

    decay: Literal["cosine", "linear", "constant"] = setting(
        "cosine", "How the learning rate falls after warm-up.", "common"
    )
    warmup_steps: int | None = setting(None, "Steps of linear warm-up; auto takes the fraction.")
    warmup_fraction: float = setting(0.05, "Share of the steps that warm up.")
    end_factor: float = setting(0.0, "Where the linear decay ends, times the highest rate.")

    def __post_init__(self) -> None:
        if not 0.0 <= self.warmup_fraction < 1.0:
            raise UsageError(
                f"warmup_fraction must be in [0, 1), got {self.warmup_fraction}",
                where="schedule.warmup_fraction",
            )

        if self.warmup_steps is not None and self.warmup_steps < 0:
            raise UsageError(
                f"warmup_steps cannot be negative, got {self.warmup_steps}", where="schedule.warmup_steps"
            )
        if not 0.0 <= self.end_factor <= 1.0:
            raise UsageError(
                f"end_factor must be in [0, 1], got {self.end_factor}", where="schedule.end_factor"
            )

    def num_warmup_steps(self, num_steps: int) -> int:
        """Steps of warm-up in a run of `num_steps`."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return round(self.warmup_fraction * num_steps)


def lr_factor(step: int, num_steps: int, config: ScheduleConfig) -> float:
    """Factor for `step` (from 0) as big_vision computes it: step 0 of a warm-up has rate 0."""
    warmup = config.num_warmup_steps(num_steps)
    progress = min(max((step - warmup) / max(num_steps - warmup, 1), 0.0), 1.0)
    if config.decay == "cosine":
        factor = 0.5 * (1 + math.cos(math.pi * progress))
    elif config.decay == "linear":
        factor = config.end_factor + (1 - config.end_factor) * (1 - progress)
    else:
        factor = 1.0
    if warmup:
        factor *= min(1.0, step / warmup)
    return factor
