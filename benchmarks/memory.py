"""Peak memory of training and inference beside what `mixlab info` says; writes docs/memory.md.

    python benchmarks/memory.py [--only WORD...] [--times] [--steps 3]

Every figure is the peak resident memory of a process of its own, which other processes do not disturb; times they do,
so seconds are only kept with --times, when nothing else runs: three rounds, in which all rows take turns.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS, PAGE = ROOT / "docs" / "results" / "memory.json", ROOT / "docs" / "memory.md"
#       model, side, batch size
MIXERS = (("mixer_s16", 224, 32), ("mixer_b16", 224, 32), ("mixer_nano4", 32, 256))
TIMM = (("timm/vit_small_patch16_224", 224, 32), ("timm/resnet18", 224, 32), ("timm/mixer_s16_224", 224, 32))
#          recipe keys
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpoint_blocks": {"checkpoint_blocks": True},
    "accumulate 4": {"accumulate": 4},
    "both": {"checkpoint_blocks": True, "accumulate": 4},
}
NUM_CLASSES, ROUNDS = 1000, 3


def jobs() -> dict[str, dict[str, Any]]:
    """Everything that is measured, by name."""
    found: dict[str, dict[str, Any]] = {}
    for model, side, batch_size in (*MIXERS, *TIMM):
        common = {"model": model, "side": side, "batch_size": batch_size}
        own_passes = {"fast": False} if model == "mixer_s16" else None
        for variant, keys in VARIANTS.items():
            found[f"{model} training, {variant}"] = common | {
                "mode": "train",
                "variant": variant,
                "keys": keys,
            }
            if own_passes:
                found[f"{model} training by torch's passes, {variant}"] = common | {
                    "mode": "train", "variant": f"{variant}, fast false", "keys": keys | own_passes,
                }  # fmt: skip
        found[f"{model} inference"] = common | {"mode": "inference", "variant": "plain", "keys": {}}
    return found


def measure(job: dict[str, Any], steps: int) -> dict[str, Any]:
    """What the job needs in this process, which has done nothing else."""
    import timm  # noqa: F401  (part of the process that the model's memory is added to, as in `info`)
    import torch

    from mixlab.cpu.cost import measure_cost
    from mixlab.cpu.inference import fast
    from mixlab.data.loader import Batch
    from mixlab.device import current_memory_bytes, peak_memory_bytes, return_memory, set_threads
    from mixlab.models.catalog import create_model
    from mixlab.models.recompute import checkpoint_blocks
    from mixlab.training.clock import Clock
    from mixlab.training.objectives.labels import Labels
    from mixlab.training.recipe import Recipe
    from mixlab.training.step import TrainState, train_step

    set_threads(None)
    side, batch_size = job["side"], job["batch_size"]
    before = current_memory_bytes()
    model = create_model(job["model"], num_classes=NUM_CLASSES, image_size=side)
    image = torch.randn(batch_size, 3, side, side)
    label = torch.arange(batch_size) % NUM_CLASSES
    recipe = Recipe(batch_size=batch_size, steps=steps, **job["keys"])
    seconds = []
    if job["mode"] == "train":
        if recipe.checkpoint_blocks:
            checkpoint_blocks(model)
            return_memory()
        state = TrainState(
            model.train(), recipe, Labels(recipe.loss, label.numpy(), NUM_CLASSES), torch.device("cpu")
        )
        for step in range(steps):
            began = time.perf_counter()
            train_step(
                state, Batch(inputs=image, label=label, index=label), Clock(state.recipe.steps, step=step)
            )
            seconds.append(time.perf_counter() - began)
    else:
        ready = fast(model.eval())
        with torch.inference_mode():
            for _ in range(steps):
                began = time.perf_counter()
                ready(image)
                seconds.append(time.perf_counter() - began)
    peak = peak_memory_bytes()
    cost = measure_cost(
        model, (side, side), batch_size=batch_size, accumulate=recipe.accumulate, fast=recipe.fast
    )
    needed = cost.training_bytes if job["mode"] == "train" else cost.inference_bytes
    return {
        "process_bytes": before,
        "peak_bytes": peak,
        "predicted_bytes": before + needed,
        "seconds": statistics.median(seconds[1:]),
    }


def in_a_process(job: dict[str, Any], steps: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.memory", "--steps", str(steps), "--job", json.dumps(job)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{job} failed: {done.stderr[-2000:]}")
    value: dict[str, Any] = json.loads(done.stdout)
    return value


def page(results: dict[str, Any]) -> str:
    lines = [
        "# Memory", "",
        "Written by `python benchmarks/memory.py` from docs/results/memory.json; do not edit.",
        "Peak resident memory of",
        "a fresh process that takes a few steps of AdamW (or forward passes), with torch and timm loaded: all of",
        "it, and without the process as it was before the model. `mixlab info` is how far off the command was.", "",
    ]  # fmt: skip
    rows = list(results.values())
    for mode, title in (("train", "Training"), ("inference", "Inference")):
        lines += [
            f"## {title}", "",
            "| model | batch | variant | peak MiB | without the process | of plain | `mixlab info` | step time |",
            "|---|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        for row in rows:
            if row["mode"] != mode:
                continue
            plain = _plain(results, row)
            own, of_plain = (one["peak_bytes"] - one["process_bytes"] for one in (row, plain))
            off = row["predicted_bytes"] / row["peak_bytes"] - 1
            what = f"{row['model']} | {row['batch_size']} of {row['side']} px | {row['variant']}"
            memory = (
                f"{row['peak_bytes'] / 2**20:,.0f} | {own / 2**20:,.0f} | {own / of_plain:.0%} | {off:+.0%}"
            )
            lines.append(f"| {what} | {memory} | {_time(row, plain)} |")
        lines.append("")
    places = sorted({row["machine"] for row in rows})
    commits = sorted({row["commit"] for row in rows})
    return "\n".join([*lines, f"{'; '.join(places)}. Commit {', '.join(commits)}, n=1 a row.", ""])


def _plain(results: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """The row of the same model and passes with nothing switched on."""
    _, comma, passes = row["variant"].partition(", ")
    wanted = {key: row[key] for key in ("model", "mode")} | {"variant": f"plain{comma}{passes}"}
    return next((one for one in results.values() if wanted.items() <= one.items()), row)


def _time(row: dict[str, Any], plain: dict[str, Any]) -> str:
    if "seconds" not in row or "seconds" not in plain:
        return "not yet measured"
    return f"{row['seconds']:.2f} s, {row['seconds'] / plain['seconds']:.2f}x"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", default=[""], help="words that a row's name contains, any of them"
    )
    parser.add_argument("--times", action="store_true", help="nothing else runs: keep the seconds too")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(json.dumps(measure(options.job, options.steps)))
        return
    from mixlab.device import describe_machine

    facts = describe_machine()
    machine = f"{facts['cores']} cores of {facts['cpu']}, torch {facts['versions']['torch']}"
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    results = json.loads(options.results.read_text()) if options.results.is_file() else {}
    chosen = {name: job for name, job in jobs().items() if any(word in name for word in options.only)}
    seconds: dict[str, list[float]] = {name: [] for name in chosen}
    for round_ in range(ROUNDS if options.times else 1):
        for name, job in chosen.items():
            row = in_a_process(job, options.steps)
            seconds[name].append(row.pop("seconds"))
            if options.times:
                row["seconds"] = statistics.median(seconds[name])
            elif "seconds" in results.get(name, {}):
                row["seconds"] = results[name]["seconds"]
            results[name] = (
                job | row | {"machine": machine, "commit": commit, "date": time.strftime("%Y-%m-%d")}
            )
            print(f"{name}: measured, round {round_ + 1}", file=sys.stderr)
            ordered = {name: results[name] for name in (*jobs(), *results) if name in results}
            options.results.write_text(json.dumps(ordered, indent=1) + "\n")
            options.page.write_text(page(ordered))


if __name__ == "__main__":
    main()
