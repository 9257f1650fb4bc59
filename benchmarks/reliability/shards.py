"""Damaged tar shards: is every loss noticed?

    python -m benchmarks.reliability.shards [--trials 2000] [--seed 0]

A third each of cuts at a random byte, overwritten 512-byte blocks and single flipped bits, in a random shard or in
its index or the manifest. What is then read must be the same images and classes as before for every name, except
names that are listed as bad or a refusal to open the set; anything else is a silent loss. For comparison the same
damaged shards (tar files only) are read by webdataset as it does by default.
"""

import argparse
import json
import random
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from mixlab.data.dataset import Source, Split
from mixlab.data.images.modality import IMAGES
from mixlab.data.shard_writer import write_shards
from mixlab.data.shards import open_shards, verify_shards
from mixlab.errors import DataError, ExampleError

KINDS = ("cut", "block", "bit")


def example(count: int = 200) -> Source:
    """Small images of noise in four classes."""
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 256, (count, 12, 10, 3), dtype=np.uint8)
    names = tuple(f"index {i}" for i in range(count))
    split = Split(names=names, labels=draw.integers(0, 4, count), arrays=pixels)
    return Source(name="noise", class_names=tuple("abcd"), splits={"train": split}, modality=IMAGES)


def contents(folder: Path) -> tuple[dict[str, tuple[bytes, str]], list[str]]:
    """Bytes and class of every image by name, and the names of those that are refused."""
    source = open_shards(str(folder))
    split = source.splits["train"]
    good: dict[str, tuple[bytes, str]] = {}
    bad = []
    for i, name in enumerate(split.names):
        try:
            good[name] = (split.read(i), source.class_names[split.labels[i]])
        except ExampleError:
            bad.append(name)
    return good, bad


def damage(path: Path, kind: str, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    if kind == "cut":
        data = data[: draw.randrange(len(data))]
    elif kind == "block":
        start = 512 * draw.randrange(max(len(data) // 512, 1))
        data[start : start + 512] = draw.randbytes(len(data[start : start + 512]))
    else:
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def outcome(folder: Path, expected: dict[str, tuple[bytes, str]]) -> str:
    """`refused`, `listed` (some images are bad), `harmless` (all there and right) or `silent`."""
    try:
        good, bad = contents(folder)
    except DataError:
        return "refused"
    if set(good) | set(bad) != set(expected) or any(expected[name] != value for name, value in good.items()):
        return "silent"
    return "listed" if bad else "harmless"


def read_by_webdataset(paths: list[Path], expected: dict[str, tuple[bytes, str]]) -> str:
    import webdataset

    wanted = {(value[0], "abcd".index(value[1])) for value in expected.values()}
    try:
        found = [
            (sample["png"], int(sample["cls"]))
            for sample in webdataset.WebDataset([str(path) for path in paths], shardshuffle=False)
        ]
    except Exception:
        return "refused"
    return "harmless" if len(found) == len(wanted) and set(found) == wanted else "silent"


def run(folder: Path, trials: int, *, seed: int, compare: bool = False) -> dict[str, Any]:
    draw = random.Random(seed)
    whole = folder / "whole"
    write_shards(example(), whole, shard_bytes=100_000)
    expected, _ = contents(whole)
    files = sorted(whole.iterdir())
    shards = [path for path in files if path.suffix == ".tar"]
    counts: Counter[str] = Counter()
    theirs: Counter[str] = Counter()
    unverified = 0
    for trial in range(trials):
        kind = KINDS[trial % 3]
        # Mostly the shards themselves, which are nearly all of the bytes.
        victim = draw.choice(shards if draw.random() < 0.8 else files)
        copy = folder / "copy"
        shutil.copytree(whole, copy)
        damage(copy / victim.name, kind, draw)
        result = outcome(copy, expected)
        counts[f"{kind} {result}"] += 1
        if result == "silent":
            print("silent:", kind, victim.name, flush=True)
        if victim.suffix == ".tar":
            if (copy / victim.name).read_bytes() != victim.read_bytes() and not verify_shards(copy):
                unverified += 1
            if compare:
                theirs[f"{kind} {read_by_webdataset([copy / path.name for path in shards], expected)}"] += 1
        shutil.rmtree(copy)
    silent = sum(count for key, count in counts.items() if key.endswith("silent"))
    return {
        "trials": trials, "silent": silent, "missed_by_check": unverified, "outcomes": dict(sorted(counts.items())),
        "webdataset": dict(sorted(theirs.items())), "seed": seed,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        result = run(Path(name), options.trials, seed=options.seed, compare=True)
    print(json.dumps(result | {"seconds": round(time.monotonic() - began)}, indent=2))


if __name__ == "__main__":
    main()
