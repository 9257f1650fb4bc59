"""Read every example of a source once, and say what is unreadable, uneven, there twice or contradictory."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mixlab.data.copies import near_pairs
from mixlab.data.dataset import Source, Split
from mixlab.data.modality import Modality
from mixlab.data.reading import look_at
from mixlab.errors import ExampleError

NUM_PAIRS = 20  # of examples nearly alike, that are listed
_BATCH = 1024  # examples handed to the threads at a time, so that memory does not grow with the source


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """What `check` found.

    num_ok, num_bad: they sum to the number of examples; `bad` has path and reason of each unreadable one.
    classes: readable examples by class name and split.
    duplicates: identical examples that lie in more than one split, as {paths, splits}.
    duplicates_within: identical examples inside one split, as {paths, split}; num_duplicates_within: how many could
        go, with one of each kept.
    conflicts: identical examples with different labels, as {paths, labels}.
    num_near_copies: examples that are nearly like another one without being the same; near_copies: some pairs of
        them, as {paths, splits}. Only where the modality has a hash for it.
    skipped: what is left out, as {reason, count, examples}.
    facts: what the modality says of all of them (`Modality.summarize`), by name.
    """

    num_ok: int
    num_bad: int
    bad: list[dict[str, str]]
    classes: dict[str, dict[str, int]]
    duplicates: list[dict[str, list[str]]]
    duplicates_within: list[dict[str, Any]]
    num_duplicates_within: int
    conflicts: list[dict[str, list[str]]]
    num_near_copies: int
    near_copies: list[dict[str, list[str]]]
    skipped: list[dict[str, Any]]
    facts: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The fields as a plain dict, the facts among them."""
        values = asdict(self)
        return values | values.pop("facts")


@dataclass(frozen=True)
class _Seen:
    """One readable example."""

    digest: str
    near: int | None
    facts: dict[str, Any]


def check(source: Source, *, progress: Callable[[int, int], None] | None = None) -> CheckResult:
    """Decode every example fully; `progress` is called with (examples done, examples in all)."""
    total, modality = len(source), source.modality
    done = 0
    bad: list[dict[str, str]] = []
    classes = {name: dict.fromkeys(source.splits, 0) for name in source.class_names}
    facts: list[dict[str, Any]] = []
    places: dict[str, list[tuple[str, int]]] = {}  # digest -> (split, index) of its examples
    hashes: dict[int, list[tuple[str, int]]] = {}  # the same by hash, where copies have the same
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for split_name, split in source.splits.items():
            for start in range(0, len(split), _BATCH):
                batch = range(start, min(start + _BATCH, len(split)))
                found = pool.map(lambda i, s=split: _see(s, i, modality), batch)
                for i, seen in zip(batch, found, strict=True):
                    done += 1
                    if isinstance(seen, str):
                        bad.append({"path": split.names[i], "reason": seen})
                        continue
                    classes[source.class_names[split.labels[i]]][split_name] += 1
                    facts.append(seen.facts)
                    group = places.setdefault(seen.digest, [])
                    if not group and seen.near is not None:
                        hashes.setdefault(seen.near, []).append((split_name, i))
                    group.append((split_name, i))
                if progress:
                    progress(done, total)
    groups = [group for group in places.values() if len(group) > 1]
    num_near, near = _near_copies(source, hashes)
    return CheckResult(
        num_ok=total - len(bad),
        num_bad=len(bad),
        bad=bad,
        classes=classes,
        duplicates=[
            {"paths": _paths(source, group), "splits": [name for name, _ in group]}
            for group in groups
            if len({name for name, _ in group}) > 1
        ],
        duplicates_within=[
            {"paths": _paths(source, inside), "split": name}
            for group in groups
            for name in source.splits
            if len(inside := [place for place in group if place[0] == name]) > 1
        ],
        num_duplicates_within=sum(len(group) - len({name for name, _ in group}) for group in groups),
        conflicts=[
            {"paths": _paths(source, group), "labels": labels}
            for group in groups
            if len(set(labels := [source.class_names[source.splits[s].labels[i]] for s, i in group])) > 1
        ],
        num_near_copies=num_near,
        near_copies=near,
        skipped=[one.to_json() for one in source.skipped],
        facts=modality.summarize(facts),
    )


def _see(split: Split, index: int, modality: Modality) -> _Seen | str:
    """The example, or the reason why it cannot be read."""
    try:
        content = split.read(index) if split.arrays is None else None
        look = look_at(split, index, modality) if content is None else modality.look(content)
        facts = modality.describe(content, look)
    except ExampleError as error:
        return error.message
    return _Seen(look.digest, modality.near_hash(look.example), facts)


def _near_copies(
    source: Source, hashes: dict[int, list[tuple[str, int]]]
) -> tuple[int, list[dict[str, list[str]]]]:
    """How many examples are nearly like another, and some pairs of them, those in two splits first."""
    values = list(hashes)
    pairs = [(group[0], other) for group in hashes.values() for other in group[1:]]
    alike = {place for group in hashes.values() if len(group) > 1 for place in group}
    for one, other in near_pairs(np.array(values, dtype=np.uint64)).tolist():
        pairs.append((hashes[values[one]][0], hashes[values[other]][0]))
        alike.update(hashes[values[one]], hashes[values[other]])
    pairs.sort(key=lambda pair: pair[0][0] == pair[1][0])
    shown = [
        {"paths": _paths(source, list(pair)), "splits": [pair[0][0], pair[1][0]]}
        for pair in pairs[:NUM_PAIRS]
    ]
    return len(alike), shown


def _paths(source: Source, group: list[tuple[str, int]]) -> list[str]:
    """The names of a group; `index 5` alone says too little where there are several splits."""
    return [
        source.splits[s].names[i] if source.splits[s].has_files else f"{s} {source.splits[s].names[i]}"
        for s, i in group
    ]
