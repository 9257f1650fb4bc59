"""Which image goes into which split: stratified, and the same on every machine and library version."""

from collections.abc import Sequence

import numpy as np

from mixlab.errors import UsageError


def stratified_split(
    labels: np.ndarray, fractions: Sequence[float], seed: int, groups: np.ndarray | None = None
) -> list[np.ndarray]:
    """Sorted indices for each of `fractions`, which sum to 1.

    Each class is within one image of its share in every part. A class with at least as many images as there
    are parts has one in each; a smaller one has one in the first part before any other. groups: int64 (n,); images
    with the same number stay in one part, so that a class may be off by the size of such a group.
    """
    if not fractions or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise UsageError(f"the fractions of a split must be 0 or more and sum to 1, not {list(fractions)}")
    shares = np.asarray(fractions, dtype=np.float64)
    parts: list[list[np.ndarray]] = [[] for _ in fractions]
    wanted: list[np.ndarray] = []  # images of each class in each part
    classes = _classes(labels, seed)
    for members in classes:
        least = (shares > 0).astype(np.int64)
        if least.sum() > len(members):
            least = np.zeros_like(least)
            least[np.argmax(shares > 0)] = 1
        most = np.where(shares > 0, len(members), 0)
        wanted.append(_apportion(shares * len(members), len(members), least, most))
    if groups is not None:
        return _share_out(labels, wanted, groups, seed)
    for members, sizes in zip(classes, wanted, strict=True):
        for part, indices in zip(parts, np.split(members, np.cumsum(sizes)[:-1]), strict=True):
            part.append(indices)
    return [np.sort(np.concatenate([np.zeros(0, np.int64), *part])) for part in parts]


def hold_out(
    labels: np.ndarray, fraction: float, at_most: int, seed: int, groups: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(rest, held): sorted indices; `held` has min(round(fraction * n), at_most) images, stratified.

    Fewer where that would take the last image of a class from the rest. groups: as for `stratified_split`.
    """
    if not 0 <= fraction <= 1 or at_most < 0:
        raise UsageError(f"cannot hold out a fraction of {fraction} and at most {at_most} images")
    classes = _classes(labels, seed)
    # In a drawn order, so that with fewer held images than classes it is not always the first that give.
    classes = [classes[i] for i in _shuffled(len(classes), seed)]
    counts = np.array([len(members) for members in classes], dtype=np.int64)
    total = min(round(fraction * len(labels)), at_most, int(counts.sum()) - len(counts))
    sizes = _apportion(counts * (total / max(len(labels), 1)), total, np.zeros_like(counts), counts - 1)
    if groups is not None:
        by_label = sorted(zip(classes, sizes, strict=True), key=lambda pair: int(labels[pair[0][0]]))
        wanted = [np.array([len(members) - size, size]) for members, size in by_label]
        rest_part, held_part = _share_out(labels, wanted, groups, seed)
        return rest_part, held_part
    held = [members[:size] for members, size in zip(classes, sizes, strict=True)]
    rest = [members[size:] for members, size in zip(classes, sizes, strict=True)]
    empty = np.zeros(0, np.int64)
    return np.sort(np.concatenate([empty, *rest])), np.sort(np.concatenate([empty, *held]))


def _share_out(
    labels: np.ndarray, wanted: Sequence[np.ndarray], groups: np.ndarray, seed: int
) -> list[np.ndarray]:
    """Sorted indices of each part: whole groups, as near to `wanted` (images of each class in each part) as they go.

    Large groups first, each to the part that lacks most of its classes; those of one image then fill up what is left.
    """
    _, class_numbers = np.unique(labels, return_inverse=True)
    lacking = np.array(wanted, dtype=np.int64)
    order = _shuffled(len(labels), seed)
    _, first, group_numbers = np.unique(groups[order], return_index=True, return_inverse=True)
    members = np.split(
        order[np.argsort(group_numbers, kind="stable")], np.cumsum(np.bincount(group_numbers))[:-1]
    )
    # Within a size in the drawn order.
    by_size = sorted(range(len(members)), key=lambda g: (-len(members[g]), first[g]))
    parts: list[list[np.ndarray]] = [[] for _ in range(lacking.shape[1])]
    possible = lacking.sum(axis=0) > 0
    for group in by_size:
        counts = np.bincount(class_numbers[members[group]], minlength=len(lacking))
        part = int(np.argmax(np.where(possible, counts @ lacking, np.iinfo(np.int64).min)))
        lacking[:, part] -= counts
        parts[part].append(members[group])
    empty = np.zeros(0, np.int64)
    return [np.sort(np.concatenate([empty, *part])) for part in parts]


def _shuffled(n: int, seed: int) -> np.ndarray:
    """A permutation of n: the raw bits of a bit generator never change between versions, shuffles may."""
    return np.argsort(np.random.Philox(key=seed).random_raw(n), kind="stable")


def _classes(labels: np.ndarray, seed: int) -> list[np.ndarray]:
    """The indices of each class that occurs, in shuffled order."""
    order = _shuffled(len(labels), seed)
    by_class = order[np.argsort(labels[order], kind="stable")]
    starts = np.flatnonzero(np.diff(labels[by_class])) + 1
    return np.split(by_class, starts) if len(labels) else []


def _apportion(quotas: np.ndarray, total: int, least: np.ndarray, most: np.ndarray) -> np.ndarray:
    """Whole numbers near `quotas`, within the bounds, that sum to `total`: largest remainders first."""
    sizes = np.clip(np.floor(quotas).astype(np.int64), least, most)
    while sizes.sum() < total:
        sizes[np.argmax(np.where(sizes < most, quotas - sizes, -np.inf))] += 1
    while sizes.sum() > total:
        sizes[np.argmin(np.where(sizes > least, quotas - sizes, np.inf))] -= 1
    return sizes
