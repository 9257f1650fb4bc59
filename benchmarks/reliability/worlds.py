"""One training on 1, 2, 4 ranks with 0, 2, 4 loader workers each, both changed in mid-run: what stays the same?

    python -m benchmarks.reliability.worlds [--steps 24] [--seed 0]

Images in files, so that workers are used. For every pair of (ranks, workers) a run is stopped half-way by SIGTERM
and resumed with the next pair. Exact mode (4 virtual shards): model, EMA, optimizer, weights and every logged loss
must have the bits of the run of one process without workers. Without it (DDP): every step must see the same images.
"""

import argparse
import itertools
import json
import os
import signal
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import mixlab
from benchmarks.reliability import ranks
from benchmarks.reliability.kills import OPTIONS, fingerprint
from mixlab.planning import reopen
from mixlab.report.screen import Screen
from mixlab.training import fit

SIZES, WORKERS = (1, 2, 4), (0, 2, 4)


def write_pictures(folder: Path, count: int = 120) -> Path:
    """Small JPEG files of noise in three classes."""
    draw = np.random.default_rng(0)
    for i in range(count):
        path = folder / f"class{i % 3}" / f"{i:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
    return folder


def train_in_two(
    folder: Path, data: Path, first: tuple[int, int], second: tuple[int, int], steps: int, **options: Any
) -> tuple[Path, list[list[int]]]:
    """A run of which the first half has (ranks, workers) `first` and the rest `second`; the images of each step."""
    run = folder / "run"
    seen = folder / "seen"
    seen.mkdir()
    real = fit.train_step

    def note(state: Any, batch: Any, clock: Any) -> Any:
        (seen / f"{clock.step:04d}-{state.world.rank}").write_text(json.dumps(batch.index.tolist()))
        is_half = clock.step == steps // 2 - 1 and not (folder / "half").exists()
        if is_half and state.world.rank == state.world.size - 1:  # any one rank is enough
            (folder / "half").touch()
            os.kill(os.getpid(), signal.SIGTERM)
        return real(state, batch, clock)

    def job() -> None:
        fit.train_step = note  # in this process only
        warnings.filterwarnings("ignore", message="This DataLoader will create")  # more than there are cores
        settings = OPTIONS | {
            "steps": steps,
            "data__image_size": "16",
            "data__in_memory": False,
            "batch_size": 16,
        }
        if not run.exists():
            settings |= {"data__num_workers": first[1]} | options
            mixlab.train(str(data), "small_images", run=run, screen=Screen(quiet=True), **settings)
        else:
            recipe_of = reopen.recipe_of
            reopen.recipe_of = lambda run: replace(  # a person cannot change it; the machine may
                recipe_of(run), data=replace(recipe_of(run).data, num_workers=second[1])
            )
            mixlab.resume(run, screen=Screen(quiet=True))

    for size, expected in ((first[0], 143), (second[0], 0)):
        statuses = ranks.wait(ranks.start(job, size=size), 180)
        if statuses != [expected] * size:
            raise RuntimeError(f"{first} then {second}: exit statuses {statuses}, expected {expected}")
    order = []
    for step in range(steps):
        parts = sorted(seen.glob(f"{step:04d}-*"), key=lambda path: int(path.name.split("-")[1]))
        order.append([i for part in parts for i in json.loads(part.read_text())])
    return run, order


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=24)
    options = parser.parse_args()
    torch.set_num_threads(1)
    pairs = list(itertools.product(SIZES, WORKERS))
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        data = write_pictures(Path(name) / "pictures")
        expected: Any = {}
        for mode, extra in (("exact", {"virtual_shards": 4}), ("ddp", {})):
            same_bits = same_order = 0
            for number, (first, second) in enumerate(zip(pairs, pairs[1:] + pairs[:1], strict=True)):
                folder = Path(name) / f"{mode}{number}"
                folder.mkdir()
                run, order = train_in_two(folder, data, first, second, options.steps, **extra)
                found = fingerprint(run)
                expected.setdefault(mode, found)
                expected.setdefault("order", order)
                same_bits += found == expected[mode]
                same_order += order == expected["order"]
                print(mode, first, second, found == expected[mode], order == expected["order"], flush=True)
            print(
                f"{mode}: {len(pairs)} changes of (ranks, workers) in mid-run, same order {same_order}, "
                f"same bits {same_bits}, {time.monotonic() - began:.0f} s"
            )


if __name__ == "__main__":
    main()
