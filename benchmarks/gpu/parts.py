"""What a part measures, in its own process: rows are written as they are found."""

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from benchmarks.gpu import speed
from benchmarks.gpu.pictures import draw_pictures, list_pictures
from benchmarks.gpu.run import RESULTS, ROOT, WORK, append
from mixlab.device import pick_device

Write = Callable[[dict[str, Any]], None]
TRAINED = "mixer_pyramid_t2"  # for three minutes of CIFAR-10: the largest pyramid but one
CIFAR_SECONDS = 180
THREADS = (16, 8, 4, 2, 1)


class Job:
    """What a part knows: whether it is a rehearsal, its seconds, its folder, and where rows go."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.name, self.rehearse, self.cifar = options.part, options.rehearse, options.cifar
        self.end = time.monotonic() + options.seconds
        self.work = options.out / WORK / options.part
        self._results = options.out / RESULTS

    @property
    def device(self) -> str:
        """The one to measure. UsageError if a real run finds no GPU."""
        return pick_device("cpu" if self.rehearse else "cuda").type

    @property
    def seconds_left(self) -> float:
        return self.end - time.monotonic()

    def tell(self, kind: str, value: Any) -> None:
        """A line of the results: `row`, `facts`, `skipped` or `error`."""
        append(self._results, {"part": self.name, kind: value})

    def row(self, values: dict[str, Any]) -> None:
        self.tell("row", values)


def torch_facts() -> dict[str, Any]:
    """What torch says of this machine."""
    import torch

    from mixlab.device import describe_machine

    known = describe_machine()
    facts = {
        "torch": torch.__version__,
        "timm": known["versions"]["timm"],
        "cpu": known["cpu"],
        "cpu_capability": known["cpu_capability"],
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
    }
    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        facts |= {"memory_bytes": found.total_memory, "capability": [found.major, found.minor]}
        facts["cudnn"] = torch.backends.cudnn.version()
    return facts


def measure(options: argparse.Namespace) -> None:
    """Run a part; what it raises is told in the results too."""
    job = Job(options)
    try:
        job.tell("facts", torch_facts())
        MEASURES[job.name](job)
    except BaseException as error:
        traceback.print_exc()
        text = " ".join(str(error).split())
        job.tell("error", f"{type(error).__name__}: {text}"[:2000])
        sys.exit(1)


def mixlab(*words: object) -> dict[str, Any]:
    """What `mixlab WORDS --json` prints, in this process. RuntimeError if it fails."""
    from mixlab.cli import main

    command, output = [str(word) for word in words], io.StringIO()
    print("mixlab", *command, flush=True)
    with contextlib.redirect_stdout(output):
        try:
            main([*command, "--json", "--traceback"])
        except SystemExit as ended:
            status = ended.code
    print(output.getvalue())
    found: dict[str, Any] = json.loads(output.getvalue().splitlines()[-1]) if output.getvalue() else {}
    if status:
        raise RuntimeError(f"mixlab {' '.join(command)}: {found.get('error', status)}")
    return found


def spawned(*words: object) -> dict[str, Any]:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "mixlab", *map(str, words), "--json", "--traceback"]
    print(*command[2:], flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[2:])}: it ended with {done.returncode} (log.txt)")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def training_row(result: dict[str, Any], **more: Any) -> dict[str, Any]:
    """What is kept of what `mixlab train --json` printed."""
    kept = ("num_parameters", "epochs", "steps", "seconds", "images_per_second")
    test = result["test"] or {}
    return (
        more
        | {key: result[key] for key in kept}
        | {"test_top1": test.get("top1"), "num_test": test.get("num_images")}
    )


def doctor(job: Job) -> None:
    """`mixlab doctor`, and digits learnt on the device."""
    found = mixlab("doctor")
    job.row({"what": "mixlab doctor"} | found)
    length = ("--steps", 3) if job.rehearse else ("--epochs", 30)
    result = mixlab(
        "train", "digits", "--device", job.device, "--run", job.work / "digits", "--without-pictures", *length
    )
    job.row(training_row(result, what="mixlab train digits", device=job.device))


class _Reporter:
    """A plugin of pytest that writes a row for every test as it ends."""

    def __init__(self, write: Write) -> None:
        self._write = write
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        row = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
        if report.outcome == "failed":
            self.failed.append(report.nodeid)
            row["message"] = str(report.longrepr)[-1500:]
        elif report.outcome == "skipped":
            row["message"] = (
                report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            )
        self._write(row)


def tests(job: Job) -> None:
    """The tests marked gpu, on the GPU; in a rehearsal two of them on the CPU."""
    import pytest

    chosen = "cuda" if job.device == "cuda" else "not cuda and (logits and micro4 or scaler)"
    reporter = _Reporter(job.row)
    # What an image's versions warn about is for the log; here it is asked whether the numbers are right.
    options = ["-p", "no:cacheprovider", "-W", "default", "-rs", "--basetemp", str(job.work / "tests")]
    status = pytest.main(
        [str(ROOT / "tests" / "gpu"), "-m", "gpu", "-k", chosen, *options], plugins=[reporter]
    )
    if status:
        raise RuntimeError(
            f"{len(reporter.failed)} tests failed (status {int(status)}): {', '.join(reporter.failed)}"
        )


def cifar(job: Job) -> None:
    """CIFAR-10 by the recipe small_images, with a larger model and batch, for three minutes at most."""
    if job.rehearse:
        pictures = draw_pictures(job.work / "pictures", count=40, side=16)
        device, budget = "cpu", ("--steps", 2)
        settings: tuple[object, ...] = ("--model", "mixer_pyramid_micro2", "--batch-size", 8)
    elif not job.cifar:
        job.tell("skipped", "no images were given: --cifar PICTURES")
        return
    else:
        pictures = list_pictures(job.cifar, job.work)
        seconds = min(CIFAR_SECONDS, job.seconds_left - 15)
        if seconds < 30:
            job.tell("skipped", f"{job.seconds_left:.0f} s were left for it")
            return
        device, budget = job.device, ("--budget", f"{seconds:.0f}s")
        settings = ("--model", TRAINED, "--batch-size", 512, "--precision", "bf16")
    run = job.work / "cifar"
    result = mixlab(
        "train", pictures, "--recipe", "small_images", "--device", device, "--run", run, "--without-pictures",
        *settings, *budget,
    )  # fmt: skip
    job.row(
        training_row(
            result, what="CIFAR-10", device=device, settings=" ".join(map(str, (*settings, *budget)))
        )
    )
    for line in (run / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        if values["event"] == "validation":
            job.row(
                {"what": "validation"} | {key: values[key] for key in ("step", "epoch", "top1", "seconds")}
            )


def cores(job: Job) -> None:
    """A training of CIFAR's size and inference on 1 to 16 threads of this machine's own processor."""
    from mixlab.bench.bench import bench

    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = [count for count in THREADS if count <= available]
    model, image_size, batch, gemm_side = "mixer_s16", 224, 64, 2048
    trained, side, count, steps = "mixer_pyramid_mini2", 32, 4000, 20
    if job.rehearse:
        threads, model, image_size, batch, gemm_side = threads[-1:], "mixer_pico2", 8, 4, 256
        trained, side, count, steps = "mixer_pyramid_micro2", 16, 40, 2
    pictures = draw_pictures(job.work / "pictures", count=count, side=side)
    train = mixlab if job.rehearse else spawned  # what a first training leaves should not touch the next
    for number in threads:
        result = train(
            "train", pictures, "--recipe", "small_images", "--model", trained, "--device", "cpu",
            "--threads", number, "--steps", steps, "--batch-size", 8 if job.rehearse else 128, "--precision", "fp32",
            "--val-fraction", 0, "--without-pictures", "--run", job.work / f"threads-{number}",
        )  # fmt: skip
        job.row(training_row(result, what=f"training of {trained}", threads=number))
    for number in threads:
        rows = bench(
            model, (), image_size=(image_size, image_size), batch_size=batch, threads=number, rounds=3,
            gemm_side=gemm_side, say=print,
        )  # fmt: skip
        job.row({"what": f"inference of {model}", "gemm_side": gemm_side} | rows[0])


def _speeds(measure: Callable[..., None]) -> Callable[[Job], None]:
    return lambda job: measure(job.row, rehearse=job.rehearse, end=job.end)


MEASURES: dict[str, Callable[[Job], None]] = {
    "doctor": doctor,
    "tests": tests,
    "inference": _speeds(speed.inference),
    "compiled": _speeds(speed.compiled),
    "training": _speeds(speed.training),
    "cifar": cifar,
    "cores": cores,
}
