"""Transfer: pretrained weights against a start from scratch on a few sets, at equal steps.

    python -m benchmarks.transfer WEIGHTS [--targets digits fashionmnist] [--fractions 0.1 1.0] [--seeds 3]
        [--steps 500] [--lr-grid 0.003,0.01,0.03] [--scratch-lr-grid ...] [--csv FILE] [--runs DIR]

Each cell is target x fraction of its training images x seed x start. Both starts have the same model, image size,
images, augmentation, batch and number of steps; the pretrained one trains by the recipe `finetune`, the other by
`small_images`, or `small_images_flat` for a flat Mixer. The seed also draws the fraction and what is held out, so
that the two starts of a seed have the same images. A grid of rates is tried on validation before each training
(`mixlab finetune --lr-grid`). digits has a validation split of its own, which stays whole. The test split is read
once in each cell, after training.

Every cell is a row of the CSV file; a second call measures only what is missing in it. A table comes at the end.
"""

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.cells import measure_missing, read_rows
from mixlab import recipes
from mixlab.checkpoint.open import existing_path, open_weights
from mixlab.checkpoint.store import Weights
from mixlab.data.csv_files import read_split_csv
from mixlab.data.images.augment import AugmentConfig
from mixlab.models.catalog import ModelConfig
from mixlab.models.pyramid import PyramidMixer
from mixlab.planning.lr_grid import LrGrid, parse_lr_grid
from mixlab.report.screen import Screen
from mixlab.training.keys import from_toml
from mixlab.training.recipe import Recipe

STARTS = ("weights", "scratch")
FLIPS = {"fashionmnist": True}  # a mirrored digit is none
COLUMNS = (
    "target", "fraction", "seed", "start", "steps", "num_train", "lr", "num_correct", "num_images", "top1",
    "seconds", "recipe", "commit",
)  # fmt: skip
CELL = COLUMNS[:5]


def recipe_of(
    cell: dict[str, Any],
    weights: Weights,
    name: str,
    *,
    batch_size: int = 128,
    data_dir: str | None = None,
    threads: int | None = None,
) -> Recipe:
    """What one cell trains."""
    preprocess = weights.preprocess
    same = {
        "data.data_dir": data_dir,
        "data.train_fraction": cell["fraction"],
        "data.split_seed": cell["seed"],
        "data.val_fraction": 0.1,
        "data.image_size": preprocess.image_size,
        "data.channels": preprocess.channels,
        "data.mean": preprocess.mean,
        "data.std": preprocess.std,
        "data.crop_fraction": 1.0,
        "data.interpolation": "bicubic",
        "batch_size": batch_size,
        "accumulate": 1,
        "precision": "auto",
        "whiten_stem": True,  # of the start from scratch: weights keep their stem
        "keep_weights": "best",
        "steps": cell["steps"],
        "seed": cell["seed"],
        "threads": threads,
    }
    if cell["start"] == "weights":
        kind, same["init_from"] = "finetune", name
    else:
        kind = "small_images" if isinstance(weights.model, PyramidMixer) else "small_images_flat"
    recipe = recipes.compose(cell["target"], recipe=kind, overrides=same)
    padding, flip = max(min(preprocess.image_size) // 8, 1), FLIPS.get(cell["target"], False)
    recipe = replace(recipe, augment=AugmentConfig(crop="pad", crop_padding=padding, flip=flip))
    if cell["start"] == "weights":
        return recipe
    model = {k: v for k, v in weights.model_settings.items() if k in ModelConfig.__dataclass_fields__}
    scale = recipe.model.branch_init_scale
    return replace(recipe, model=replace(ModelConfig(**model), branch_init_scale=scale))


def measure(
    cell: dict[str, Any], recipe: Recipe, grid: LrGrid | None, runs: Path, screen: Screen
) -> dict[str, Any]:
    """Train one cell; its row."""
    run = runs / "-".join(str(cell[key]) for key in CELL)
    result = recipes.train(recipe=recipe, run=run, lr_grid=grid, with_pictures=False, screen=screen)
    test = result["test"]
    return cell | {
        "num_train": len(read_split_csv(run / "split.csv")["train"]),
        "lr": from_toml(run / "recipe.toml")["optimizer.lr"],
        "num_correct": test["num_correct"],
        "num_images": test["num_images"],
        "top1": test["top1"],
        "seconds": round(result["seconds"], 1),
        "recipe": recipe.name,
        "commit": json.loads((run / "environment.json").read_text())["commit"],
    }


def table(rows: list[dict[str, str]]) -> str:
    """Mean accuracy of each start over the seeds that both have, and by how much the weights are better."""
    lines = [
        "| target | of its training images | steps | from scratch | from the weights | difference, seed by seed |",
        "|---|---|---|---|---|---|",
    ]
    tops: dict[tuple[str, ...], dict[tuple[str, str], float]] = {}
    for row in rows:
        group = tops.setdefault((row["target"], row["fraction"], row["steps"]), {})
        group[row["start"], row["seed"]] = 100 * float(row["top1"])
    for (target, fraction, steps), group in tops.items():
        seeds = [seed for start, seed in group if start == "scratch" and ("weights", seed) in group]
        if not seeds:
            continue
        cells = []
        for start in ("scratch", "weights"):
            values = [group[start, seed] for seed in seeds]
            spread = f" +- {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.2f}{spread} % (n={len(values)})")
        gains = [group["weights", seed] - group["scratch", seed] for seed in seeds]
        gain = f"{statistics.mean(gains):+.2f} ({min(gains):+.2f} to {max(gains):+.2f})"
        lines.append(f"| {target} | {float(fraction):.0%} | {steps} | {cells[0]} | {cells[1]} | {gain} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", help="a run, weights file or published name")
    parser.add_argument("--targets", nargs="+", default=["digits", "fashionmnist"])
    parser.add_argument("--fractions", nargs="+", type=float, default=[0.1, 1.0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument(
        "--lr-grid", help="of both starts, or of the weights; without, the recipes' own rates"
    )
    parser.add_argument(
        "--scratch-lr-grid", help="of the start from scratch; the other optimizer has other rates"
    )
    parser.add_argument("--lr-share", type=float, default=0.1)
    parser.add_argument("--data-dir")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--csv", type=Path, default=Path("transfer.csv"))
    parser.add_argument("--runs", type=Path, default=Path("runs/transfer"))
    options = parser.parse_args(arguments)
    name = str(existing_path(options.weights) or options.weights)
    weights, screen = open_weights(name), Screen()
    texts = {"weights": options.lr_grid, "scratch": options.scratch_lr_grid or options.lr_grid}
    grids = {start: parse_lr_grid(text, options.lr_share) if text else None for start, text in texts.items()}
    cells = [
        dict(zip(CELL, (target, fraction, seed, start, options.steps), strict=True))
        for seed in range(options.seeds)
        for target in options.targets
        for fraction in options.fractions
        for start in STARTS
    ]

    def measure_cell(cell: dict[str, Any]) -> dict[str, Any]:
        screen.say(", ".join(f"{key} {value}" for key, value in cell.items()))
        settings = {key: getattr(options, key) for key in ("batch_size", "data_dir", "threads")}
        recipe = recipe_of(cell, weights, name, **settings)
        return measure(cell, recipe, grids[cell["start"]], options.runs, screen)

    measure_missing(cells, measure_cell, options.csv, COLUMNS)
    print(table(read_rows(options.csv)))


if __name__ == "__main__":
    main()
