"""From a model and a config to a torch optimizer; weight decay touches kernels only, as in the authors' code."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from mixlab.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How gradients change weights.

    name: `adamw` or `sgd` (with `momentum`). lr: base learning rate, times the schedule's factor.
    weight_decay: decoupled for adamw and multiplied by the learning rate: the authors' 1e-4, which theirs
        is not, is 0.1 here at their lr of 1e-3. For sgd it is added to the gradient.
    grad_clip_norm: largest global norm of the gradient, 0 for no limit.
    """

    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    momentum: float = 0.9
    grad_clip_norm: float = 1.0

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise UsageError(f"lr must be above 0, got {self.lr}", where="optimizer.lr")
        for key in ("weight_decay", "grad_clip_norm", "momentum"):
            if getattr(self, key) < 0:
                raise UsageError(
                    f"{key} cannot be negative, got {getattr(self, key)}", where=f"optimizer.{key}"
                )
        for key in ("beta1", "beta2"):
            if not 0 <= getattr(self, key) < 1:
                raise UsageError(
                    f"{key} must be in [0, 1), got {getattr(self, key)}", where=f"optimizer.{key}"
                )


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to kernels, not to biases, norms and embeddings of one axis."""
    return parameter.ndim > 1 and not name.endswith("bias")


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Two parameter groups in the model's order: decayed kernels, then the rest."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in named if decays(name, p)], "weight_decay": config.weight_decay},
        {"params": [p for name, p in named if not decays(name, p)], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=True)
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
    )
