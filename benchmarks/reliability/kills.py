"""Trainings killed at random instants and resumed to the end: are the final bits those of the undisturbed run?

    python -m benchmarks.reliability.kills [--trials 300] [--ranks 1,2] [--signal KILL|TERM] [--seed 0] [--json FILE]

A small training with everything on that draws random numbers or keeps state (crop, flip, erasing, TrivialAugment,
mixup, CutMix, stochastic depth, EMA, accumulation, one thread), which saves after every step that finds the writer
idle. KILL: the processes are killed one to three times on their way, at random instants, every third time as soon as
a half-written checkpoint is seen; of several ranks either all at once or one of them, after which the others must end
by themselves. TERM: they (or one of them) are asked to stop and all must exit with 143 within 10 seconds. The run is
then resumed to its end, and the SHA-256 of model, EMA, optimizer and the deliverable are compared, and the log's
steps. With several ranks the trials take turns; all run in exact mode (2 virtual shards), so that one undisturbed run
of one process is what all of them must equal, and every resume draws its number of ranks anew. Children are forked
from a process that has imported everything, and leave out the report, which is not what is tested.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mixlab
from benchmarks.reliability import ranks
from benchmarks.reliability.ranks import BEFORE_TRAINING
from mixlab.checkpoint.checkpoints import load_newest_checkpoint
from mixlab.checkpoint.sharded import read_shards
from mixlab.checkpoint.store import load_weights
from mixlab.report.run_log import read_run_log
from mixlab.report.screen import Screen

STEPS = 60
OPTIONS: dict[str, Any] = {
    "augment__crop": "pad", "augment__flip": True, "augment__erase_prob": 0.3, "augment__mixup_alpha": 0.4,
    "augment__cutmix_alpha": 1.0, "augment__policy": "trivialaugment", "model__stochastic_depth": 0.2,
    "ema_decay": 0.9, "accumulate": 2, "batch_size": 32, "threads": 1, "steps": STEPS, "epochs": None,
    "keep_weights": "last", "checkpoint_seconds": 0.0,
}  # fmt: skip


def start(run: Path, *, size: int = 1, **options: Any) -> list[int]:
    """Processes that train in `run`, or go on with it if it is there."""

    def job() -> None:
        if (run / "recipe.toml").exists():
            mixlab.resume(run, screen=Screen(quiet=True))
        else:
            mixlab.train("digits", "digits", run=run, screen=Screen(quiet=True), **(OPTIONS | options))

    return ranks.start(job, size=size)


def digest(tensors: dict[str, Tensor]) -> str:
    sha = hashlib.sha256()
    for key in sorted(tensors):
        sha.update(key.encode() + tensors[key].contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def fingerprint(run: Path) -> dict[str, str]:
    """SHA-256 of every tensor group of the last checkpoint and of the weights, and the steps in the log."""
    checkpoint, _ = load_newest_checkpoint(run / "checkpoints")
    groups = checkpoint.tensors
    if checkpoint.parts is not None:
        groups = read_shards(checkpoint.parts, lambda name, size, dtype: torch.empty(size, dtype=dtype))
    groups = groups | {"weights": load_weights(run).model.state_dict()}
    found = {name: digest(tensors) for name, tensors in groups.items()}
    log = read_run_log(run / "metrics.jsonl")
    found["log"] = json.dumps([(row["step"], row["loss"]) for row in log if row["event"] == "train"])
    found["step"] = str(checkpoint.step)
    return found


def half_written(run: Path) -> bool:
    folder = run / "checkpoints"
    return folder.is_dir() and any(name.startswith(".step") for name in os.listdir(folder))


def disturb(
    run: Path,
    draw: random.Random,
    seconds: float,
    number: signal.Signals,
    inside: bool,
    size: int,
    options: dict[str, Any],
) -> dict[str, Any]:
    """Start or go on with `run` and send it the signal at a random instant; what happened."""
    children = start(run, size=size, **options)
    instant = time.monotonic() + draw.uniform(0, seconds)
    statuses = ranks.wait(children, instant - time.monotonic())
    if inside:
        give_up = time.monotonic() + 2 * seconds
        while statuses is None and not half_written(run) and time.monotonic() < give_up:
            statuses = ranks.wait(children, 0.0002)
    hit = half_written(run)
    if statuses is not None:  # it had ended already
        return {"statuses": statuses, "sent": False, "inside": False, "seconds": 0.0}
    targets = children if draw.random() < 0.5 else [draw.choice(children)]
    ranks.kill(targets, number)
    sent = time.monotonic()
    statuses = ranks.wait(children, 30)
    if statuses is None:
        ranks.kill(children, signal.SIGKILL)
        ranks.wait(children, 10)
    return {
        "statuses": statuses, "sent": True, "inside": hit, "seconds": time.monotonic() - sent,
        "targets": len(targets), "size": size,
    }  # fmt: skip


def try_one(
    folder: Path,
    draw: random.Random,
    seconds: float,
    number: signal.Signals,
    inside: bool,
    sizes: tuple[int, ...] = (1,),
    **options: Any,
) -> dict[str, Any]:
    run = folder / "run"
    times = 1 if number == signal.SIGTERM else draw.randint(1, 3)
    hits = [disturb(run, draw, seconds, number, inside, draw.choice(sizes), options) for _ in range(times)]
    last_size = draw.choice(sizes)
    last = ranks.wait(start(run, size=last_size, **options), 120)
    return {"hits": hits, "last": last, "found": fingerprint(run) if last == [0] * last_size else {}}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--ranks", default="1", help="numbers of processes to draw from, such as 1,2")
    parser.add_argument("--signal", choices=("KILL", "TERM"), default="KILL")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    number = signal.Signals[f"SIG{options.signal}"]
    sizes = tuple(int(size) for size in options.ranks.split(","))
    extra = {"virtual_shards": max(sizes)} if max(sizes) > 1 else {}
    draw = random.Random(options.seed)
    began = time.monotonic()
    equal = sent = inside = late = before = wrong_status = single = 0
    problems: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        calm = Path(name) / "calm"
        if ranks.wait(start(calm, **extra), 120) != [0]:
            raise SystemExit("the undisturbed run failed")
        first = time.monotonic() - began
        expected = fingerprint(calm)
        trial = -1
        # A run that had ended before it was asked to says nothing about being asked.
        while (sent if number == signal.SIGTERM else trial + 1) < options.trials:
            trial += 1
            with tempfile.TemporaryDirectory(dir=name) as folder:
                result = try_one(
                    Path(folder), draw, first, number, inside=trial % 3 == 0, sizes=sizes, **extra
                )
            equal += result["found"] == expected
            for hit in result["hits"]:
                sent += hit["sent"]
                inside += hit["inside"]
                single += hit["sent"] and hit["size"] > hit["targets"]
                late += hit["seconds"] > 10
                if number == signal.SIGTERM and hit["sent"]:
                    before += BEFORE_TRAINING in (hit["statuses"] or ())
                    fine = (
                        {143, 0}
                        if BEFORE_TRAINING not in (hit["statuses"] or ())
                        else {143, 0, 1, BEFORE_TRAINING}
                    )
                    wrong_status += not set(hit["statuses"] or (None,)) <= fine
            if result["found"] != expected:
                different = [key for key in expected if result["found"].get(key) != expected[key]]
                problems.append({"trial": trial, "different": different, **result, "found": None})
                print(problems[-1], flush=True)
            if (trial + 1) % 25 == 0:
                print(f"{trial + 1} trials, {equal} equal, {time.monotonic() - began:.0f} s", flush=True)
    result = {
        "signal": options.signal, "trials": trial + 1, "ranks": options.ranks, "equal": equal,
        "signals_sent": sent, "to_one_rank_of_several": single, "inside_a_save": inside, "later_than_10_s": late,
        "before_training": before, "wrong_status": wrong_status, "seed": options.seed,
        "seconds": round(time.monotonic() - began), "problems": problems,
    }  # fmt: skip
    print({key: value for key, value in result.items() if key != "problems"})
    if options.json:
        options.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
