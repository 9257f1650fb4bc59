"""Less memory in training: blocks keep their inputs only and are computed again on the way back."""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mixlab.errors import UsageError
from mixlab.models.mixer import Mixer


def checkpoint_blocks(model: nn.Module) -> None:
    """Switch gradient checkpointing on (Chen et al. 2016, arXiv 1604.06174); training keeps its bits.

    UsageError for a model whose blocks cannot be computed again.
    """
    if isinstance(model, Mixer):
        model.checkpoint_blocks = True
        return
    try:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AttributeError, AssertionError):  # timm's models either lack it or assert that it stays off
        raise UsageError(
            "the blocks of this model cannot be computed again",
            where="checkpoint_blocks",
            hint="leave it out; --accumulate N needs less memory too",
        ) from None
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.register_forward_pre_hook(partial(_count_once, module.momentum))


def _count_once(momentum: float | None, module: Any, _: Any) -> None:
    """Before a batch normalisation: its running statistics take a batch once, not again in the backward pass."""
    is_again = torch._C._current_graph_task_id() != -1
    module.momentum = 0.0 if is_again else momentum
    if is_again and module.training and module.num_batches_tracked is not None:
        module.num_batches_tracked.sub_(1)  # to which the module adds one
