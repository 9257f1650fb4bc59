"""How fast a model is here, beside others that compute the same: each in a warm process of its own, taking turns.

The parent lets the processes run one after the other, A B A B, so that a machine that slows down slows all of them;
ratios are taken within a round.
"""

import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixlab.bench.backends import BACKENDS, ROUGH, TRAINING_BACKENDS, build_model, inference, training
from mixlab.cpu.cost import measure_cost
from mixlab.cpu.products import packed, product_by_onednn
from mixlab.device import keep_memory, peak_memory_bytes
from mixlab.errors import MixlabError, UsageError

TOLERANCE = 1e-4  # largest difference of a logit, or of a first step's loss, from ours
GEMM_SIDE = 4096
SECONDS = 0.7  # of one turn, about
BATCH_SIZES = tuple(2**power for power in range(10))
WORTH = 1.03  # a larger batch must give this much more speed
LONG = 2.0  # seconds of a batch, beyond which no larger one is tried


def _serve(connection: Connection, job: dict[str, Any]) -> None:
    """One process: prepare, warm up, then time whenever the parent asks."""
    torch.set_num_threads(job["threads"])
    if job["backend"] == "mixlab":
        keep_memory()  # as mixlab's commands do; the others have their own defaults
    try:
        call, image, result = _prepared(job)
        one = None if job["train"] or len(image) == 1 else image[:1].contiguous()
        counts = [_count(call, part, job["train"]) for part in (image, one) if part is not None]
        connection.send(("ready", result.numpy()))
    except Exception as error:
        connection.send(("failed", f"{type(error).__name__}: {error}"[:300]))
        return
    while connection.recv() == "go":
        seconds = _seconds(call, image, counts[0], job["train"])
        memory = peak_memory_bytes()
        alone = seconds if one is None else _seconds(call, one, counts[1], job["train"])
        connection.send((seconds, alone, memory))


def _prepared(job: dict[str, Any]) -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor]:
    """The warm callable of a job, its images, and its first result."""
    model = build_model(job["model"], job["image_size"], **job["options"])
    image = torch.randn(job["batch_size"], 3, *job["image_size"], generator=torch.Generator().manual_seed(1))
    if job["train"]:
        call = training(job["backend"], model, job["official_code"])
    else:
        model.requires_grad_(False)
        example = image if len(image) > 1 else image.repeat(2, 1, 1, 1)
        call = inference(job["backend"], model, example, job["threads"], job["official_code"])
    with torch.set_grad_enabled(job["train"]):
        result = call(image)
        call(image)
    return call, image, result


def _seconds(call: Callable[[Tensor], Tensor], image: Tensor, count: int, train: bool) -> float:
    """Of one call, mean of `count`."""
    with torch.set_grad_enabled(train):
        began = time.perf_counter()
        for _ in range(count):
            call(image)
    return (time.perf_counter() - began) / count


def _count(call: Callable[[Tensor], Tensor], image: Tensor, train: bool) -> int:
    """How many calls fill a turn; also warms up."""
    _seconds(call, image, 1, train)
    return max(round(SECONDS / _seconds(call, image, 1, train)), 1)


def best_batch_size(
    model: str, image_size: tuple[int, int], *, threads: int, train: bool, options: dict[str, Any]
) -> int:
    """The smallest power of two with the most images a second, nearly."""
    torch.set_num_threads(threads)
    keep_memory()
    speeds: dict[int, float] = {}
    for size in BATCH_SIZES:
        job = {
            "backend": "mixlab", "model": model, "image_size": image_size, "batch_size": size,
            "threads": threads, "train": train, "options": options, "official_code": None,
        }  # fmt: skip
        call, image, _ = _prepared(job)
        seconds = min(_seconds(call, image, 1, train) for _ in range(5))
        speeds[size] = size / seconds
        if seconds > LONG:
            break
    return next(size for size, speed in speeds.items() if WORTH * speed >= max(speeds.values()))


def gemm_flops(threads: int, repeats: int = 5, side: int = GEMM_SIDE) -> float:
    """The most floating-point operations a second of a side x side x side product in float32, of several tries.

    By whichever of torch's two libraries is faster here: on an AMD processor with AVX-512, oneDNN by far.
    """
    torch.set_num_threads(threads)
    a, b = torch.randn(2, side, side)
    weight = packed(b, side)
    products: list[Callable[[], Any]] = [lambda: torch.mm(a, b), lambda: product_by_onednn(a, weight)]
    best = float("inf")
    for multiply in products * repeats:
        began = time.perf_counter()
        multiply()
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best


def bench(
    model: str,
    against: tuple[str, ...],
    *,
    image_size: tuple[int, int],
    batch_size: int,
    threads: int,
    train: bool = False,
    rounds: int = 7,
    options: dict[str, Any] | None = None,
    official_code: Path | None = None,
    gemm_side: int = GEMM_SIDE,
    say: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """A row for each backend: speed, share of the GEMM peak, and how many times faster `mixlab` is.

    batch_size: 0 finds the fastest. options: of `create_model`. gemm_side: of the product that is the peak.
    """
    options = options or {}
    known = TRAINING_BACKENDS if train else BACKENDS
    if unknown := [name for name in against if name not in known]:
        what = f"backend {unknown[0]!r}" + (" for training" if train else "")
        raise UsageError(f"there is no {what}", where="--against", hint=", ".join(known))
    cost = measure_cost(build_model(model, image_size, **options), image_size)
    if not batch_size:
        say("looking for the fastest batch size")
        batch_size = best_batch_size(model, image_size, threads=threads, train=train, options=options)
    job = {
        "model": model, "image_size": image_size, "batch_size": batch_size, "threads": threads, "train": train,
        "options": options, "official_code": official_code,
    }  # fmt: skip
    backends = tuple(dict.fromkeys(("mixlab", *against)))
    turns, memory, differences, failures = _take_turns(job, backends, rounds, say)
    peak = gemm_flops(threads, side=gemm_side)
    rows: list[dict[str, Any]] = []
    for backend in backends:
        if backend in failures:
            rows.append({"model": model, "backend": backend, "error": failures[backend]})
            continue
        seconds, alone = (statistics.median(times) for times in zip(*turns[backend], strict=True))
        flops = (3 if train else 1) * cost.flops * batch_size / seconds
        row: dict[str, Any] = {
            "model": model, "backend": backend, "mode": "train" if train else "inference",
            "batch_size": batch_size, "image_size": list(image_size), "threads": threads,
            "images_per_second": batch_size / seconds, "ms_per_batch": 1000 * seconds,
            "ms_batch_1": None if train else 1000 * alone,
            "gflops": flops / 1e9, "peak_share": flops / peak, "peak_memory_bytes": memory[backend],
            "rounds": rounds,
        }  # fmt: skip
        if backend != "mixlab":
            row["max_difference"] = differences[backend]
        else:
            row |= _ratios(turns, 0, "ratio") | ({} if train else _ratios(turns, 1, "ratio_batch_1"))
        rows.append(row)
    return rows


def _ratios(turns: dict[str, list[tuple[float, float]]], column: int, name: str) -> dict[str, Any]:
    """How many times faster `mixlab` is than each other, median and range over the rounds."""
    found = {
        other: sorted(b[column] / a[column] for a, b in zip(turns["mixlab"], times, strict=True))
        for other, times in turns.items()
        if other != "mixlab"
    }
    return {
        name: {other: statistics.median(values) for other, values in found.items()},
        f"{name}_range": {other: [values[0], values[-1]] for other, values in found.items()},
    }


def _take_turns(
    job: dict[str, Any], backends: tuple[str, ...], rounds: int, say: Callable[[str], None]
) -> tuple[dict[str, list[tuple[float, float]]], dict[str, int], dict[str, float], dict[str, str]]:
    """Seconds of a batch and an image for each round, peak memory, difference from ours, and why a backend failed."""
    context = multiprocessing.get_context("spawn")
    processes: dict[str, Any] = {}
    results: dict[str, Any] = {}
    failures: dict[str, str] = {}
    try:
        for backend in backends:  # one after the other: preparing at once would be slower for all
            say(f"preparing {job['model']} on {backend}")
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, job | {"backend": backend}), daemon=True)
            process.start()
            theirs.close()
            try:
                state, value = ours.recv()
            except EOFError:
                state, value = "failed", "its process ended"
            if state == "failed":
                failures[backend] = value
                process.join()
                continue
            results[backend] = torch.from_numpy(value)
            processes[backend] = (process, ours)
        if "mixlab" not in processes:
            raise MixlabError(f"the model itself cannot be run: {failures['mixlab']}", where=job["model"])
        differences = {
            name: float((found - results["mixlab"]).abs().max()) for name, found in results.items()
        }
        for backend, difference in differences.items():
            if difference > TOLERANCE and backend not in ROUGH:
                what = "loss differs" if job["train"] else "logits differ"
                failures[backend] = f"its {what} by {difference:.1e}"
        turns: dict[str, list[tuple[float, float]]] = {name: [] for name in processes if name not in failures}
        memory: dict[str, int] = {}
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}")
            for backend in turns:
                connection = processes[backend][1]
                connection.send("go")
                seconds, alone, memory[backend] = connection.recv()
                turns[backend].append((seconds, alone))
        return turns, memory, differences, failures
    finally:
        for process, connection in processes.values():
            connection.send("end")
            process.join(10)
            if process.is_alive():
                process.kill()
