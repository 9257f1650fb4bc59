"""Recipes against each other on CIFAR-10, as a person types them: whole commands of `mixlab train`, timed.

    python -m benchmarks.recipes DATA GROUP [GROUP ...] [--seeds N] [--minutes M] [--runs DIR]
        [--csv docs/results/recipes.csv] [--part K/N]

DATA: the folder with train/CLASS/* and test/CLASS/*. Groups, see GROUPS: what is chosen on (`val`: a tenth of train
is held out, and the test split is not even in sight) or reported (`test`: trained on all of train, test read once).
A cell is group x name x seed, on one machine; every cell is a row of the CSV file, and a second call measures only
what is missing in it. Nothing else may run meanwhile. `ingredients` needs `teacher` before it, and the same --runs.
--minutes: begin no cell that would end later. A table comes at the end. --part: every N-th cell only, from the K-th
on. Groups with `threads` 1 are there to choose settings: two commands, `--part 0/2` and `--part 1/2`, run them side
by side, a core each, which makes 1.3 times as many steps.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.cells import measure_missing, read_rows
from mixlab.data.csv_files import read_split_csv
from mixlab.device import describe_machine, machine_name
from mixlab.planning.budget import parse_duration
from mixlab.report.run_log import read_run_log

COLUMNS = (
    "group", "name", "seed", "split", "num_correct", "num_images", "accuracy", "steps", "epochs", "images_per_second",
    "seconds", "num_parameters", "options", "machine", "commit",
)  # fmt: skip
CELL = ("group", "name", "seed", "machine")


# As many multiplications as Mixer-Pyramid-Mini/2, 24.8 million for 32 x 32 pixels, in a flat Mixer: 24.7 million.
EQUAL_FLAT = {
    "model.name": "mixer_micro4", "model.num_blocks": 5, "model.hidden_dim": 128, "model.channel_mlp_dim": 232,
}  # fmt: skip
MINI = {"model.name": "mixer_pyramid_mini"}
# `small_images` and `small_images_flat` as they were when their ingredients were compared.
BEFORE = {"augment.flip_alternates": False, "schedule.decay": "cosine", "whiten_stem": False}
# DeiT's augmentation (Touvron et al. 2021, Table 9), with AdamW.
DEIT = {
    "recipe": "small_images_flat", "augment.crop": "pad", "augment.policy": "randaugment",
    "augment.policy_magnitude": 9, "augment.mixup_alpha": 0.8, "augment.cutmix_alpha": 1.0,
    "augment.erase_prob": 0.25, "model.stochastic_depth": 0.1, "optimizer.name": "adamw",
    "optimizer.weight_decay": 0.05,
} | BEFORE  # fmt: skip
# Without that augmentation, which is for 300 epochs: what it costs in a few.
PLAIN = {
    "augment.policy": "none", "augment.mixup_alpha": 0, "augment.cutmix_alpha": 0, "augment.erase_prob": 0,
    "model.stochastic_depth": 0,
}  # fmt: skip
# mixlab/models/baselines.py: as many multiplications as Mixer-Pyramid-Mini/2
TIMM = {"mixer": {"model.name": "timm/baseline_mixer_mini"}, "vit": {"model.name": "timm/baseline_vit_mini"}}


@dataclass(frozen=True)
class Group:
    """Trainings that are compared: name -> options of `mixlab train`, on top of `base`.

    follows: the name whose number of steps (of the same seed) the others take instead of the budget.
    """

    budget: str
    split: str
    seeds: int
    names: dict[str, dict[str, Any]]
    base: dict[str, Any] = field(default_factory=dict)
    follows: str = ""


GROUPS = {
    "flat-10m": Group("10m", "test", 3, {"small_images_flat": {"recipe": "small_images_flat"}}),
    "pyramid-10m": Group("10m", "test", 3, {"small_images": {"recipe": "small_images"}}),
    "flat-30m": Group(
        "30m", "test", 2, {"small_images_flat": {"recipe": "small_images_flat", "model.name": "mixer_mini"}}
    ),
    "pyramid-30m": Group("30m", "test", 2, {"small_images": {"recipe": "small_images"}}),
    "equal-macs": Group(
        "10m", "test", 3, {"pyramid": MINI, "flat": EQUAL_FLAT}, {"recipe": "small_images"}, "pyramid"
    ),
    "deit-rates": Group(
        "7m",
        "val",
        1,
        {f"{name} {lr:g}": TIMM[name] | {"optimizer.lr": lr} for name in TIMM for lr in (5e-4, 1e-3, 2e-3)}
        | {f"{name} 0.001, crop and flip": TIMM[name] | PLAIN | {"optimizer.lr": 1e-3} for name in TIMM},
        DEIT | {"threads": 1},
    ),
    "deit-10m": Group(
        "10m",
        "test",
        3,
        {
            "timm mixer": TIMM["mixer"] | {"optimizer.lr": 1e-3},
            "timm vit": TIMM["vit"] | {"optimizer.lr": 2e-3},
        },
        DEIT,
    ),  # the best rates of the group before it
    "sizes": Group(
        "3m",
        "val",
        2,
        {"chosen": {}, "micro": {"model.name": "mixer_pyramid_micro"}, "mini": MINI},
        {"recipe": "small_images"},
    ),
    # Whom "distilled" below follows. Every run has the same validation images, so it has not seen them either.
    "teacher": Group("10m", "val", 1, {"small_images": {"recipe": "small_images"}}),
    "ingredients": Group(
        "5m",
        "val",
        3,
        {
            "as it is": {},
            "AdamW 2e-3": {"optimizer.name": "adamw", "optimizer.lr": 2e-3},
            "crop 4": {"augment.crop_padding": 4},
            "CutMix": {"augment.cutmix_alpha": 1.0},
            "mixup 0.2": {"augment.mixup_alpha": 0.2},
            "EMA 0.99": {"ema_decay": 0.99},
            "flips in turns": {"augment.flip_alternates": True},
            "linear decay": {"schedule.decay": "linear"},
            "whitened stem": {"whiten_stem": True},
            "these three": {"augment.flip_alternates": True, "schedule.decay": "linear", "whiten_stem": True},
            "RandAugment 1, 5": {
                "augment.policy": "randaugment",
                "augment.policy_layers": 1,
                "augment.policy_magnitude": 5,
            },
            "distilled": {"distill.teacher": "teacher-small_images-0"},
        },
        {"recipe": "small_images", "model.name": "mixer_pyramid_micro", "threads": 1} | BEFORE,
    ),
}


def options_of(group: Group, name: str, seed: int) -> dict[str, Any]:
    """Options of the command for one cell, without its length."""
    options = group.base | group.names[name] | {"seed": seed}
    return options if group.split == "val" else options | {"data.val_fraction": 0}


def printed_by(command: list[str]) -> str:
    """What a command prints."""
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def measure(
    cell: dict[str, Any],
    group: Group,
    data: Path,
    rows: list[dict[str, str]],
    keep: Path | None = None,
    train: Callable[[list[str]], str] = printed_by,
) -> dict[str, Any]:
    """Train one cell as a command of its own; its row. rows: those measured so far. keep: where its run stays."""
    options = options_of(group, cell["name"], cell["seed"])
    if keep is not None and "distill.teacher" in options:
        options["distill.teacher"] = keep.absolute() / options["distill.teacher"]
    length = {"budget": group.budget}
    if group.follows not in ("", cell["name"]):
        wanted = {**cell, "name": group.follows}
        leader = next(row for row in rows if all(row[key] == str(wanted[key]) for key in CELL))
        length = {"steps": leader["steps"]}
    with tempfile.TemporaryDirectory() as folder:
        for split in ("train", "test") if group.split == "test" else ("train",):
            (Path(folder) / "data").mkdir(exist_ok=True)
            (Path(folder) / "data" / split).symlink_to((data / split).absolute())
        arguments = [f"--{key}={value}" for key, value in (options | length).items()]
        run = (
            Path(folder) / "run" if keep is None else keep / f"{cell['group']}-{cell['name']}-{cell['seed']}"
        )
        command = [sys.executable, "-m", "mixlab", "train", f"{folder}/data"]
        began = time.monotonic()
        printed = train([*command, *arguments, "--json", f"--run={run}"])
        seconds = time.monotonic() - began
        result = json.loads(printed)
        if group.split == "test":
            num_images, num_correct = result["test"]["num_images"], result["test"]["num_correct"]
        else:
            num_images = len(read_split_csv(run / "split.csv")["val"])
            tops = [
                row["top1"] for row in read_run_log(run / "metrics.jsonl") if row["event"] == "validation"
            ]
            num_correct = round(max(tops) * num_images)
        environment = json.loads((run / "environment.json").read_text())
    return cell | {
        "split": group.split,
        "num_correct": num_correct,
        "num_images": num_images,
        "accuracy": round(num_correct / num_images, 5),
        "steps": result["steps"],
        "epochs": round(result["epochs"], 3),
        "images_per_second": round(result["images_per_second"]),
        "seconds": round(seconds, 1),
        "num_parameters": result["num_parameters"],
        "options": " ".join(arguments),
        "commit": environment["commit"],
    }


def table(rows: list[dict[str, str]]) -> str:
    """Mean accuracy of each name over its seeds, spread, epochs, and the mean difference from the group's first."""
    titles = ("group", "recipe", "split", "accuracy", "than the first", "epochs", "s at most", "machine")
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    tops = {tuple(row[key] for key in CELL): 100 * float(row["accuracy"]) for row in rows}
    first: dict[tuple[str, str], str] = {}
    for group, name, machine in dict.fromkeys((row["group"], row["name"], row["machine"]) for row in rows):
        leader = first.setdefault((group, machine), name)
        mine = [row for row in rows if (row["group"], row["name"], row["machine"]) == (group, name, machine)]
        values = [tops[group, name, row["seed"], machine] for row in mine]
        spread = f" +- {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        pairs = [
            (tops[group, name, row["seed"], machine], tops.get((group, leader, row["seed"], machine)))
            for row in mine
        ]
        gains = [top - other for top, other in pairs if other is not None]
        cells = (
            group,
            name,
            mine[0]["split"],
            f"{statistics.mean(values):.2f}{spread} % (n={len(values)})",
            f"{statistics.mean(gains):+.2f} (n={len(gains)})" if gains and name != leader else "",
            f"{statistics.mean(float(row['epochs']) for row in mine):.1f}",
            f"{max(float(row['seconds']) for row in mine):.0f}",
            machine,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(
    arguments: list[str] | None = None,
    groups: dict[str, Group] = GROUPS,
    train: Callable[[list[str]], str] = printed_by,
) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("groups", nargs="+", choices=groups)
    parser.add_argument("--seeds", type=int, help="instead of the group's own number")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--runs", type=Path, help="keep the runs in this folder")
    parser.add_argument("--part", default="0/1", help="K/N: every N-th cell, from the K-th on")
    parser.add_argument("--csv", type=Path, default=Path("docs/results/recipes.csv"))
    options = parser.parse_args(arguments)
    followers = [g for g in options.groups if any("distill.teacher" in o for o in groups[g].names.values())]
    if followers and options.runs is None:
        sys.exit(
            f"{followers[0]} follows a teacher: measure the group `teacher` before it, both with the same --runs"
        )
    end = time.monotonic() + 60 * options.minutes
    machine = machine_name(describe_machine())
    part, num_parts = map(int, options.part.split("/"))
    cells = [
        dict(zip(CELL, (group, name, seed, machine), strict=True))
        for group in options.groups
        for seed in range(options.seeds or groups[group].seeds)
        for name in groups[group].names
    ][part::num_parts]

    def are_in_time() -> Iterator[dict[str, Any]]:
        for cell in cells:
            if time.monotonic() + parse_duration(groups[cell["group"]].budget) < end:
                yield cell

    def measure_cell(cell: dict[str, Any]) -> dict[str, Any]:
        return measure(cell, groups[cell["group"]], options.data, read_rows(options.csv), options.runs, train)

    measure_missing(are_in_time(), measure_cell, options.csv, COLUMNS)
    print(table(read_rows(options.csv)))


if __name__ == "__main__":
    main()
