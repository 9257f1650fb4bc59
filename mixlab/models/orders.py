"""Patches and pixels of a Mixer's weights in another order: the parts of what permutation.py and a family absorb."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mixlab.errors import UsageError


def check_order(what: str, order: np.ndarray, length: int) -> None:
    """UsageError if `order` is no permutation of so many positions. what: its name in messages."""
    if not np.array_equal(np.sort(order), np.arange(length)):
        raise UsageError(f"{what} is no permutation of {length} positions", where="model")


@torch.no_grad()
def reorder_pixels(stem: nn.Conv2d, pixel_order: np.ndarray) -> None:
    """Let `stem` read pixel i of every patch where pixel_order[i] was."""
    check_order("pixel_order", pixel_order, stem.weight[0, 0].numel())
    pixels = torch.from_numpy(pixel_order)
    stem.weight.copy_(stem.weight.flatten(2)[:, :, pixels].view_as(stem.weight))


def reorder_tokens(mixing: torch.nn.Module, order: Tensor) -> None:
    """The token MLP for tokens in another order."""
    fc1, fc2 = mixing.fc1, mixing.fc2
    fc1.weight.copy_(fc1.weight[:, order])  # type: ignore[operator, union-attr, index]
    fc2.weight.copy_(fc2.weight[order])  # type: ignore[operator, union-attr, index]
    fc2.bias.copy_(fc2.bias[order])  # type: ignore[operator, union-attr, index]


@torch.no_grad()
def absorb_flat(model: Any, patch_order: np.ndarray, pixel_order: np.ndarray) -> None:
    """`Family.absorb` of a plain Mixer: it knows patches by their number alone, so any order will do."""
    check_order("patch_order", patch_order, model.config.num_patches)
    reorder_pixels(model.stem, pixel_order)
    for block in model.blocks:
        reorder_tokens(block.token_mixing, torch.from_numpy(patch_order))
