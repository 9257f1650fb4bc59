"""Each process holds a part of every weight, gathered where it is needed (torch's FSDP2).

For models that do not fit on one device. What torch needs for it takes a second or two to import: only those who
spread a model wait for that.
"""

import contextlib
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mixlab.checkpoint.checkpoints import Checkpoint, save_checkpoint
from mixlab.errors import DiskError, UsageError
from mixlab.training.distributed import World
from mixlab.training.exchanges import Exchange, Job


class Fsdp(Exchange):
    needs_every_part, is_within_passes, needs_all_ranks = True, True, True

    def __init__(self, world: World) -> None:
        self.num_shards = world.size
        self.scale = float(world.size)
        self._group: Any = None  # of the threads that write

    def check(self, model: nn.Module, recipe: Any) -> None:
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

    def place(self, model: nn.Module, device: torch.device) -> nn.Module:
        shard_model(model, device)
        return model

    def part(self, is_last: bool) -> AbstractContextManager[object]:
        self.module.set_requires_gradient_sync(is_last)
        return nullcontext()

    def full_state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """All weights, whole, in the CPU's memory of rank 0 (elsewhere nothing); all ranks call it together."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights: dict[str, Any] = get_model_state_dict(model, options=options)
        return weights

    def begin_saving(self, timeout_seconds: float) -> None:
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))

    def writing(self, job: Job | None) -> Job | None:
        return partial(_together, job, self._group)

    def save(self, folder: Path, checkpoint: Checkpoint, *, keep: int) -> None:
        """`save_checkpoint` by all ranks together, each writing its parts. DiskError on all if one fails."""
        _save_parts(folder, checkpoint, keep, self._group)


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


def _together(job: Job | None, group: dist.ProcessGroup) -> None:
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


def _save_parts(folder: Path, checkpoint: Checkpoint, keep: int, group: dist.ProcessGroup) -> None:
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
        _together(save, group)
    else:
        with contextlib.suppress(OSError):  # rank 0 fails with it, and tells
            write_parts(None)
        _together(None, group)
