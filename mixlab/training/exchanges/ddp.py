"""The model is on every process; gradients are averaged while the last part is computed (torch's DDP)."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mixlab.training.distributed import World
from mixlab.training.exchanges import Exchange


class Ddp(Exchange):
    is_within_passes = True

    def __init__(self, world: World) -> None:
        self.num_shards = world.size
        self.scale = float(world.size)

    def attach(self, model: nn.Module, device: torch.device) -> None:
        devices = [device.index] if device.type == "cuda" else None
        self.module = DistributedDataParallel(model, device_ids=devices)

    def part(self, is_last: bool) -> AbstractContextManager[object]:
        return nullcontext() if is_last else self.module.no_sync()
