"""Hidden units of a token-mixing MLP as images of the grid of patches: how regular they are, in numbers."""

from dataclasses import dataclass

import numpy as np

OPPOSED = 0.8  # a unit has an opposite partner if another's cosine with it is below minus this


@dataclass(frozen=True)
class LayerNumbers:
    """Of the hidden units of one token-mixing MLP; every number is a mean over its units, or a share of them.

    opposed: share with a partner whose cosine is below -0.8. mutual_pairs: how many pairs of units are each other's
    nearest opposite, and below -0.8. frequency: centre of the power spectrum, cycles a patch; 0 is constant, 0.5
    changes sign from patch to patch. spread: distance of the squared weights from their centre, root mean square,
    over what equal weights would have: 1 is everywhere, 0 a single patch.
    """

    units: int
    opposed: float
    mutual_pairs: int
    frequency: float
    spread: float


def cosines(units: np.ndarray) -> np.ndarray:
    """(D, D): cosine of each two of the rows (D, S); 0 for a row of zeros, and on the diagonal."""
    length = np.linalg.norm(units, axis=1, keepdims=True)
    unit = units / np.where(length == 0, 1, length)
    found = unit @ unit.T
    np.fill_diagonal(found, 0)
    return np.asarray(found)


def frequencies(units: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """(D,): the centre of the power spectrum of each unit's image over the radius, in cycles a patch."""
    power = np.abs(np.fft.fft2(units.reshape(-1, *grid))) ** 2
    rows, columns = (np.fft.fftfreq(side) for side in grid)
    radius = np.hypot(rows[:, None], columns[None, :])
    total = power.sum(axis=(1, 2))
    return np.asarray((power * radius).sum(axis=(1, 2)) / np.where(total == 0, 1, total))


def spreads(units: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """(D,): how far a unit's squared weights are from their centre, as a share of what equal weights have."""
    weight = units.reshape(-1, *grid) ** 2
    total = weight.sum(axis=(1, 2))
    weight = weight / np.where(total == 0, 1, total)[:, None, None]
    places = np.meshgrid(*(np.arange(side, dtype=np.float64) for side in grid), indexing="ij")
    variance = sum(
        (weight * place**2).sum(axis=(1, 2)) - (weight * place).sum(axis=(1, 2)) ** 2 for place in places
    )
    return np.asarray(np.sqrt(np.maximum(variance, 0) / sum(place.var() for place in places)))


def measure(units: np.ndarray, grid: tuple[int, int]) -> LayerNumbers:
    """All numbers of the units (D, S) of a layer."""
    cosine = cosines(units)
    nearest, lowest = cosine.argmin(axis=1), cosine.min(axis=1)
    has_partner = lowest < -OPPOSED
    mutual = has_partner & (nearest[nearest] == np.arange(len(units)))
    return LayerNumbers(
        units=len(units),
        opposed=float(has_partner.mean()),
        mutual_pairs=int(mutual.sum()) // 2,
        frequency=float(frequencies(units, grid).mean()),
        spread=float(spreads(units, grid).mean()),
    )


def paired(units: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """(D // 2, 2): each unit with its closest inverse, the closest first taken, in order of frequency, low first."""
    cosine = cosines(units)
    order = np.argsort(cosine, axis=None, kind="stable")
    free, pairs = np.ones(len(units), dtype=bool), []
    for flat in order:
        a, b = divmod(int(flat), len(units))
        if a != b and free[a] and free[b]:
            free[[a, b]] = False
            pairs.append((a, b))
    found = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return found[np.argsort(frequencies(units, grid)[found].mean(axis=1), kind="stable")]


def shuffled(units: np.ndarray, seed: int) -> np.ndarray:
    """Each unit's own weights in an order of its own."""
    return np.random.default_rng(seed).permuted(units, axis=1)
