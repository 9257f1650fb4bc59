"""Read every image of a source once, and say what is unreadable, uneven, double or contradictory."""

import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mixlab.data.copies import near_hash, near_pairs, picture_digest
from mixlab.data.dataset import Source, Split
from mixlab.data.decode import decode_deep, describe, grey_range
from mixlab.errors import ImageError

NUM_PAIRS = 20  # of pictures nearly alike, that are listed
_BATCH = 1024  # images handed to the threads at a time, so that memory does not grow with the source


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """What `check` found.

    num_ok, num_bad: they sum to the number of images; `bad` has path and reason of each unreadable one.
    classes: readable images by class name and split.
    sizes: min, median and max of width and height as decoded, and the most common [width, height].
    modes, formats: counts of what Pillow calls them; pixels in memory have the format `memory`.
    duplicates: identical pictures that lie in more than one split, as {paths, splits}.
    num_duplicates_within: further copies of a picture inside one split.
    conflicts: identical pictures with different labels, as {paths, labels}.
    num_near_copies: pictures that look nearly like another one without being the same (resized, saved again);
        near_copies: some pairs of them, as {paths, splits}. Pictures of less than 16 pixels a side are not compared.
    skipped: what is left out, as {reason, count, examples}.
    grey_peak: the largest value in 16-bit grey pictures, None without any; grey_max: what a training takes as white.
    """

    num_ok: int
    num_bad: int
    bad: list[dict[str, str]]
    classes: dict[str, dict[str, int]]
    sizes: dict[str, Any]
    modes: dict[str, int]
    formats: dict[str, int]
    duplicates: list[dict[str, list[str]]]
    num_duplicates_within: int
    conflicts: list[dict[str, list[str]]]
    num_near_copies: int
    near_copies: list[dict[str, list[str]]]
    skipped: list[dict[str, Any]]
    grey_peak: int | None
    grey_max: int | None

    def to_json(self) -> dict[str, Any]:
        """The fields as a plain dict, in the order above."""
        return asdict(self)


@dataclass(frozen=True)
class _Seen:
    """One readable picture."""

    width: int
    height: int
    mode: str
    format: str
    digest: str
    near: int | None
    grey_peak: int | None


def check(source: Source, *, progress: Callable[[int, int], None] | None = None) -> CheckResult:
    """Decode every image fully; `progress` is called with (images done, images in all)."""
    total = sum(len(split) for split in source.splits.values())
    done = 0
    bad: list[dict[str, str]] = []
    classes = {name: dict.fromkeys(source.splits, 0) for name in source.class_names}
    sizes: Counter[tuple[int, int]] = Counter()
    modes: Counter[str] = Counter()
    formats: Counter[str] = Counter()
    places: dict[str, list[tuple[str, int]]] = {}  # digest -> (split, index) of its pictures
    hashes: dict[int, list[tuple[str, int]]] = {}  # the same by hash, where copies have the same
    peaks: list[int] = []
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for split_name, split in source.splits.items():
            for start in range(0, len(split), _BATCH):
                batch = range(start, min(start + _BATCH, len(split)))
                for i, seen in zip(batch, pool.map(lambda i, s=split: _see(s, i), batch), strict=True):
                    done += 1
                    if isinstance(seen, str):
                        bad.append({"path": split.names[i], "reason": seen})
                        continue
                    classes[source.class_names[split.labels[i]]][split_name] += 1
                    sizes[seen.width, seen.height] += 1
                    modes[seen.mode] += 1
                    formats[seen.format] += 1
                    group = places.setdefault(seen.digest, [])
                    if not group and seen.near is not None:
                        hashes.setdefault(seen.near, []).append((split_name, i))
                    group.append((split_name, i))
                    peaks += [] if seen.grey_peak is None else [seen.grey_peak]
                if progress:
                    progress(done, total)
    groups = [group for group in places.values() if len(group) > 1]
    num_near, near = _near_copies(source, hashes)
    return CheckResult(
        num_ok=total - len(bad),
        num_bad=len(bad),
        bad=bad,
        classes=classes,
        sizes=_summary(sizes),
        modes=dict(modes.most_common()),
        formats=dict(formats.most_common()),
        duplicates=[
            {"paths": _paths(source, group), "splits": [name for name, _ in group]}
            for group in groups
            if len({name for name, _ in group}) > 1
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
        grey_peak=max(peaks, default=None),
        grey_max=grey_range(max(peaks)) if peaks else None,
    )


def _see(split: Split, index: int) -> _Seen | str:
    """The picture, or the reason why it cannot be read."""
    deep = None
    try:
        if split.pixels is None:
            data = split.read(index)
            _, _, mode, format_name = describe(data)
            pixels, deep = decode_deep(data)
        else:
            pixels = split.pixels[index]
            mode, format_name = {1: "L", 3: "RGB"}.get(pixels.shape[-1], "other"), "memory"
    except ImageError as error:
        return error.message
    return _Seen(
        width=pixels.shape[1],
        height=pixels.shape[0],
        mode=mode,
        format=format_name,
        digest=picture_digest(pixels if deep is None else deep),
        near=near_hash(pixels),
        grey_peak=None if deep is None else int(deep.max()),
    )


def _near_copies(
    source: Source, hashes: dict[int, list[tuple[str, int]]]
) -> tuple[int, list[dict[str, list[str]]]]:
    """How many pictures look nearly like another, and some pairs of them, those in two splits first."""
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


def _summary(sizes: Counter[tuple[int, int]]) -> dict[str, Any]:
    if not sizes:
        return {}
    counts = np.fromiter(sizes.values(), dtype=np.int64)
    summary: dict[str, Any] = {}
    for name, values in zip(("width", "height"), np.array(list(sizes)).T, strict=True):
        every = np.repeat(values, counts)
        summary[name] = {"min": int(every.min()), "median": float(np.median(every)), "max": int(every.max())}
    return {**summary, "most_common": list(sizes.most_common(1)[0][0])}


def _paths(source: Source, group: list[tuple[str, int]]) -> list[str]:
    """The names of a group; `index 5` alone says too little where there are several splits."""
    return [
        source.splits[s].names[i] if source.splits[s].has_files else f"{s} {source.splits[s].names[i]}"
        for s, i in group
    ]
