"""Gradients of several shards of a batch, summed so that the sum has the same bits on any number of processes."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mixlab.errors import UsageError
from mixlab.training.distributed import World
from mixlab.training.exchanges import Exchange

CHUNK = 1 << 20  # numbers exchanged at a time: bounds the memory to this times the number of shards


class Exact(Exchange):
    """The sum of the gradients of `num_shards` shards, always taken in the order of the shards.

    Floating-point addition is not associative: an all-reduce of W ranks gives other last bits for every W. Here each
    shard's gradient is computed alone, and every rank adds all of them from left to right.
    """

    needs_blank = False

    def __init__(self, world: World, num_shards: int) -> None:
        self._world, self.num_shards = world, num_shards
        self._rows: list[Tensor] = []

    def check(self, model: nn.Module, recipe: Any) -> None:
        if any(isinstance(module, _BatchNorm) for module in model.modules()):
            raise UsageError(
                "the running statistics of batch normalisation depend on how a batch is shared out",
                where="virtual_shards",
                hint="use a model without batch normalisation, or leave --virtual-shards out",
            )

    def attach(self, model: nn.Module, device: torch.device) -> None:
        self.module = model
        self._parameters = [p for p in model.parameters() if p.requires_grad]

    def begin(self) -> None:
        """Forget the shards of a step that was given up."""
        self._rows = []

    def end_shard(self) -> None:
        """Take the gradients that the model has now as those of this rank's next shard."""
        flat = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        row = torch.cat([gradient.reshape(-1) for gradient in flat])
        for parameter in self._parameters:
            parameter.grad = None
        if self._world.size == 1 and self._rows:
            self._rows[0] += row  # the same additions in the same order, without keeping the rows
        else:
            self._rows.append(row)

    def finish(self) -> None:
        """Give the model the sum over all shards of all ranks as its gradient."""
        total = self._rows[0] if self._world.size == 1 else self._exchange(torch.stack(self._rows))
        for parameter, part in zip(
            self._parameters, total.split([p.numel() for p in self._parameters]), strict=True
        ):
            parameter.grad = part.view_as(parameter)

    def _exchange(self, rows: Tensor) -> Tensor:
        """(own shards, P) -> (P,)."""
        counts = [
            len(World(rank, self._world.size).share(self.num_shards)) for rank in range(self._world.size)
        ]
        total = torch.empty_like(rows[0])
        for start in range(0, rows.shape[1], CHUNK):
            part = rows[:, start : start + CHUNK]
            own = part.new_zeros(max(counts), part.shape[1])
            own[: len(part)] = part
            everyone = [torch.empty_like(own) for _ in counts]
            dist.all_gather(everyone, own)
            shards = torch.cat([theirs[:count] for theirs, count in zip(everyone, counts, strict=True)])
            chunk = shards[0].clone()
            for shard in shards[1:]:
                chunk += shard
            total[start : start + CHUNK] = chunk
        return total
