"""From a model and a config to a torch optimizer; weight decay touches kernels only, as in the authors' code."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mixlab.errors import UsageError
from mixlab.models.catalog import family_of
from mixlab.settings import setting
from mixlab.training.dtensors import is_dtensor
from mixlab.training.muon import Muon
from mixlab.training.sgd import Bf16MomentumSgd

Groups = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How gradients change weights.

    name: `adamw`, `sgd` (with `momentum`), or `muon`, which moves the MLPs' kernels by orthogonal steps at
        `muon_lr` and the rest by adamw. lr: base learning rate, times the schedule's factor.
    weight_decay: decoupled for adamw and multiplied by the learning rate: the authors' 1e-4, which theirs
        is not, is 0.1 here at their lr of 1e-3. For sgd it is added to the gradient.
    momentum_dtype: what sgd keeps its momentum in; `bf16` as the authors published their fine-tuning.
    grad_clip_norm: largest global norm of the gradient, 0 for no limit.
    layer_decay: factor on the learning rate for every layer further from the head; 1 is the same for all.
    sam_rho: radius of sharpness-aware minimisation (training/sam.py), which takes twice the time; 0 is off.
        sam_rho_end: it falls to this with the learning rate, as GSAM's does; None stays. gsam_alpha: weight of
        GSAM's second term.
    """

    name: Literal["adamw", "sgd", "muon"] = setting(
        "adamw",
        "What moves the weights: adamw, sgd, or muon for the MLPs' kernels and adamw for the rest.",
        "common",
    )
    lr: float = setting(1e-3, "Highest learning rate.", "common")
    muon_lr: float = setting(0.02, "Highest learning rate of the kernels that muon moves.")
    weight_decay: float = setting(0.05, "Of kernels; times the learning rate for adamw and muon.", "common")
    beta1: float = setting(0.9, "Of adamw: decay of the mean gradient.", "expert")
    beta2: float = setting(0.999, "Of adamw: decay of the mean square.", "expert")
    eps: float = setting(1e-8, "Of adamw: added to the root of the mean square.", "expert")
    momentum: float = setting(0.9, "Of sgd.")
    momentum_dtype: Literal["fp32", "bf16"] = setting("fp32", "What sgd keeps its momentum in.", "expert")
    grad_clip_norm: float = setting(1.0, "Largest norm of the whole gradient; 0 for no limit.")
    layer_decay: float = setting(1.0, "Factor on the learning rate for every layer further from the head.")
    sam_rho: float = setting(
        0.0, "Radius of sharpness-aware minimisation, which takes twice the time; 0 is off."
    )
    sam_rho_end: float | None = setting(
        None, "The radius falls to this with the learning rate; auto stays.", "expert"
    )
    gsam_alpha: float = setting(0.0, "Weight of GSAM's second term.", "expert")

    def __post_init__(self) -> None:
        for key in ("lr", "muon_lr"):
            if not getattr(self, key) > 0:
                raise UsageError(f"{key} must be above 0, got {getattr(self, key)}", where=f"optimizer.{key}")
        for key in (
            "eps",
            "weight_decay",
            "grad_clip_norm",
            "momentum",
            "sam_rho",
            "sam_rho_end",
            "gsam_alpha",
        ):
            if (getattr(self, key) or 0) < 0:
                raise UsageError(
                    f"{key} cannot be negative, got {getattr(self, key)}", where=f"optimizer.{key}"
                )
        if not 0 < self.layer_decay <= 1:
            raise UsageError(
                f"layer_decay must be in (0, 1], got {self.layer_decay}", where="optimizer.layer_decay"
            )
        for key in ("beta1", "beta2"):
            if not 0 <= getattr(self, key) < 1:
                raise UsageError(
                    f"{key} must be in [0, 1), got {getattr(self, key)}", where=f"optimizer.{key}"
                )
        if not self.sam_rho and (self.gsam_alpha or self.sam_rho_end is not None):
            raise UsageError("sam_rho is 0, which is off", where="optimizer.sam_rho", hint="give the radius")


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to kernels, not to biases, norms and embeddings of one axis."""
    return parameter.ndim > 1 and not name.endswith("bias")


def layer_numbers(model: nn.Module) -> dict[str, int]:
    """Parameter name -> layer: 0 the stem, then the blocks (the last with the final norm), last the head.

    timm's models say their own order. UsageError for a model without one.
    """
    # Not exported, but what its own optimizers use; here, because importing timm takes more than a second.
    from timm.models._manipulate import group_with_matcher

    return group_with_matcher(model.named_parameters(), family_of(model).layers(model), reverse=True)


def freeze_layers(model: nn.Module, count: int) -> None:
    """Let the first `count` layers keep their weights: 1 the stem, 2 also the first block; -1 all but the head."""
    if count == 0:
        return
    layers = layer_numbers(model)
    last = max(layers.values())
    count = last if count == -1 else count
    if not 0 < count <= last:
        raise UsageError(f"there are {last} layers below the head to freeze, got {count}", where="freeze")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(layers[name] >= count)
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if isinstance(module, _BatchNorm) and own and not any(p.requires_grad for p in own):
            module.eval()  # its running statistics stay too, whatever `train()` says to the model around it
            module.train = lambda mode=True, module=module: module  # type: ignore[method-assign, misc]


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, wide_dtype: torch.dtype | None = None
) -> torch.optim.Optimizer:
    """Parameter groups: decayed kernels, the rest, and for muon the MLPs' matrices; for each layer if they differ.

    `base_lr` of a group is what the schedule multiplies. Frozen parameters are left out. wide_dtype: in which Muon
    orthogonalises wide matrices; None for their own.
    """
    decayed = {"weight_decay": config.weight_decay, "base_lr": config.lr}
    kinds: dict[str, dict[str, Any]] = {
        "kernels": decayed,
        "rest": {"weight_decay": 0.0, "base_lr": config.lr},
        "matrices": decayed | {"base_lr": config.muon_lr, "orthogonal": True, "wide_dtype": wide_dtype},
    }
    layers = layer_numbers(model) if config.layer_decay != 1.0 else {}
    last = max(layers.values(), default=0)
    members: dict[tuple[str, int], list[nn.Parameter]] = {
        (kind, layer): [] for kind in kinds for layer in range(last + 1)
    }
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        kind = "kernels" if decays(name, parameter) else "rest"
        is_matrix = parameter.ndim == 2 and not name.startswith(("head", "fc", "classifier"))
        if config.name == "muon" and is_matrix and kind == "kernels":
            kind = "matrices"
        members[kind, layers.get(name, 0)].append(parameter)
    groups = [
        kinds[kind]
        | {"params": found, "base_lr": kinds[kind]["base_lr"] * config.layer_decay ** (last - layer)}
        for (kind, layer), found in members.items()
        if found
    ]
    return OPTIMIZERS[config.name].make(groups, config)


def state_keys(config: OptimizerConfig, group: dict[str, Any]) -> set[str]:
    """What the optimizer keeps for every parameter of one of its groups, once that has had a gradient."""
    return OPTIMIZERS[config.name].keeps(group)


def check_keeps(optimizer: torch.optim.Optimizer, config: OptimizerConfig) -> bool:
    """Whether it has taken a step; TypeError if what it stores then is not what `state_keys` says.

    A checkpoint is read by `state_keys`, so a wrong one would cost a training when it is resumed.
    """
    has_stepped = False
    for group in optimizer.param_groups:
        said = state_keys(config, group)
        for parameter in group["params"]:
            kept = {
                key for key, value in optimizer.state.get(parameter, {}).items() if torch.is_tensor(value)
            }
            if kept and kept != said:
                raise TypeError(
                    f"the optimizer {config.name} stores {sorted(kept)} for a parameter, and its `keeps` in "
                    f"OPTIMIZERS says {sorted(said)}"
                )
            has_stepped = has_stepped or kept == said
    return has_stepped


@dataclass(frozen=True)
class OptimizerKind:
    """make: an optimizer of parameter groups. keeps: see `state_keys`."""

    make: Callable[[Groups, OptimizerConfig], torch.optim.Optimizer]
    keeps: Callable[[dict[str, Any]], set[str]]


def _sgd(groups: Groups, config: OptimizerConfig) -> torch.optim.Optimizer:
    if config.momentum_dtype == "bf16":
        return Bf16MomentumSgd(groups, lr=config.lr, momentum=config.momentum)
    # torch has no fused SGD for tensors of which each rank has a part.
    is_whole = not any(is_dtensor(parameter) for group in groups for parameter in group["params"])
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=is_whole)


def _adamw(groups: Groups, config: OptimizerConfig, make: Any = torch.optim.AdamW) -> torch.optim.Optimizer:
    betas = (config.beta1, config.beta2)
    optimizer: torch.optim.Optimizer = make(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)
    return optimizer


ADAMW_KEEPS = {"step", "exp_avg", "exp_avg_sq"}
# By the name that a configuration gives. Another one: a line here, and its name in `OptimizerConfig`.
OPTIMIZERS = {
    "adamw": OptimizerKind(_adamw, lambda group: ADAMW_KEEPS),
    "sgd": OptimizerKind(_sgd, lambda group: {"momentum_buffer"} if group["momentum"] else set()),
    "muon": OptimizerKind(
        partial(_adamw, make=Muon),
        lambda group: {"momentum", "step"} if group.get("orthogonal") else ADAMW_KEEPS,
    ),
}
