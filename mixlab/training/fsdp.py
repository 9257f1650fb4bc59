"""A model spread over the ranks (FSDP2), for models that do not fit on one device."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from mixlab.checkpoint.sharded import write_shards
from mixlab.checkpoint.store import Checkpoint, save_checkpoint
from mixlab.errors import DiskError, UsageError
from mixlab.training.recipe import Recipe


def check_shardable(recipe: Recipe) -> None:
    """UsageError for what needs whole weights or gradients on each rank."""
    reasons = {
        "optimizer.name": ("muon", recipe.optimizer.name == "muon", "use adamw or sgd"),
        "precision": ("fp16", recipe.precision == "fp16", "use bf16"),
        "optimizer.momentum_dtype": ("bf16", recipe.optimizer.momentum_dtype == "bf16", "use fp32"),
    }
    for where, (value, is_set, hint) in reasons.items():
        if is_set:
            raise UsageError(
                f"{value} does not work on a model spread by --parallel fsdp", where=where, hint=hint
            )


def shard_model(model: nn.Module, device: torch.device) -> None:
    """Spread a model in place: each member of its lists of blocks by itself, then what is left."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for child in model.children():
        if isinstance(child, nn.ModuleList | nn.Sequential):
            for block in child:
                if any(True for _ in block.parameters()):
                    fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def whole(model: nn.Module) -> dict[str, Tensor]:
    """All weights, whole, in the CPU's memory of rank 0 (elsewhere nothing); all ranks call it together."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights: dict[str, Any] = get_model_state_dict(model, options=options)
    return weights


def placed_like(tensor: Tensor, like: Tensor | None) -> Tensor:
    """`tensor`, the same on all ranks, spread as `like` is, if that is spread and of the same shape."""
    if isinstance(like, DTensor) and not isinstance(tensor, DTensor) and tensor.shape == like.shape:
        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
    return tensor


def plain(value: Any) -> Any:
    """A tensor that is the same on all ranks, out of its spread form."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, all of it if it is not spread."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def save_spread(folder: Path, checkpoint: Checkpoint, *, keep: int, group: dist.ProcessGroup) -> None:
    """`save_checkpoint` by all ranks of `group` together, each writing its parts. DiskError on all if one fails."""
    tensors = {
        f"{file}.{name}": tensor
        for file, values in checkpoint.tensors.items()
        for name, tensor in values.items()
    }
    is_main = dist.get_rank() == 0
    has_told = False

    def write_parts(temporary: Path | None) -> None:
        nonlocal has_told
        has_told = True
        box = [temporary]
        dist.broadcast_object_list(box, src=0, group=group)
        if box[0] is not None:
            write_shards(box[0], tensors, group)

    outcome: list[DiskError | None] = [None]
    try:
        if is_main:
            save_checkpoint(folder, replace(checkpoint, tensors={}), keep=keep, write_parts=write_parts)
        else:
            write_parts(None)
    except (DiskError, OSError) as error:  # rank 0 tells below what became of it
        outcome[0] = error if isinstance(error, DiskError) else None
    if is_main and not has_told:
        write_parts(None)
    # All ranks must agree, or only one of them would try the same job again.
    dist.broadcast_object_list(outcome, src=0, group=group)
    if outcome[0] is not None:
        raise outcome[0]
