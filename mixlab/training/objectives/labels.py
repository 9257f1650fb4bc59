"""Labels: cross-entropy with the class of each image."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mixlab.language import Sentence
from mixlab.training.losses import LossConfig, balanced_class_weights, loss_per_batch

if TYPE_CHECKING:
    from mixlab.data.loader import Batch


@dataclass(frozen=True, kw_only=True)
class LabelLoss:
    """The mean loss of logits (B, K) and targets (B, K). class_weights: a number for each class, or None."""

    config: LossConfig
    class_weights: tuple[float, ...] | None = None

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        weights = None
        if self.class_weights is not None:
            weights = torch.tensor(self.class_weights, dtype=logits.dtype, device=logits.device)
        return loss_per_batch(logits, target.to(logits.dtype), self.config, weights)


class Labels:
    """Targets (B, K): 1 for an image's label. labels: of the training images, by which classes may be weighed."""

    num_views = 0

    def __init__(self, config: LossConfig, labels: Any, num_classes: int) -> None:
        self.notes: list[Sentence] = []
        self.facts: dict[str, Any] = {}
        self.cards: list[tuple[str, str]] = []
        weights = None
        if config.class_weights == "balanced":
            weights = tuple(balanced_class_weights(labels, num_classes).tolist())
        self.loss = LabelLoss(config=config, class_weights=weights)
        self._num_classes = num_classes

    def targets(self, batch: "Batch", device: torch.device) -> Tensor:
        label = batch.label.to(device, non_blocking=True)
        return F.one_hot(label, self._num_classes).to(batch.inputs.dtype)

    def keep(self, run: Path) -> None:
        pass
