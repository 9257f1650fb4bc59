"""Random numbers as a pure function of (seed, epoch, index, purpose): Philox 4x32-10, vectorised.

A counter-based generator (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") has no state
to save: any worker, rank or restart that asks for the same image in the same epoch gets the same draws.
"""

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What a draw is for. The numbers are part of every run's results: never renumber, only add."""

    ORDER = 1
    CROP = 2
    FLIP = 3
    ERASE = 4
    POLICY = 5
    SPLIT = 6
    PERMUTATION = 7
    # Draws that belong to a batch: epoch is the step, index the virtual shard.
    MIX = 32
    MODEL = 33


_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def philox4x32(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Ten rounds of Philox: counter uint32 (..., 4), key two 32-bit words -> uint32 (..., 4)."""
    c0, c1, c2, c3 = (counter[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = key
    for _ in range(10):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product1 >> _SHIFT) ^ c1 ^ np.uint64(k0),
            product1 & _LOW,
            (product0 >> _SHIFT) ^ c3 ^ np.uint64(k1),
            product0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def uniform(seed: int, epoch: int, index: np.ndarray, purpose: Purpose, count: int) -> np.ndarray:
    """float64 (n, count) in [0, 1): `count` draws for each of the n entries of `index` (integers < 2^32)."""
    index = np.asarray(index)
    num_blocks = -(-count // 4)
    counter = np.empty((len(index), num_blocks, 4), dtype=np.uint32)
    counter[..., 0] = index[:, None]
    counter[..., 1] = epoch
    counter[..., 2] = np.arange(num_blocks)
    counter[..., 3] = purpose
    bits = philox4x32(counter, (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))
    return bits.reshape(len(index), 4 * num_blocks)[:, :count] * 2.0**-32


def torch_seed(seed: int, step: int, shard: int) -> int:
    """Seed for torch's global generator in one step: stochastic depth and dropout draw from that."""
    bits = philox4x32(
        np.array([shard, step, 0, Purpose.MODEL], dtype=np.uint32), (seed & 0xFFFFFFFF, seed >> 32)
    )
    return int(bits[0]) << 31 ^ int(bits[1])


def epoch_order(seed: int, epoch: int, num_images: int) -> np.ndarray:
    """int64 (num_images,): the order in which `epoch` visits the training images."""
    draws = uniform(seed, epoch, np.arange(num_images), Purpose.ORDER, 1)[:, 0]
    return np.argsort(draws, kind="stable")
