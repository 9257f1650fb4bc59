"""A model spread over the ranks (FSDP2), for models that do not fit on one device.

What torch needs for it takes a second or two to import: only those who spread a model wait for that.
"""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mixlab.checkpoint.checkpoints import Checkpoint, save_checkpoint
from mixlab.errors import DiskError, UsageError
from mixlab.training.recipe import Recipe


def check_shardable(model: nn.Module, recipe: Recipe) -> None:
    """UsageError for what needs whole weights or gradients on each rank, or is not kept the same on all."""
    if any(isinstance(module, _BatchNorm) for module in model.modules()):
        raise UsageError(
            "each rank would keep its own statistics of batch normalisation",
            where="parallel",
            hint="use ddp, or a model without batch normalisation",
        )
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
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for child in model.children():
        if isinstance(child, nn.ModuleList | nn.Sequential):
            for block in child:
                if any(True for _ in block.parameters()):
                    fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def whole(model: nn.Module) -> dict[str, Tensor]:
    """All weights, whole, in the CPU's memory of rank 0 (elsewhere nothing); all ranks call it together."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights: dict[str, Any] = get_model_state_dict(model, options=options)
    return weights


def is_spread(value: Any) -> bool:
    """Whether it is a tensor of which each rank has a part (a DTensor, told by what only that has)."""
    return isinstance(value, Tensor) and hasattr(value, "device_mesh")


def placed_like(tensor: Tensor, like: Tensor | None) -> Tensor:
    """`tensor`, the same on all ranks, spread as `like` is, if that is spread and of the same shape."""
    if like is None or not is_spread(like) or is_spread(tensor) or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def plain(value: Any) -> Any:
    """A tensor that is the same on all ranks, out of its spread form."""
    return value.full_tensor() if is_spread(value) else value


def local(value: Any) -> Tensor:
    """This rank's part of a tensor, all of it if it is not spread."""
    part: Tensor = value.to_local() if is_spread(value) else value
    return part


def together(job: Callable[[], object] | None, group: dist.ProcessGroup) -> None:
    """Do a writing job on rank 0 and share its outcome: DiskError on all ranks of `group` if it fails there.

    The savers of all ranks must succeed and fail alike, or one of them would try again what others are done with.
    """
    outcome: list[DiskError | None] = [None]
    if job is not None:
        try:
            job()
        except DiskError as error:
            outcome[0] = error
    dist.broadcast_object_list(outcome, src=0, group=group)
    if outcome[0] is not None:
        raise outcome[0]


def save_spread(folder: Path, checkpoint: Checkpoint, *, keep: int, group: dist.ProcessGroup) -> None:
    """`save_checkpoint` by all ranks of `group` together, each writing its parts. DiskError on all if one fails."""
    from mixlab.checkpoint.sharded import write_shards

    tensors = {
        f"{file}.{name}": tensor
        for file, values in checkpoint.tensors.items()
        for name, tensor in values.items()
    }

    def write_parts(place: tuple[int, Path] | None) -> None:
        box = [place]
        dist.broadcast_object_list(box, src=0, group=group)
        if box[0] is None:
            return
        step, temporary = box[0]
        if step != checkpoint.step:
            raise RuntimeError(f"rank 0 saves step {step}, and rank {dist.get_rank()} step {checkpoint.step}")
        write_shards(temporary, tensors, group)

    def save() -> None:
        has_told = False

        def tell(temporary: Path) -> None:
            nonlocal has_told
            has_told = True
            write_parts((checkpoint.step, temporary))

        try:
            save_checkpoint(folder, replace(checkpoint, tensors={}), keep=keep, write_parts=tell)
        finally:
            if not has_told:  # it was there already, or its folder could not be made
                write_parts(None)

    if dist.get_rank() == 0:
        together(save, group)
    else:
        with contextlib.suppress(OSError):  # rank 0 fails with it, and tells
            write_parts(None)
        together(None, group)
