"""From a model and a config to a torch optimizer; weight decay touches kernels only, as in the authors' code."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from mixlab.errors import UsageError
from mixlab.training.muon import Muon


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How gradients change weights.

    name: `adamw`, `sgd` (with `momentum`), or `muon`, which moves the MLPs' kernels by orthogonal steps at
        `muon_lr` and the rest by adamw. lr: base learning rate, times the schedule's factor.
    weight_decay: decoupled for adamw and multiplied by the learning rate: the authors' 1e-4, which theirs
        is not, is 0.1 here at their lr of 1e-3. For sgd it is added to the gradient.
    grad_clip_norm: largest global norm of the gradient, 0 for no limit.
    """

    name: Literal["adamw", "sgd", "muon"] = "adamw"
    lr: float = 1e-3
    muon_lr: float = 0.02
    weight_decay: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    momentum: float = 0.9
    grad_clip_norm: float = 1.0

    def __post_init__(self) -> None:
        for key in ("lr", "muon_lr"):
            if not getattr(self, key) > 0:
                raise UsageError(f"{key} must be above 0, got {getattr(self, key)}", where=f"optimizer.{key}")
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
    """Parameter groups in the model's order: decayed kernels, the rest, and for muon the MLPs' matrices.

    `base_lr` of a group is what the schedule multiplies.
    """
    matrices: list[nn.Parameter] = []
    kernels: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if (
            config.name == "muon"
            and parameter.ndim == 2
            and not name.startswith(("head", "fc", "classifier"))
        ):
            matrices.append(parameter)
        else:
            (kernels if decays(name, parameter) else rest).append(parameter)
    groups = [
        {"params": kernels, "weight_decay": config.weight_decay, "base_lr": config.lr},
        {"params": rest, "weight_decay": 0.0, "base_lr": config.lr},
        {
            "params": matrices,
            "weight_decay": config.weight_decay,
            "base_lr": config.muon_lr,
            "orthogonal": True,
        },
    ]
    groups = [group for group in groups if group["params"]]
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=True)
    make = Muon if config.name == "muon" else torch.optim.AdamW
    return make(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)
