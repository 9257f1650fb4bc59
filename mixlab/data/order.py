"""Which images a step takes: a pure function of (seed, step), whatever came before."""

from typing import Any

import numpy as np

from mixlab.data.random import epoch_order


def steps_per_epoch(num_images: int, batch_size: int) -> int:
    """Full batches in one epoch; a training set smaller than a batch is one batch."""
    return max(num_images // batch_size, 1)


def batch_indices(
    num_images: int,
    batch_size: int,
    *,
    seed: int,
    step: int,
    rows: np.ndarray | None = None,
    window: int = 0,
) -> tuple[int, np.ndarray]:
    """The epoch that `step` (from 0) belongs to, and the numbers of its images.

    rows, window: where each image is in its source, which is read `window` rows at a time, one window after the
    other; images are then shuffled within their window only. 0 shuffles all of them.
    """
    per_epoch = steps_per_epoch(num_images, batch_size)
    epoch, position = divmod(step, per_epoch)
    order = _cached_order(seed, epoch, num_images, rows, window)
    return epoch, order[position * batch_size : (position + 1) * batch_size]


_order_cache: dict[tuple[int, ...], tuple[np.ndarray, Any]] = {}


def _cached_order(seed: int, epoch: int, num_images: int, rows: np.ndarray | None, window: int) -> np.ndarray:
    key = (seed, epoch, num_images, window, id(rows))  # `rows` is kept below, so its id stays its own
    if key not in _order_cache:
        _order_cache.clear()  # one epoch at a time: the order of ImageNet is 10 MB
        order = epoch_order(seed, epoch, num_images)
        if window and rows is not None:
            order = order[np.argsort(rows[order] // window, kind="stable")]
        _order_cache[key] = (order, rows)
    return _order_cache[key][0]
