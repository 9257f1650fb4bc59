"""Mixup and CutMix: a batch of model inputs mixed with itself, and its targets with it."""

from typing import Any

import numpy as np
from torch import Tensor

from mixlab.data.random import Purpose, uniform


def mix(
    image: Tensor, target: Tensor, config: Any, *, seed: int, step: int, shard: int
) -> tuple[Tensor, Tensor]:
    """Mixup (Zhang et al. 2018) or CutMix (Yun et al. 2019) of a batch with its own roll by one.

    config: a recipe's `augment`. image float (B, channels, H, W), target float (B, ...), whatever belongs to each ->
    both mixed. One lambda per batch, at least 1/2 and the partner the next image, as the authors' code has them.
    """
    if not config.mixup_alpha and not config.cutmix_alpha:
        return image, target
    use_cutmix = config.cutmix_alpha > 0
    draws = uniform(seed, step, np.array([shard]), Purpose.MIX, 4)[0]
    if use_cutmix and config.mixup_alpha:
        use_cutmix = draws[0] < 0.5
    alpha = config.cutmix_alpha if use_cutmix else config.mixup_alpha
    share = _beta(alpha, int(draws[1] * 2**32))
    share = max(share, 1 - share)
    if use_cutmix:
        height, width = image.shape[2:]
        box_height, box_width = (round(side * (1 - share) ** 0.5) for side in (height, width))
        top = int(draws[2] * (height - box_height + 1))
        left = int(draws[3] * (width - box_width + 1))
        image = image.clone()
        rows, columns = slice(top, top + box_height), slice(left, left + box_width)
        image[:, :, rows, columns] = image[:, :, rows, columns].roll(1, dims=0)
        share = 1 - box_height * box_width / (height * width)
    else:
        image = share * image + (1 - share) * image.roll(1, dims=0)
    return image, share * target + (1 - share) * target.roll(1, dims=0)


def _beta(alpha: float, seed: int) -> float:
    return float(np.random.Generator(np.random.Philox(seed)).beta(alpha, alpha))
