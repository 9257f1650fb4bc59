"""How a model lies on the processes of a training, and how the gradient of a batch comes of those of its parts."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mixlab.checkpoint.checkpoints import Checkpoint, save_checkpoint

Job = Callable[[], object]


class Exchange:
    """One process that has the whole batch. Others override what is different with them.

    Every process calls the same, in the same order.

    num_shards: of each batch, of which each process has its share. scale: that losses need, where a mean over
    processes is taken for a sum. needs_every_part: all must cut their images into equally many parts. needs_blank:
    who has no image computes an empty one, for whose gradient others may wait. is_within_passes: gradients are
    exchanged while torch computes them, so that no other engine, and no climb of one shard alone, can do it.
    needs_all_ranks: each process holds a part of every weight; a model is called, saved and read by all at once.
    module: what runs forward, once there is a model.
    """

    num_shards = 1
    scale = 1.0
    needs_every_part = False
    needs_blank = True
    is_within_passes = False
    needs_all_ranks = False
    module: Any

    def check(self, model: nn.Module, recipe: Any) -> None:
        """UsageError if the model cannot be trained so."""

    def place(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The model where it is trained."""
        return model.to(device)

    def attach(self, model: nn.Module, device: torch.device) -> None:
        """Let `model`, which is placed, be the one whose gradients are meant."""
        self.module = model

    def begin(self) -> None:
        """A batch begins; whatever was left of another is forgotten."""

    def part(self, is_last: bool) -> AbstractContextManager[object]:
        """Around the computing of a part. is_last: of a shard."""
        return nullcontext()

    def end_shard(self) -> None:
        """The model's gradient is that of one more shard."""

    def finish(self) -> None:
        """Let the model's gradient be that of the batch."""

    def full_state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """All weights of a placed model; on rank 0 whole."""
        state: dict[str, Tensor] = model.state_dict()
        return state

    def begin_saving(self, timeout_seconds: float) -> None:
        """Files will be written, from a thread of their own. timeout_seconds: how long one may wait for others."""

    def writing(self, job: Job | None) -> Job | None:
        """What this process does while `job` is written, which only rank 0 has; None for nothing."""
        return job

    def save(self, folder: Path, checkpoint: Checkpoint, *, keep: int) -> None:
        """Write a checkpoint, see `save_checkpoint`; by all ranks at once where all have parts of it."""
        save_checkpoint(folder, checkpoint, keep=keep)
