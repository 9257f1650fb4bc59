"""The model is on every process; gradients are averaged while the last part is computed (torch's DDP)."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mixlab.training.distributed import World


class Ddp:
    is_spread, needs_every_part, needs_blank = False, False, True

    def __init__(self, model: nn.Module, device: torch.device, world: World) -> None:
        self.num_shards = world.size
        self.scale = float(world.size)
        devices = [device.index] if device.type == "cuda" else None
        self.module = DistributedDataParallel(model, device_ids=devices)

    def begin(self) -> None:
        pass

    def part(self, is_last: bool) -> AbstractContextManager[object]:
        return nullcontext() if is_last else self.module.no_sync()

    def end_shard(self) -> None:
        pass

    def finish(self) -> None:
        pass
