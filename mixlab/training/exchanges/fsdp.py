"""Each process holds a part of every weight, gathered where it is needed (torch's FSDP2)."""

from contextlib import AbstractContextManager, nullcontext

from torch import nn

from mixlab.training.distributed import World


class Fsdp:
    is_spread, needs_every_part, needs_blank = True, True, True

    def __init__(self, model: nn.Module, world: World) -> None:
        """model: spread already."""
        self.num_shards = world.size
        self.scale = float(world.size)
        self.module = model

    def begin(self) -> None:
        pass

    def part(self, is_last: bool) -> AbstractContextManager[object]:
        self.module.set_requires_gradient_sync(is_last)  # type: ignore[operator]
        return nullcontext()

    def end_shard(self) -> None:
        pass

    def finish(self) -> None:
        pass
