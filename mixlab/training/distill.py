"""Distillation: what is asked of a teacher, and its answers; objectives/distillation.py has the loss.

"Consistent teaching" (Beyer et al. 2022, "Knowledge distillation: a good teacher is patient and consistent", arXiv
2106.05237): the teacher answers for the very picture that the student sees, crop and flip included. So that it need
answer only once, there are a few fixed views of each picture: epoch e shows it with the draws of epoch e % views.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mixlab.errors import UsageError
from mixlab.settings import setting


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Whether, and how, training follows a teacher.

    teacher: the weights in this run, folder or file, or of this published name, that know the data's classes and take
        images of the run's size and channels; their mean and std may be others.
    weight: share of the loss that is the teacher's; 0 is as without one.
    temperature: both sides' logits are divided by it in the teacher's part of the loss.
    views: different crops, flips and so on of each picture, on which the teacher is asked before the first step.
    """

    teacher: str | None = setting(
        None, "Follow the answers of the weights in this run, folder or file, or of this published name."
    )
    weight: float = setting(0.5, "Share of the loss that is the teacher's.")
    temperature: float = setting(1.0, "Both sides' logits are divided by it in the teacher's part.")
    views: int = setting(4, "Different crops and flips of each picture, on which the teacher is asked once.")

    def __post_init__(self) -> None:
        if not 0.0 <= self.weight <= 1.0:
            raise UsageError(f"weight must be in [0, 1], got {self.weight}", where="distill.weight")
        for key in ("temperature", "views"):
            if not getattr(self, key) > 0:
                raise UsageError(f"{key} must be above 0, got {getattr(self, key)}", where=f"distill.{key}")
        for key in ("weight", "temperature", "views"):
            if self.teacher is None and getattr(self, key) != getattr(type(self), key):
                raise UsageError(
                    f"{key} says how a teacher is followed, and none is named",
                    where=f"distill.{key}",
                    hint="--teacher RUN",
                )

    @property
    def is_on(self) -> bool:
        """Whether there is a teacher to follow."""
        return self.teacher is not None and self.weight > 0

    @property
    def num_views(self) -> int:
        """Different views of each picture; 0 without a teacher: as many as there are epochs."""
        return self.views if self.is_on else 0


@dataclass(frozen=True, kw_only=True)
class Teaching:
    """A teacher's answers. logits float32 (views, N, K), in the CPU's memory; seconds: what they took."""

    config: DistillConfig
    logits: Tensor
    seconds: float

    def probabilities(self, view: int, index: np.ndarray) -> Tensor:
        """float32 (B, K): what it says of the pictures at `index` in this view, at the recipe's temperature."""
        return F.softmax(self.logits[view, torch.from_numpy(index)] / self.config.temperature, dim=1)

    def describe(self) -> str:
        """A sentence for the report."""
        from mixlab.report.screen import format_seconds  # processes that only compute the loss need no screen

        views, num_images, _ = self.logits.shape
        return (
            f"Not from labels only: {self.config.weight:.0%} of the loss follows the answers of "
            f"{self.config.teacher} for {views} views of {num_images:,} pictures, which took "
            f"{format_seconds(self.seconds)} before the first step, beside the training time."
        )
