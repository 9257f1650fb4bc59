"""Which objective, exchange and engine a training has: one place, at build time, from its recipe and its world."""

from typing import Any

import torch
from torch import nn

from mixlab.training.distill import Teaching
from mixlab.training.distributed import World
from mixlab.training.engines import Engine
from mixlab.training.engines.by_cpu import CpuEngine, dtype_of
from mixlab.training.engines.by_torch import TorchEngine
from mixlab.training.exchanges import Exchange
from mixlab.training.exchanges.alone import Alone
from mixlab.training.exchanges.ddp import Ddp
from mixlab.training.exchanges.exact import Exact
from mixlab.training.exchanges.fsdp import Fsdp
from mixlab.training.objectives import Objective
from mixlab.training.objectives.distillation import Distillation
from mixlab.training.objectives.labels import Labels, label_loss
from mixlab.training.recipe import Recipe


def objective_of(recipe: Recipe, labels: Any, num_classes: int, teaching: Teaching | None) -> Objective:
    """labels: of the training images. teaching: a teacher's answers, if there is one."""
    by_label = Labels(label_loss(recipe.loss, labels, num_classes), num_classes)
    return by_label if teaching is None else Distillation(by_label, teaching)


def exchange_of(model: nn.Module, recipe: Recipe, device: torch.device, world: World) -> Exchange:
    """model: on its device, or spread over the processes already."""
    if world.size > 1 and recipe.parallel == "fsdp":
        return Fsdp(model, world)
    if recipe.virtual_shards:
        return Exact(model, world, recipe.virtual_shards)
    return Ddp(model, device, world) if world.size > 1 else Alone(model)


def engine_of(
    exchange: Exchange,
    recipe: Recipe,
    device: torch.device,
    objective: Objective,
    scaler: torch.amp.GradScaler,
) -> Engine:
    """mixlab's own passes where they can compute the model and no exchange needs torch's way; else torch."""
    if isinstance(exchange, Alone | Exact):
        dtype = dtype_of(recipe, exchange.module)
        if dtype is not None:
            return CpuEngine(exchange.module, objective, dtype, recipe.timeout_seconds)  # type: ignore[arg-type]
    return TorchEngine(
        exchange.module, objective, device, recipe.precision, scaler, exchange.scale, recipe.compile
    )
