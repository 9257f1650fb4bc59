"""Distillation: a loss that follows a teacher's answers beside the labels (Hinton et al. 2015, arXiv 1503.02531).

"Consistent teaching" (Beyer et al. 2022, "Knowledge distillation: a good teacher is patient and consistent", arXiv
2106.05237): the teacher answers for the very image that the student sees, crop and flip included. So that it need
answer only once, there are a few fixed views of each image: epoch e shows it with the draws of epoch e % views.
teacher.py asks it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mixlab.errors import UsageError
from mixlab.escape import without_places
from mixlab.files import written_whole
from mixlab.language import Sentence, tell
from mixlab.settings import setting
from mixlab.training.objectives.labels import LabelLoss, Labels

if TYPE_CHECKING:
    from mixlab.data.loader import Batch

ANSWERS_NAME = "teacher.npz"


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Whether, and how, training follows a teacher.

    teacher: the weights in this run, folder or file, or of this published name, that know the data's classes and take
        images of the run's size and channels; their mean and std may be others.
    weight: share of the loss that is the teacher's; 0 is as without one.
    temperature: both sides' logits are divided by it in the teacher's part of the loss.
    views: different crops, flips and so on of each image; the teacher's logits are computed before the first step.
    """

    teacher: str | None = setting(
        None,
        "Follow the answers of the weights in this run, folder or file, or of this published name.",
        is_weights=True,
    )
    weight: float = setting(0.5, "Share of the loss that is the teacher's.")
    temperature: float = setting(1.0, "Both sides' logits are divided by it in the teacher's part.")
    views: int = setting(
        4, "Crops and flips of each image for which the teacher's logits are computed, once."
    )

    prepared_by: ClassVar[str] = "mixlab.training.teacher"  # see `choose.objective_module`

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


@dataclass(frozen=True, kw_only=True)
class DistillationLoss:
    """The mean loss of logits (B, K) and targets (B, 2, K): labels, and a teacher's probabilities at T.

    (1 - w) * the loss of the labels + w * T^2 * cross-entropy with the teacher, both sides at T. T^2 keeps the size
    of its gradient (Hinton et al., section 2). Cross-entropy has the gradient of the divergence, which is less by a
    constant.
    """

    labels: LabelLoss
    config: DistillConfig

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        label, teacher = target.to(logits.dtype).unbind(dim=1)
        usual, config = self.labels(logits, label), self.config
        log_probs = F.log_softmax(logits / config.temperature, dim=1)
        distilled = -(teacher * log_probs).sum(dim=1).mean()
        return (1 - config.weight) * usual + config.weight * config.temperature**2 * distilled


class Distillation:
    """Targets (B, 2, K): 1 for an image's label; what the teacher says of the very view that is seen.

    logits: the teacher's answers, float32 (views, N, K), in the CPU's memory. seconds: what they took.
    """

    def __init__(self, labels: Labels, config: DistillConfig, logits: Tensor, seconds: float) -> None:
        self._labels, self.config, self.logits, self.seconds = labels, config, logits, seconds
        self.loss = DistillationLoss(labels=labels.loss, config=config)
        self.num_views = config.views

    def probabilities(self, view: int, index: np.ndarray) -> Tensor:
        """float32 (B, K): what the teacher says of the images at `index` in this view, at the temperature."""
        return F.softmax(self.logits[view, torch.from_numpy(index)] / self.config.temperature, dim=1)

    def targets(self, batch: "Batch", device: torch.device) -> Tensor:
        label = self._labels.targets(batch, device)
        teacher = self.probabilities(batch.view, batch.index)
        return torch.stack([label, teacher.to(label)], dim=1)

    @property
    def notes(self) -> list[Sentence]:
        from mixlab.report.screen import duration  # processes that only compute the loss need no screen

        views, num_images, _ = self.logits.shape
        return [
            Sentence(
                "Not from labels only: {share:.0%} of the training loss follows the answers of {teacher} for {views} "
                "views of {n:,} examples, which took {time} before the first step, beside the training time.",
                share=self.config.weight,
                teacher=self.config.teacher,
                views=views,
                n=num_images,
                time=duration(self.seconds),
            )
        ]

    @property
    def facts(self) -> dict[str, Any]:
        return {"teacher": without_places(self.config.teacher), "labels_only": False}

    @property
    def cards(self) -> list[tuple[str, str]]:
        return [
            (
                tell("Labels only"),
                tell("no: {share:.0%} of the training loss follows a teacher", share=self.config.weight),
            )
        ]

    def keep(self, run: Path) -> None:
        with written_whole(run / ANSWERS_NAME) as temporary, temporary.open("wb") as file:
            np.savez(file, logits=self.logits.numpy(), seconds=np.array([self.seconds]))
