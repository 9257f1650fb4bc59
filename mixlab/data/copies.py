"""The same example twice: what copies mean for splits and labels, and near copies."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mixlab.language import tell, word

NUM_EXAMPLES = 5
NEAR_BITS = 3  # of 64, in which the hashes of two examples nearly alike differ at most
_BAND_BITS = 16  # two hashes that differ in NEAR_BITS agree in one of these bands


def copy_groups(digests: Sequence[str]) -> np.ndarray | None:
    """int64 (n,): the same number for examples with the same digest; None where no two are copies.

    An empty digest is of an example that is not known; it is nobody's copy.
    """
    known: dict[str, int] = {}
    groups = np.arange(len(digests), dtype=np.int64)
    for index, digest in enumerate(digests):
        if digest:
            groups[index] = known.setdefault(digest, index)
    return groups if (groups != np.arange(len(digests))).any() else None


@dataclass(frozen=True, kw_only=True)
class Copies:
    """Exact copies among the examples of a training.

    num_in_train: examples of each other split that are in train too. num_within: further copies inside one split.
    num_conflicts: examples that stand under more than one label. examples: some groups, as {paths, splits, labels}.
    num_unknown: examples that were not compared, since a stream is not read beforehand.
    """

    num_in_train: dict[str, int]
    num_within: int
    num_conflicts: int
    num_unknown: int
    examples: list[dict[str, list[str]]]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def sentences(self, one: str = "image", many: str = "images") -> list[str]:
        """What a person should know before trusting a figure; empty where all is well. one, many: their names."""
        found = []
        for split, count in self.num_in_train.items():
            if count:
                found.append(
                    tell(
                        "also in train: {n:,} {many} of the {split} split; figures on {split} are too good",
                        n=count,
                        many=one if count == 1 else many,
                        split=word(split),
                    )
                )
        if self.num_conflicts:
            found.append(
                tell(
                    "under more than one label: {n:,} {many}",
                    n=self.num_conflicts,
                    many=one if self.num_conflicts == 1 else many,
                )
            )
        if found and self.examples:
            found[-1] += tell(" (such as {paths})", paths=" = ".join(self.examples[0]["paths"][:3]))
        return found


def find_copies(
    names: Mapping[str, Sequence[str]],
    labels: Mapping[str, Sequence[str]],
    digests: Mapping[str, Sequence[str]],
) -> Copies:
    """Copies among splits, each given as names, labels and digests of its examples, in the same order."""
    places: dict[str, list[tuple[str, int]]] = {}
    num_unknown = 0
    for split, of_split in digests.items():
        for index, digest in enumerate(of_split):
            if digest:
                places.setdefault(digest, []).append((split, index))
            else:
                num_unknown += 1
    groups = [group for group in places.values() if len(group) > 1]
    num_in_train = dict.fromkeys((split for split in digests if split != "train"), 0)
    num_within = num_conflicts = 0
    examples: list[dict[str, list[str]]] = []
    for group in groups:
        splits = {split for split, _ in group}
        num_within += len(group) - len(splits)
        is_conflict = len({labels[split][index] for split, index in group}) > 1
        num_conflicts += len(group) if is_conflict else 0
        for split, _ in group:
            if split != "train" and "train" in splits:
                num_in_train[split] += 1
        if (is_conflict or len(splits) > 1) and len(examples) < NUM_EXAMPLES:
            examples.append(
                {
                    "paths": [names[split][index] for split, index in group],
                    "splits": [split for split, _ in group],
                    "labels": [labels[split][index] for split, index in group],
                }
            )
    return Copies(
        num_in_train=num_in_train,
        num_within=num_within,
        num_conflicts=num_conflicts,
        num_unknown=num_unknown,
        examples=examples,
    )


def near_pairs(hashes: np.ndarray) -> np.ndarray:
    """int64 (n, 2): index pairs of different uint64 hashes that differ in NEAR_BITS at most, each pair once."""
    found = []
    for shift in range(0, 64, _BAND_BITS):
        band = (hashes >> np.uint64(shift)) & np.uint64((1 << _BAND_BITS) - 1)
        order = np.argsort(band, kind="stable")
        ends = np.flatnonzero(np.diff(band[order])) + 1
        for members in np.split(order, ends):
            for row, first in enumerate(members[:-1]):
                others = members[row + 1 :]
                bits = np.bitwise_count(hashes[others] ^ hashes[first])
                near = others[(bits <= NEAR_BITS) & (hashes[others] != hashes[first])]
                if len(near):
                    found.append(np.sort(np.column_stack([np.full(len(near), first), near]), axis=1))
    return np.unique(np.concatenate(found), axis=0) if found else np.zeros((0, 2), dtype=np.int64)
