"""What exact mode costs: images a second of two ranks with DDP and with virtual shards, alternately.

    python -m benchmarks.exact [--model mixer_micro4] [--side 32] [--batch-size 128] [--steps 30] [--repeats 5]

Random images in files' stead, one thread a rank, AdamW; the median over a run's logged speeds, then the median and
range of the ratios to DDP of the same round.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mixlab
from benchmarks.reliability import ranks
from mixlab.data.dataset import Source, Split
from mixlab.data.images.modality import IMAGES
from mixlab.planning import make_plan
from mixlab.report.run_log import read_run_log
from mixlab.report.screen import Screen

WAYS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "DDP, 2 ranks": (2, {}),
    "exact, 2 shards, 2 ranks": (2, {"virtual_shards": 2}),
    "exact, 8 shards, 2 ranks": (2, {"virtual_shards": 8}),
}


def speed(way: str, options: argparse.Namespace, folder: Path) -> float:
    size, extra = WAYS[way]
    pixels = np.random.default_rng(0).integers(0, 256, (512, options.side, options.side, 3), dtype=np.uint8)
    split = Split(names=tuple(map(str, range(512))), labels=np.arange(512) % 10, arrays=pixels)
    run = folder / "run"

    def job() -> None:
        source = Source(
            name="noise", class_names=tuple("0123456789"), splits={"train": split}, modality=IMAGES
        )
        make_plan.open_data = lambda *_, **__: source  # type: ignore[assignment]
        settings = {
            "steps": options.steps, "epochs": None, "batch_size": options.batch_size, "threads": 1,
            "model__name": options.model, "data__val_fraction": 0.0, "keep_weights": "last",
            "optimizer__name": "adamw",
        }  # fmt: skip
        mixlab.train("digits", "small_images", run=run, screen=Screen(quiet=True), **settings, **extra)

    if ranks.wait(ranks.start(job, size=size), 600) != [0] * size:
        raise SystemExit(f"{way} failed")
    rows = read_run_log(run / "metrics.jsonl")
    speeds = [row["images_per_second"] for row in rows if row["event"] == "train"]
    return statistics.median(speeds[len(speeds) // 3 :])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="mixer_micro4")
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(options.repeats):
        for way in WAYS:
            with tempfile.TemporaryDirectory() as folder:
                found[way].append(speed(way, options, Path(folder)))
    base = found["DDP, 2 ranks"]
    for way, speeds in found.items():
        ratios = [value / other for value, other in zip(speeds, base, strict=True)]
        print(
            f"{way}: {statistics.median(speeds):,.0f} images/s, {statistics.median(ratios):.2f} of DDP "
            f"({min(ratios):.2f} to {max(ratios):.2f}, n={len(ratios)})",
            flush=True,
        )


if __name__ == "__main__":
    main()
