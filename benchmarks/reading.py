"""What looking at the data costs, in turns with another commit: `check`, and reading the images of a training.

    python -m benchmarks.reading --against COMMIT [--small 50000] [--photos 1000] [--rounds 5]

Both sides run in processes of their own on the same files, one after the other; a ratio is this tree over the other.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from mixlab.device import describe_machine, machine_name

ROOT = Path(__file__).resolve().parents[1]
CHECK = """
from mixlab.data.check import check
from mixlab.data.sources import open_source
import sys, time
began = time.perf_counter()
result = check(open_source(sys.argv[1]))
print(time.perf_counter() - began, result.num_ok)
"""
# From the folder's name to images at model size, test images included, which a training reads when it ends.
READ = """
import sys, time
from mixlab.report.screen import Screen
from mixlab.training.keys import override
from mixlab.training.recipe import Recipe
from mixlab.training.setup import open_data, resolve
from mixlab.training.splits import split_source
recipe, quiet = override(Recipe(), {"data.source": sys.argv[1], "data.image_size": (64, 64)}), Screen(quiet=True)
began = time.perf_counter()
source = open_data(recipe)
splits = split_source(source, recipe)
recipe = resolve(recipe, splits["train"], source.modality)
try:
    from mixlab.training.prepared import read_new
except ImportError:
    from mixlab.data.loader import load_examples
    from mixlab.training.setup import prepare
    prepared = prepare(recipe, source, splits, quiet)
    test = load_examples(splits["test"], prepared.preprocess)
else:
    _, prepared = read_new(recipe, source, quiet)
    test = prepared.test
print(time.perf_counter() - began, len(prepared.train) + len(prepared.val) + len(test))
"""


def draw_small(folder: Path, count: int) -> None:
    """Images of 32 x 32 in ten classes, PNG."""
    _draw(folder, count, 10, (8, 8), (32, 32), "png")


def draw_photos(folder: Path, count: int) -> None:
    """JPEG of 500 x 375 in two classes."""
    _draw(folder, count, 2, (47, 63), (500, 375), "jpg", quality=90)


def _draw(
    folder: Path,
    count: int,
    classes: int,
    grid: tuple[int, int],
    size: tuple[int, int],
    ending: str,
    **how: int,
) -> None:
    """Smooth noise: a grid (rows, columns) of random colours, scaled to `size` (width, height)."""
    draw = np.random.default_rng(0)
    for number in range(count):
        path = folder / f"class{number % classes}" / f"{number:06d}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(draw.integers(0, 255, (*grid, 3), dtype=np.uint8))
        small.resize(size, Image.Resampling.BICUBIC).save(path, **how)


def seconds(tree: Path, code: str, folder: Path) -> float:
    """What `code` of the mixlab in `tree` takes on `folder`."""
    environment = os.environ | {"PYTHONPATH": str(tree)}
    command = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", required=True, help="a commit of this repository")
    parser.add_argument("--small", type=int, default=50_000)
    parser.add_argument("--photos", type=int, default=1_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        other = Path(name) / "other"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(other), options.against], check=True)
        try:
            small, photos = Path(name) / "small", Path(name) / "photos"
            draw_small(small, options.small)
            draw_photos(photos, options.photos)
            for what, code, folder in (
                ("check of small images", CHECK, small),
                ("check of photos", CHECK, photos),
                ("reading small images", READ, small),
                ("reading photos", READ, photos),
            ):
                pairs = [
                    (seconds(ROOT, code, folder), seconds(other, code, folder)) for _ in range(options.rounds)
                ]
                ratios = sorted(ours / others for ours, others in pairs)
                row = {
                    "what": what,
                    "ratio": round(statistics.median(ratios), 3),
                    "lowest": round(ratios[0], 3),
                    "highest": round(ratios[-1], 3),
                    "n": len(ratios),
                    "seconds": round(statistics.median(ours for ours, _ in pairs), 2),
                    "machine": machine_name(describe_machine()),
                }
                print(json.dumps(row), flush=True)
        finally:
            subprocess.run([*git, "remove", "--force", str(other)], check=True)


if __name__ == "__main__":
    main()
