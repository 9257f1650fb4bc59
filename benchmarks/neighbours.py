"""Training speed in two trees of mixlab, in turns: alone, and beside other programs on the same cores.

    python benchmarks/neighbours.py speed BEFORE AFTER [--models NAME...] [--beside WHAT...] [--rounds 15]
    python benchmarks/neighbours.py first BEFORE AFTER [--rounds 15]
    python benchmarks/neighbours.py budget BEFORE AFTER [--budget 180] [--rounds 1]
    python benchmarks/neighbours.py muon BEFORE AFTER [--rounds 15]

BEFORE and AFTER are checkouts (`git worktree add BEFORE COMMIT`); the same one twice is run once. speed: steps a
second of a training of 32-pixel noise by every core, between its third second and its end, with the peak of what it
and its other processes hold (their shares of what they share), and whether both trees end with the same weights.
beside: nothing; `nice`, another training at nice 15; `loop`, one busy Python loop; `torch`, a torch program with a
thread for each core. first: the time of a training of one step as a whole. budget: steps of a `--budget`, alone and
beside `torch` from its start to a third of it, and from there to five ninths. muon: an update of all matrices. Prints
a row of JSON for every run, and a table. Nothing else may run meanwhile.
"""

import argparse
import contextlib
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WARM_SECONDS = 3.0
MODELS = {  # arguments of the training: eight to fifteen seconds on two quiet cores
    "digits": ["digits", "--steps", "500"],
    "mixer_micro4": ["DATA", "--model", "mixer_micro4", "--steps", "70", "--batch-size", "256"],
    "mixer_pyramid_mini2": ["DATA", "--model", "mixer_pyramid_mini2", "--steps", "45", "--batch-size", "128"],
    "mixer_pyramid_nano2": ["DATA", "--model", "mixer_pyramid_nano2", "--steps", "32", "--batch-size", "128"],
    "mixer_pyramid_nano4": [
        "DATA",
        "--model",
        "mixer_pyramid_nano4",
        "--image-size",
        "64",
        "--steps",
        "60",
        "--batch-size",
        "64",
    ],
    "mixer_nano4": ["DATA", "--model", "mixer_nano4", "--steps", "35", "--batch-size", "128"],
    "resnet": ["DATA", "--model", "timm/baseline_resnet_micro", "--steps", "60", "--batch-size", "64"],
}
RECIPE = ["--recipe", "small_images", "--val-fraction", "0.05", "--early-stop", "0"]
TRAIN = """
import sys
from mixlab.cli import main
try:
    from mixlab.planning import train as loop
except ImportError:  # an older tree
    from mixlab.training import loop

def finish(*arguments, **options):
    raise SystemExit(0)  # no report

if "--budget" not in sys.argv:
    loop.finish = finish
sys.exit(main(sys.argv[1:]))
"""
LOOP = "while True: pass"
TORCH = "import torch\na = torch.randn(700, 700)\nwhile True: a @ a"
MUON = """
import contextlib, sys, time, torch
from mixlab.models.catalog import create_model
from mixlab.training.optimizer import OptimizerConfig, build_optimizer
try:
    from mixlab.threads import one_core_each
except ImportError:
    one_core_each = contextlib.nullcontext
model = create_model(sys.argv[1])
optimizer = build_optimizer(model, OptimizerConfig(name="muon"))
for parameter in model.parameters():
    parameter.grad = torch.randn_like(parameter)
for group in optimizer.param_groups:
    group["lr"] = 1e-3
times = []
with one_core_each():
    for _ in range(int(sys.argv[2])):
        began = time.perf_counter()
        optimizer.step()
        times.append(time.perf_counter() - began)
print(sorted(times)[len(times) // 2])
"""


def environment(tree: Path) -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"} | {
        "PYTHONPATH": str(tree)
    }


def train(tree: Path, arguments: list[str], run: Path) -> dict[str, Any]:
    """One training: its speed, its peak of memory, its time as a whole, its weights."""
    command = [sys.executable, "-c", TRAIN, "train", *arguments, "--run", str(run)]
    began = time.monotonic()
    process = subprocess.Popen(
        command, env=environment(tree), cwd=run.parent, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    peaks: list[int] = []
    watch = threading.Thread(target=_watch, args=(process, peaks))
    watch.start()
    _, errors = process.communicate()
    watch.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} in {tree}: {errors.decode()[-2000:]}")
    seconds = time.monotonic() - began
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [(row["step"], row["seconds"]) for row in rows if row.get("event", row.get("kind")) == "train"]
    later = [step for step in steps if step[1] >= WARM_SECONDS]
    rate = (later[-1][0] - later[0][0]) / (later[-1][1] - later[0][1]) if len(later) > 1 else None
    return {
        "steps_a_second": rate,
        "steps": steps[-1][0],
        "train_seconds": steps[-1][1],
        "seconds": seconds,
        "peak_mib": round(max(peaks, default=0) / 2**20),
        "weights": _digest(run / "weights.safetensors"),
    }


def _digest(path: Path) -> str:
    content = path.read_bytes()
    return hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()[:16]


def _watch(process: "subprocess.Popen[bytes]", peaks: list[int]) -> None:
    while process.poll() is None:
        peaks.append(sum(map(_share, [process.pid, *_children(process.pid)])))
        time.sleep(0.25)


def _children(pid: int) -> list[int]:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]
    return []


def _share(pid: int) -> int:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/smaps_rollup") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("Pss:"))
    return 0


@contextlib.contextmanager
def beside(what: str, place: Path, tree: Path) -> Iterator[None]:
    """Another program, until the end."""
    commands = {
        "loop": [sys.executable, "-c", LOOP],
        "torch": [sys.executable, "-c", TORCH],
        "nice": ["nice", "-n", "15", sys.executable, "-m", "mixlab", "train", "digits", "--steps", "1000000",
                 "--run", str(place / "beside")],
    }  # fmt: skip
    if what == "nothing":
        yield
        return
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(commands[what], env=environment(tree), cwd=place, stdout=quiet, stderr=quiet)
    try:
        time.sleep(8.0 if what == "nice" else 3.0)
        yield
    finally:
        process.kill()
        process.wait()
        subprocess.run(["rm", "-rf", str(place / "beside")], check=True)


def noise(folder: Path) -> str:
    """2000 images of 32 pixels in ten classes."""
    import numpy as np
    from PIL import Image

    draws = np.random.default_rng(0)
    for label in range(10):
        (folder / f"class{label}").mkdir(parents=True)
        for number in range(200):
            pixels = draws.integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"class{label}" / f"{number}.png")
    return str(folder)


def speed(trees: list[Path], options: argparse.Namespace, place: Path) -> None:
    data = noise(place / "data")
    rows: list[dict[str, Any]] = []
    for round_ in range(options.rounds):
        for model in options.models:
            arguments = [data if word == "DATA" else word for word in MODELS[model]]
            arguments += RECIPE if model != "digits" else []
            for what in options.beside:
                for side in sides(trees, round_):
                    with beside(what, place, trees[side]):
                        found = train(trees[side], arguments, place / f"run{len(rows)}")
                    rows.append({"model": model, "beside": what, "side": side, "round": round_} | found)
                    print(json.dumps(rows[-1]), flush=True)
    for model in options.models:
        for what in options.beside:
            if trees[0] != trees[1]:
                show(f"{model} beside {what}", rows, {"model": model, "beside": what})
        if "nothing" in options.beside:
            show_shares(model, rows, options.beside)


def show_shares(model: str, rows: list[dict[str, Any]], places: list[str]) -> None:
    """What is left of the speed beside others, of that of the same round alone: median, least and most."""
    rates = {
        (row["side"], row["round"], row["beside"]): row["steps_a_second"]
        for row in rows
        if row["model"] == model
    }
    for side in sorted({side for side, _, _ in rates}):
        for what in places[1:]:
            shares = [
                rate / rates[side, round_, "nothing"]
                for (own, round_, beside), rate in rates.items()
                if own == side and beside == what
            ]
            spread = f"{statistics.median(shares):.2f} ({min(shares):.2f} to {max(shares):.2f})"
            print(f"| {model} in tree {side} beside {what} | {spread} | n = {len(shares)} |", flush=True)


def sides(trees: list[Path], round_: int) -> tuple[int, ...]:
    """In which order the trees are run."""
    if trees[0] == trees[1]:
        return (1,)
    return (0, 1) if round_ % 2 else (1, 0)


def show(title: str, rows: list[dict[str, Any]], wanted: dict[str, Any]) -> None:
    """The ratio after / before of each figure, pair by pair: mean with its 95 % interval."""
    chosen = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    columns = [[row for row in chosen if row["side"] == side] for side in (0, 1)]
    same = {row["weights"] for row in chosen if "weights" in row}
    for key in ("steps_a_second", "seconds", "peak_mib"):
        pairs = [(a[key], b[key]) for a, b in zip(*columns, strict=True) if a.get(key) and b.get(key)]
        if not pairs:
            continue
        ratios = [b / a for a, b in pairs]
        mean = statistics.mean(ratios)
        half = interval(ratios)
        before, after = (statistics.median(values) for values in zip(*pairs, strict=True))
        print(
            f"| {title} | {key} | {before:.2f} | {after:.2f} | {mean:.3f} ({mean - half:.3f} to {mean + half:.3f}) | "
            f"n = {len(ratios)} | {len(same)} different weights |",
            flush=True,
        )


def interval(values: list[float]) -> float:
    """Half of the 95 % interval of a mean."""
    if len(values) < 2:
        return float("nan")
    from scipy.stats import t

    return float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5


def first_step(trees: list[Path], options: argparse.Namespace, place: Path) -> None:
    """A training of one step, as a whole."""
    rows: list[dict[str, Any]] = []
    for round_ in range(options.rounds + 1):
        for side in sides(trees, round_):
            found = train(trees[side], ["digits", "--steps", "1"], place / f"one{len(rows)}")
            rows.append({"side": side, "round": round_} | found)
    show("a training of one step", [row for row in rows if row["round"]], {})


def budget(trees: list[Path], options: argparse.Namespace, place: Path) -> None:
    data = noise(place / "data")
    third = options.budget / 3
    rows: list[dict[str, Any]] = []
    for round_ in range(options.rounds):
        for name, begins, ends in (
            ("alone", 0.0, 0.0),
            ("first third", 0.0, third),
            ("then", third, third * 5 / 3),
        ):
            for side in sides(trees, round_):
                arguments = [
                    data,
                    *RECIPE,
                    "--budget",
                    f"{options.budget:.0f}s",
                    "--model",
                    "mixer_pyramid_mini2",
                ]
                stop = threading.Event()
                other = threading.Thread(target=_between, args=(begins, ends, stop, trees[side]))
                other.start()
                found = train(trees[side], arguments, place / f"budget{len(rows)}")
                stop.set()
                other.join()
                rows.append({"when": name, "side": side, "round": round_} | found)
                print(json.dumps(rows[-1]), flush=True)


def _between(begins: float, ends: float, stop: threading.Event, tree: Path) -> None:
    if ends <= begins or stop.wait(begins):
        return
    process = subprocess.Popen([sys.executable, "-c", TORCH], env=environment(tree))
    stop.wait(ends - begins)
    process.kill()
    process.wait()


def muon(trees: list[Path], options: argparse.Namespace, place: Path) -> None:
    for model, times in (("mixer_pyramid_nano2", 60), ("mixer_s16", 8)):
        rows: list[dict[str, Any]] = []
        for round_ in range(options.rounds):
            for side in sides(trees, round_):
                command = [sys.executable, "-c", MUON, model, str(times)]
                done = subprocess.run(
                    command, env=environment(trees[side]), capture_output=True, text=True, check=True
                )
                rows.append({"side": side, "seconds": float(done.stdout)})
        show(f"Muon's step, {model}", [row | {"seconds": 1000 * row["seconds"]} for row in rows], {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["speed", "first", "budget", "muon"])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--budget", type=float, default=180)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["digits", "mixer_micro4",
                        "mixer_pyramid_mini2", "mixer_pyramid_nano2"])  # fmt: skip
    parser.add_argument(
        "--beside", nargs="+", choices=["nothing", "nice", "loop", "torch"], default=["nothing"]
    )
    options = parser.parse_args()
    trees = [options.before.resolve(), options.after.resolve()]
    ways = {"speed": speed, "first": first_step, "budget": budget, "muon": muon}
    with tempfile.TemporaryDirectory() as folder:
        ways[options.what](trees, options, Path(folder))


if __name__ == "__main__":
    main()
