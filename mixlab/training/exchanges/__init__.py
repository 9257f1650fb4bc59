"""How the gradient of a batch comes of those of its parts: here alone, or with other processes."""

from contextlib import AbstractContextManager
from typing import Protocol

from torch import nn


class Exchange(Protocol):
    """What happens between the parts of a batch. Every process calls the same, in the same order.

    num_shards: of each batch, of which each process has its share. scale: that losses need, where a mean over
    processes is taken for a sum. is_spread: each process holds a part of every weight.
    needs_every_part: all must cut their images into equally many parts. needs_blank: who has no image computes an
    empty one, for whose gradient others may wait.
    """

    num_shards: int
    scale: float
    is_spread: bool
    needs_every_part: bool
    needs_blank: bool

    @property
    def module(self) -> nn.Module:
        """What runs forward."""
        ...

    def begin(self) -> None:
        """A batch begins; whatever was left of another is forgotten."""

    def part(self, is_last: bool) -> AbstractContextManager[object]:
        """Around the computing of a part. is_last: of a shard."""
        ...

    def end_shard(self) -> None:
        """The model's gradient is that of one more shard."""

    def finish(self) -> None:
        """Let the model's gradient be that of the batch."""
