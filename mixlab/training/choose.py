"""Which objective, exchange and engine a training has: one place, at build time, from its recipe and its world."""

from dataclasses import fields
from importlib import import_module
from typing import Any

import torch

from mixlab.errors import UsageError
from mixlab.training import from_labels
from mixlab.training.distributed import World
from mixlab.training.engines import Engine
from mixlab.training.engines.by_cpu import CpuEngine, dtype_of, lost_kernels
from mixlab.training.engines.by_torch import TorchEngine
from mixlab.training.exchanges import Exchange
from mixlab.training.exchanges.ddp import Ddp
from mixlab.training.exchanges.exact import Exact
from mixlab.training.exchanges.fsdp import Fsdp
from mixlab.training.objectives import Objective
from mixlab.training.recipe import Recipe


def objective_module(recipe: Recipe) -> Any:
    """The module that makes the recipe's objective: of the part of the recipe that asks for one, or of the labels.

    Such a part has `prepared_by`, the module's name, and `is_on`. The module has
    begin(recipe, class_names, num_images) -> Preparation, of a resolved recipe before the images are read, num_images
        being those of training on this machine; UsageError if the objective cannot be had for them;
    reopen(run, recipe, data, session) -> Objective, of a run that goes on, from what was kept there.
    """
    parts = [getattr(recipe, field.name) for field in fields(recipe)]
    found = [part.prepared_by for part in parts if hasattr(part, "prepared_by") and part.is_on]
    if len(found) > 1:
        raise UsageError(f"a training has one objective, and {len(found)} are on: {', '.join(found)}")
    return import_module(found[0]) if found else from_labels


def exchange_of(recipe: Recipe, world: World) -> Exchange:
    """UsageError where the batch cannot be shared out to so many processes."""
    if world.size > recipe.num_parts(recipe.batch_size or world.size):
        what = f"{recipe.virtual_shards} virtual shards" if recipe.virtual_shards else "images in a batch"
        raise UsageError(
            f"{world.size} processes for {what}: some would have nothing to do", where="virtual_shards"
        )
    if world.size > 1 and recipe.parallel == "fsdp":
        return Fsdp(world)
    if recipe.virtual_shards:
        return Exact(world, recipe.virtual_shards)
    return Ddp(world) if world.size > 1 else Exchange()


def needs_all_ranks(recipe: Recipe, world: World) -> bool:
    """Whether no process can take a step by itself."""
    return exchange_of(recipe, world).needs_all_ranks


def engine_of(
    exchange: Exchange,
    recipe: Recipe,
    device: torch.device,
    objective: Objective,
    scaler: torch.amp.GradScaler,
) -> Engine:
    """mixlab's own passes where they can compute the model and no exchange needs torch's way; else torch."""
    problem = None
    if not exchange.is_within_passes:
        dtype = dtype_of(recipe, exchange.module)
        if dtype is not None:
            return CpuEngine(exchange.module, objective, dtype, recipe.timeout_seconds)
        problem = lost_kernels(recipe, exchange.module)
    engine = TorchEngine(
        exchange.module, objective, device, recipe.precision, scaler, exchange.scale, recipe.compile
    )
    engine.note = problem
    return engine
