"""Whether another commit trains to the same bits: weights, losses and predictions of many small trainings in both.

    python -m benchmarks.golden --against COMMIT [--only NAME...]

COMMIT is checked out beside this tree. Every case is trained by each, one after the other, by real commands in
processes of their own, on images made by formula; a row of JSON for each says what differed. Exit status 1 if
anything did. Bits depend on the processor and on torch, so that nothing is stored and only two trees on one machine
are compared. A clock that counts steps takes the place of the real one where a budget is tried.
"""

import argparse
import csv
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]
SIDE, NUM_CLASSES, NUM_IMAGES = 16, 4, 40  # pixels; images of each class
STOPPED = 143
DRIVER = """
import os, signal, sys, time
import mixlab
from mixlab.cli import main
from torch.optim.optimizer import register_optimizer_step_post_hook

began, num_steps = time.monotonic(), 0

def count(*arguments):
    global num_steps
    num_steps += 1
    if num_steps == int(os.environ.get("STOP_AFTER", "0")):
        os.kill(os.getpid(), signal.SIGTERM)

register_optimizer_step_post_hook(count)
if "STEP_SECONDS" in os.environ:
    mixlab.STARTED = began
    time.monotonic = lambda: began + float(os.environ["STEP_SECONDS"]) * num_steps
sys.exit(main(sys.argv[1:]))
"""
SHORT = "train DATA --recipe small_images_flat --image-size 16 --batch-size 32 --early-stop 0"
FLAT = f"{SHORT} --model mixer_pico4 --epochs 3"
PYRAMID = (
    "train DATA --recipe small_images --image-size 16 --model mixer_pyramid_micro2 --batch-size 32 --early-stop 0 "
    "--epochs 2"
)
TUNE = "finetune DATA --weights weights --image-size 16 --lr-grid 0.003,0.03"
DIGITS = "train digits --recipe digits --epochs 2"


@dataclass(frozen=True)
class Command:
    """A command of mixlab into the run `run`, by `ranks` processes, cut off after `stop_after` updates."""

    words: str
    run: str = "run"
    ranks: int = 1
    stop_after: int = 0
    step_seconds: float = 0.0

    def start(self, tree: Path, place: Path, data: Path) -> None:
        """Run it in `place` with the code of `tree`; RuntimeError where it does not end as it should."""
        words = [str(data) if word == "DATA" else word for word in self.words.split()]
        words += [] if "--resume" in words else ["--run", self.run]
        (place / "driver.py").write_text(DRIVER)
        program = ["driver.py"] if self.ranks == 1 else [
            "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.ranks}", "--", "driver.py",
        ]  # fmt: skip
        environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
        environment |= {"PYTHONPATH": str(tree)}
        if self.stop_after:
            environment["STOP_AFTER"] = str(self.stop_after)
        if self.step_seconds:
            environment["STEP_SECONDS"] = str(self.step_seconds)
        done = subprocess.run(
            [sys.executable, *program, *words], cwd=place, env=environment, capture_output=True, text=True
        )
        ends = (
            (0,) if not self.stop_after else (STOPPED,) if self.ranks == 1 else (STOPPED, 1)
        )  # torchrun says 1
        if done.returncode not in ends:
            raise RuntimeError(f"{self.words} in {tree} ended with {done.returncode}: {done.stderr[-1000:]}")


def flat(options: str = "", **others: Any) -> tuple[Command, ...]:
    return (Command(f"{FLAT} {options}", **others),)


def pyramid(options: str = "", **others: Any) -> tuple[Command, ...]:
    return (Command(f"{PYRAMID} {options}", **others),)


def stopped(words: str, after: int, **others: Any) -> tuple[Command, ...]:
    """Stopped in the middle of an epoch, and gone on with."""
    return (Command(words, stop_after=after, **others), Command("train --resume run", **others))


# Two shards are the same sum for any number of ranks; every third image is stored larger than the model's input.
CASES: dict[str, tuple[Command, ...]] = {
    "digits": (Command(DIGITS),),
    "flat": flat(),
    "flat, one thread": flat("--threads 1"),
    "pyramid, fp32": pyramid("--precision fp32"),
    "pyramid, bf16": pyramid("--precision bf16"),
    "timm's ViT": (Command(f"{SHORT} --model timm/baseline_vit_micro --epochs 3"),),
    "timm's ResNet": (Command(f"{SHORT} --model timm/baseline_resnet_micro --epochs 3"),),
    "accumulation": flat("--accumulate 2 --fast false"),
    "accumulation, fast": flat("--accumulate 2"),
    "moving average": flat("--ema-decay 0.9"),
    "SAM": flat("--optimizer.sam-rho 0.05 --optimizer.name adamw --lr 0.002"),
    "GSAM": flat(
        "--optimizer.sam-rho 0.6 --optimizer.sam-rho-end 0.1 --optimizer.gsam-alpha 0.4 "
        "--optimizer.name adamw --lr 0.002"
    ),
    "autocast": flat("--precision bf16 --fast false"),
    "recomputed blocks": flat("--checkpoint-blocks true"),
    "stochastic depth": flat("--model.stochastic-depth 0.2 --fast false"),
    "distillation": (
        Command(FLAT, run="teacher"),
        Command(f"{PYRAMID} --distill.teacher teacher --seed 1"),
    ),
    "stem as drawn": flat("--whiten-stem false"),
    "mixup and CutMix": flat("--augment.mixup-alpha 0.3 --augment.cutmix-alpha 1.0"),
    "classes weighed": flat("--loss.class-weights balanced"),
    "sigmoid loss": flat("--loss.name sigmoid --label-smoothing 0"),
    "nothing held out": flat("--val-fraction 0"),
    "early stop": flat("--early-stop 1 --epochs 8 --lr 0.3"),
    "permuted pixels": flat("--data.permutation global"),
    "exact shards, one rank": flat("--virtual-shards 2"),
    "exact shards, two ranks": flat("--virtual-shards 2", ranks=2),
    "SAM in shards, two ranks": flat(
        "--virtual-shards 2 --optimizer.sam-rho 0.05 --optimizer.name adamw --lr 0.002", ranks=2
    ),
    "DDP": flat(ranks=2),
    "FSDP": flat("--parallel fsdp --optimizer.name adamw --lr 0.002", ranks=2),
    "streamed by two workers": flat("--in-memory false --data.num-workers 2 --augment.crop resized"),
    "resumed": stopped(FLAT, 5),
    "resumed pyramid": stopped(f"{PYRAMID} --ema-decay 0.9", 6),
    "resumed FSDP": stopped(f"{FLAT} --parallel fsdp --optimizer.name adamw --lr 0.002", 5, ranks=2),
    "learning rates tried": (
        Command(FLAT, run="weights"),
        Command(f"{TUNE} --lr-share 0.5 --epochs 4 --batch-size 16"),
    ),
    "a budget": (Command(f"{SHORT} --model mixer_pico4 --budget 60s", step_seconds=0.5),),
    "a budget that chooses the size": (
        Command("train DATA --recipe small_images --image-size 16 --batch-size 32 --budget 60s", step_seconds=0.7),
    ),
    "a budget with learning rates": (
        Command(FLAT, run="weights"),
        Command(f"{TUNE} --budget 60s", step_seconds=0.5),
    ),
}  # fmt: skip


def write_pictures(folder: Path) -> Path:
    """Waves of a direction for each class, with noise."""
    import numpy as np
    from PIL import Image

    draws = np.random.default_rng(0)
    for label in range(NUM_CLASSES):
        (folder / f"class{label}").mkdir(parents=True)
        for number in range(NUM_IMAGES):
            side = SIDE * (1 + (number % 3 == 0))
            y, x = np.mgrid[0:side, 0:side] / side
            angle = np.pi * label / NUM_CLASSES
            wave = np.sin(9 * (x * np.cos(angle) + y * np.sin(angle)) + draws.uniform(0, 6))
            pixels = 128 + 60 * wave[..., None] + draws.normal(0, 40, (side, side, 3))
            name = folder / f"class{label}" / f"{number}.png"
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(name)
    return folder


@contextmanager
def checked_out(commit: str, folder: Path) -> Iterator[Path]:
    """The tree of `commit`, until the end."""
    tree = folder / "against"
    subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(tree), commit], cwd=HERE, check=True)
    try:
        yield tree
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=HERE, check=True)


def outcome(run: Path) -> dict[str, Any]:
    """What must be the same of a run: weights, every row of the log without times, predictions, length."""
    content = (run / "weights.safetensors").read_bytes()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = ("event", "step", "epoch", "loss", "accuracy", "lr", "top1", "ece")
    numbers = [
        {key: row[key] for key in kept if key in row}
        for row in rows
        if row["event"] in ("train", "validation")
    ]
    said = _rows(run / "predictions.csv")
    calibrated = "temperature" in json.loads((run / "config.json").read_text())
    return {
        "weights": _digest(content[8 + int.from_bytes(content[:8], "little") :]),
        "log": numbers,
        "predictions": _digest(json.dumps([row[:3] for row in said]).encode()),
        # Commits before the calibration write the probabilities of the logits as they are: no comparison then.
        "probabilities": {calibrated: _digest(json.dumps([row[3:] for row in said]).encode())},
        "steps": rows[-1]["step"],
        "tried": rows[-1].get("grid"),
    }


def _rows(path: Path) -> list[list[str]]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.reader(file))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def compare(name: str, trees: tuple[Path, Path], place: Path, data: Path) -> dict[str, Any]:
    """A row: the case, what differs, its length and last loss."""
    found = []
    for tree in trees:
        own = place / f"{list(CASES).index(name)}-{trees.index(tree)}"
        own.mkdir()
        try:
            for command in CASES[name]:
                command.start(tree, own, data)
        except RuntimeError as error:
            return {"case": name, "differs": ["everything"], "error": str(error)}
        found.append(outcome(own / "runs" / "run"))
    before, after = found
    if before["probabilities"].keys() != after["probabilities"].keys():
        after["probabilities"] = before["probabilities"]
    differs = [key for key in before if before[key] != after[key]]
    losses = [row["loss"] for row in after["log"] if row["event"] == "train"]
    return {
        "case": name,
        "differs": differs,
        "steps": after["steps"],
        "loss": losses[-1],
        "weights": after["weights"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", required=True, metavar="COMMIT")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="NAME")
    parser.add_argument("--at-once", type=int, default=1, help="cases; bits do not depend on it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, checked_out(options.against, Path(folder)) as tree:
        place = Path(folder)
        data = write_pictures(place / "data")
        with ThreadPoolExecutor(options.at_once) as pool:
            rows = []
            for row in pool.map(lambda name: compare(name, (tree, HERE), place, data), options.only):
                rows.append(row)
                print(json.dumps(row), flush=True)
    different = [row["case"] for row in rows if row["differs"]]
    print(
        f"{len(rows) - len(different)} of {len(rows)} cases are equal"
        + "".join(f"; not {name}" for name in different)
    )
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
