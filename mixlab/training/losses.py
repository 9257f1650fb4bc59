"""Losses over logits (B, K) and targets (B, K) whose rows sum to 1."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mixlab.errors import UsageError
from mixlab.settings import setting


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What training minimises.

    name: `softmax` cross-entropy, or `sigmoid` cross-entropy summed over classes (the authors' pre-training).
    label_smoothing: share of each target spread evenly over all classes (softmax only).
    class_weights: `balanced` weighs each image by num_images / (num_classes * images of its class).
    """

    name: Literal["softmax", "sigmoid"] = setting(
        "softmax", "Cross-entropy by softmax, or by sigmoid summed over classes, as the authors pre-trained."
    )
    label_smoothing: float = setting(0.0, "Share of each target that is spread over all classes.", "common")
    class_weights: Literal["none", "balanced"] = setting(
        "none", "balanced weighs images of rare classes more.", "common"
    )

    def __post_init__(self) -> None:
        if not 0.0 <= self.label_smoothing < 1.0:
            raise UsageError(
                f"label_smoothing must be in [0, 1), got {self.label_smoothing}", where="loss.label_smoothing"
            )
        if self.name == "sigmoid" and self.label_smoothing:
            raise UsageError(
                "label_smoothing is for the softmax loss", where="loss.label_smoothing", hint="set it to 0"
            )


def loss_per_batch(
    logits: Tensor, target: Tensor, config: LossConfig, weights: Tensor | None = None
) -> Tensor:
    """Mean loss of a batch, a scalar. weights (K,): per class, applied through the target."""
    if config.name == "softmax":
        smoothed = target * (1 - config.label_smoothing) + config.label_smoothing / target.shape[1]
        losses = -(smoothed * F.log_softmax(logits, dim=1)).sum(dim=1)
    else:
        losses = F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(dim=1)
    if weights is not None:
        losses = losses * (target @ weights)
    return losses.mean()


def balanced_class_weights(labels: np.ndarray, num_classes: int) -> Tensor:
    """float32 (K,): num_images / (num_classes * count), 0 for a class without images."""
    counts = np.bincount(labels, minlength=num_classes)
    weights = np.where(counts > 0, len(labels) / (num_classes * np.maximum(counts, 1)), 0.0)
    return torch.from_numpy(weights).float()
