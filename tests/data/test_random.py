"""The counter-based generator against the published test vectors, and the properties the design rests on."""

import numpy as np
import pytest

from mixlab.data.random import Purpose, epoch_order, philox4x32, torch_seed, uniform

# Known answers of Random123 1.14 (kat_vectors): philox4x32, 10 rounds: counter, key, result.
KNOWN = [
    ([0, 0, 0, 0], (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    (
        [0xFFFFFFFF] * 4,
        (0xFFFFFFFF, 0xFFFFFFFF),
        [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
    ),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        (0xA4093822, 0x299F31D0),
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_philox_gives_the_published_answers(counter, key, result):
    assert philox4x32(np.array(counter, dtype=np.uint32), key).tolist() == result


def test_an_images_draws_do_not_depend_on_its_company():
    index = np.array([7, 0, 123456, 7])
    together = uniform(3, 2, index, Purpose.CROP, 6)
    alone = np.concatenate([uniform(3, 2, index[i : i + 1], Purpose.CROP, 6) for i in range(4)])
    assert np.array_equal(together, alone)
    assert np.array_equal(together[0], together[3])
    assert np.array_equal(together[:, :3], uniform(3, 2, index, Purpose.CROP, 3))


def test_seed_epoch_index_and_purpose_each_change_the_draws():
    index = np.arange(100)
    base = uniform(0, 0, index, Purpose.CROP, 4)
    others = [
        uniform(1, 0, index, Purpose.CROP, 4),
        uniform(2**40, 0, index, Purpose.CROP, 4),
        uniform(0, 1, index, Purpose.CROP, 4),
        uniform(0, 0, index + 100, Purpose.CROP, 4),
        uniform(0, 0, index, Purpose.FLIP, 4),
    ]
    for other in others:
        assert not np.isin(base, other).any()


def test_draws_are_uniform_and_uncorrelated():
    draws = uniform(5, 1, np.arange(100_000), Purpose.ERASE, 4)
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = np.histogram(draws[:, 2], bins=64, range=(0, 1))[0]
    chi_square = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    assert chi_square < 63 + 5 * (2 * 63) ** 0.5
    correlation = np.corrcoef(draws.T) - np.eye(4)
    assert np.abs(correlation).max() < 0.015


def test_an_epoch_visits_every_image_once_in_an_order_of_its_own():
    first, second = epoch_order(0, 0, 1000), epoch_order(0, 1, 1000)
    assert np.array_equal(np.sort(first), np.arange(1000))
    assert not np.array_equal(first, second)
    assert np.array_equal(first, epoch_order(0, 0, 1000))


def test_torch_seeds_differ_by_step_and_part():
    seeds = {torch_seed(0, step, part) for step in range(50) for part in range(4)}
    assert len(seeds) == 200
