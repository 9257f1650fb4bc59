"""Distillation: a loss that follows a teacher's answers beside the labels (Hinton et al. 2015, arXiv 1503.02531)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from mixlab.training.distill import DistillConfig, Teaching
from mixlab.training.objectives.labels import LabelLoss, Labels

if TYPE_CHECKING:
    from mixlab.data.loader import Batch


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
    """Targets (B, 2, K): 1 for an image's label; what the teacher says of the very view that is seen."""

    def __init__(self, labels: Labels, teaching: Teaching) -> None:
        self._labels, self._teaching = labels, teaching
        self.loss = DistillationLoss(labels=labels.loss, config=teaching.config)

    def targets(self, batch: "Batch", device: torch.device) -> Tensor:
        label = self._labels.targets(batch, device)
        teacher = self._teaching.probabilities(batch.view, batch.index)
        return torch.stack([label, teacher.to(label)], dim=1)
