"""Trainings killed at random instants and resumed to the end: are the final bits those of the undisturbed run?

    python -m benchmarks.reliability.kills [--trials 300] [--signal KILL|TERM] [--seed 0] [--json FILE]

A small training with everything on that draws random numbers or keeps state (crop, flip, erasing, TrivialAugment,
mixup, CutMix, stochastic depth, EMA, accumulation, one thread), which saves after every step that finds the writer
idle. KILL: the process is killed one to three times on its way, at random instants, every third time as soon as a
half-written checkpoint is seen. TERM: it is asked to stop and must exit with 143 within 10 seconds. It is resumed to
its end, and the SHA-256 of model, EMA, optimizer and the deliverable are compared, and the log's steps. Children
are forked from a process that has imported everything, and leave out the report, which is not what is tested.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import mixlab
from mixlab.checkpoint.store import load_newest_checkpoint, load_weights
from mixlab.report.run_log import read_run_log
from mixlab.report.screen import Screen
from mixlab.training import loop
from mixlab.training.signals import Interrupted

STEPS = 60
BEFORE_TRAINING = 99  # exit status of a process stopped while it was still reading the data
OPTIONS: dict[str, Any] = {
    "augment__crop": "pad", "augment__flip": True, "augment__erase_prob": 0.3, "augment__mixup_alpha": 0.4,
    "augment__cutmix_alpha": 1.0, "augment__policy": "trivialaugment", "model__stochastic_depth": 0.2,
    "ema_decay": 0.9, "accumulate": 2, "batch_size": 32, "threads": 1, "steps": STEPS, "epochs": None,
    "keep_weights": "last", "checkpoint_seconds": 0.0,
}  # fmt: skip


def start(run: Path, *, fresh: bool) -> int:
    """A child process that trains in `run`, or goes on with it; its number."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        loop.finish = lambda *_, **__: {}  # type: ignore[assignment]
        signal.signal(
            signal.SIGTERM, lambda *_: os._exit(BEFORE_TRAINING)
        )  # until training catches it itself
        if fresh:
            mixlab.train("digits", "digits", run=run, screen=Screen(quiet=True), **OPTIONS)
        else:
            loop.resume(run, screen=Screen(quiet=True))
        status = 0
    except Interrupted as interrupted:
        status = interrupted.exit_status
    except BaseException as error:
        print(f"{run.name}: {type(error).__name__}: {error}", file=sys.stderr)
    finally:
        os._exit(status)


def fingerprint(run: Path) -> dict[str, str]:
    """SHA-256 of every tensor group of the last checkpoint and of the weights, and the steps in the log."""
    found = {}
    checkpoint, _ = load_newest_checkpoint(run / "checkpoints")
    groups = checkpoint.tensors | {"weights": load_weights(run).model.state_dict()}
    for name, tensors in groups.items():
        digest = hashlib.sha256()
        for key in sorted(tensors):
            digest.update(
                key.encode() + tensors[key].contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            )
        found[name] = digest.hexdigest()
    log = read_run_log(run / "metrics.jsonl")
    found["log"] = json.dumps([(row["step"], row["loss"]) for row in log if row["event"] == "train"])
    found["step"] = str(checkpoint.step)
    return found


def wait(child: int, seconds: float) -> int | None:
    """The exit status within `seconds`, negative for a signal; None if it goes on."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.0005)
    return None


def half_written(run: Path) -> bool:
    folder = run / "checkpoints"
    return folder.is_dir() and any(name.startswith(".step") for name in os.listdir(folder))


def disturb(
    run: Path, draw: random.Random, seconds: float, number: signal.Signals, inside: bool
) -> dict[str, Any]:
    """Start or go on with `run` and send it the signal at a random instant; what happened."""
    child = start(run, fresh=not (run / "recipe.toml").exists())
    instant = time.monotonic() + draw.uniform(0, seconds)
    status = wait(child, instant - time.monotonic())
    if inside:
        give_up = time.monotonic() + 2 * seconds
        while status is None and not half_written(run) and time.monotonic() < give_up:
            status = wait(child, 0.0002)
    hit = half_written(run)
    if status is not None:  # it had ended already
        return {"status": status, "sent": False, "inside": False, "seconds": 0.0}
    os.kill(child, number)
    sent = time.monotonic()
    status = wait(child, 30)
    if status is None:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return {"status": status, "sent": True, "inside": hit, "seconds": time.monotonic() - sent}


def try_one(
    folder: Path, draw: random.Random, seconds: float, number: signal.Signals, inside: bool
) -> dict[str, Any]:
    run = folder / "run"
    times = 1 if number == signal.SIGTERM else draw.randint(1, 3)
    hits = [disturb(run, draw, seconds, number, inside) for _ in range(times)]
    last = wait(start(run, fresh=not (run / "recipe.toml").exists()), 120)
    return {"hits": hits, "last": last, "found": fingerprint(run) if last == 0 else {}}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--signal", choices=("KILL", "TERM"), default="KILL")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    number = signal.Signals[f"SIG{options.signal}"]
    draw = random.Random(options.seed)
    began = time.monotonic()
    equal = sent = inside = late = before = wrong_status = 0
    problems: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        calm = Path(name) / "calm"
        if wait(start(calm, fresh=True), 120) != 0:
            raise SystemExit("the undisturbed run failed")
        first = time.monotonic() - began
        expected = fingerprint(calm)
        for trial in range(options.trials):
            with tempfile.TemporaryDirectory(dir=name) as folder:
                result = try_one(Path(folder), draw, first, number, inside=trial % 3 == 0)
            equal += result["found"] == expected
            for hit in result["hits"]:
                sent += hit["sent"]
                inside += hit["inside"]
                late += hit["seconds"] > 10
                if number == signal.SIGTERM and hit["sent"]:
                    before += hit["status"] == BEFORE_TRAINING
                    wrong_status += hit["status"] not in (143, BEFORE_TRAINING, 0)
            if result["found"] != expected:
                different = [key for key in expected if result["found"].get(key) != expected[key]]
                problems.append({"trial": trial, "different": different, **result, "found": None})
                print(problems[-1], flush=True)
            if (trial + 1) % 25 == 0:
                print(f"{trial + 1} trials, {equal} equal, {time.monotonic() - began:.0f} s", flush=True)
    result = {
        "signal": options.signal, "trials": options.trials, "equal": equal, "signals_sent": sent,
        "inside_a_save": inside, "later_than_10_s": late, "before_training": before,
        "wrong_status": wrong_status, "seed": options.seed,
        "seconds": round(time.monotonic() - began), "problems": problems,
    }  # fmt: skip
    print({key: value for key, value in result.items() if key != "problems"})
    if options.json:
        options.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
