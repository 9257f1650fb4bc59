"""Mutated files of weights against every reader: how many were tried, refused, read, and what went wrong.

    python benchmarks/fuzz_readers.py [--inputs 1000000] [--seed 0] [--processes 2] [--json FILE]

Each input is a good .npz, packed .npz, .pth or .safetensors file of 8 small tensors, with one to four mutations:
bits flipped, bytes replaced by others or by interesting numbers, pieces removed, repeated or cut off, pieces of one
file put into another. It is written to memory (/dev/shm where there is one), opened, every tensor read, and
recognised as a Mixer. A right reader reads it or raises WeightsError; anything else is a crash, printed with its
number. A file `canary` left behind is one too.
"""

import argparse
import json
import multiprocessing
import os
import random
import resource
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from mixlab.checkpoint.layouts import LAYOUTS
from mixlab.checkpoint.readers import open_tensors
from mixlab.checkpoint.recognise import recognise
from mixlab.errors import UsageError, WeightsError
from mixlab.models.catalog import create_model
from mixlab.models.mixer import Mixer

MEMORY_LIMIT = 2 * 2**30  # of address space above what the process has after its imports
NUMBERS = (
    0,
    1,
    7,
    8,
    127,
    128,
    255,
    256,
    2**15,
    2**16 - 1,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**63 - 1,
    2**64 - 1,
)
PIECES = (
    b"cposix\nsystem\nX\x0c\x00\x00\x00touch canary\x85R", b"c__builtin__\neval\n", b"\x93NUMPY\x01\x00",
    b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", b"'|O'", b"(9999999999,)", b"\x80\x02",
    b'"data_offsets":[0,99999999999]', b'"shape":[-1]',
)  # fmt: skip


def make_seeds(folder: Path) -> dict[str, bytes]:
    """The good files, by the name of their reader."""
    torch.manual_seed(0)
    model = create_model("mixer_custom4", image_size=8, num_classes=3, num_blocks=1, hidden_dim=4,
                         token_mlp_dim=2, channel_mlp_dim=4)  # fmt: skip
    assert isinstance(model, Mixer)
    ours = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    official, timm = LAYOUTS["official"].keys(1), LAYOUTS["timm"].keys(1)
    arrays = {official[n]: LAYOUTS["official"].to_theirs(n, t).contiguous().numpy() for n, t in ours.items()}
    tensors = {timm[name]: tensor for name, tensor in ours.items()}
    np.savez(folder / "npz", **arrays)  # type: ignore[arg-type]
    np.savez_compressed(folder / "npz-packed", **arrays)  # type: ignore[arg-type]
    torch.save({"state_dict": tensors, "epoch": 3}, folder / "pth")
    save_file(tensors, folder / "safetensors", metadata={"format": "pt"})
    return {path.stem: path.read_bytes() for path in sorted(folder.iterdir())}


def mutate(data: bytes, draw: random.Random, others: list[bytes]) -> bytes:
    """One to four changes; half of them near the beginning or the end, where the headers are."""
    changed = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        if not changed:
            break
        place = draw.randrange(len(changed))
        if draw.random() < 0.5:
            near = min(draw.randrange(1, 400), len(changed))
            place = draw.randrange(near) if draw.random() < 0.5 else len(changed) - 1 - draw.randrange(near)
        kind = draw.randrange(8)
        length = draw.choice((1, 2, 4, 8, 30, 200))
        if kind == 0:
            changed[place] ^= 1 << draw.randrange(8)
        elif kind == 1:
            changed[place : place + length] = draw.randbytes(length)
        elif kind == 2:
            size = draw.choice((1, 2, 4, 8))
            number = draw.choice(NUMBERS) & (2 ** (8 * size) - 1)
            changed[place : place + size] = number.to_bytes(size, "little")
        elif kind == 3:
            del changed[place : place + length]
        elif kind == 4:
            changed[place:place] = changed[place : place + length] * draw.choice((1, 2, 50))
        elif kind == 5:
            changed[place : place + draw.choice((0, length))] = draw.choice(PIECES)
        elif kind == 6:
            del changed[place:]
        else:
            other = draw.choice(others)
            start = draw.randrange(len(other))
            changed[place : place + length] = other[start : start + length]
    return bytes(changed)


def read(path: Path) -> str:
    """How the file was taken: `refused`, or `read` whole."""
    try:
        with open_tensors(path) as file:
            for name in file.shapes:
                file.read(name)
            with suppress(UsageError):  # no square grid: a question to the person, not a refusal
                recognise(file.shapes, where=str(path)).config(None, where=str(path))
    except WeightsError:
        return "refused"
    return "read"


def work(task: tuple[int, int, int, dict[str, bytes]]) -> dict[str, Any]:
    """A process's share: `count` inputs from number `first` on; input i depends on (seed, i) alone."""
    seed, first, count, seeds = task
    torch.set_num_threads(1)
    names, found, crashes = sorted(seeds), Counter(), []
    base = "/dev/shm" if os.path.isdir("/dev/shm") else None
    status = Path("/proc/self/status").read_text().splitlines()
    size = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmSize"))
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY_LIMIT, resource.RLIM_INFINITY))
    with tempfile.TemporaryDirectory(dir=base) as folder:
        os.chdir(folder)
        path = Path(folder) / "input"
        for i in range(first, first + count):
            draw = random.Random(f"{seed} {i}")
            name = names[i % len(names)]
            # A new file every time: the one before may still be mapped.
            path.unlink(missing_ok=True)
            path.write_bytes(mutate(seeds[name], draw, [seeds[n] for n in names if n != name]))
            try:
                outcome = read(path)
            except BaseException as error:  # the finding that this program is for
                outcome = "crashed"
                crashes.append(
                    {"input": i, "reader": name, "error": f"{type(error).__name__}: {error}"[:300]}
                )
            if Path("canary").exists():
                Path("canary").unlink()
                crashes.append({"input": i, "reader": name, "error": "code of the file ran"})
            found[name, outcome] += 1
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"found": dict(found), "crashes": crashes, "peak": peak}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        seeds = make_seeds(Path(name))
    share = 5_000
    tasks = [
        (options.seed, first, min(share, options.inputs - first), seeds)
        for first in range(0, options.inputs, share)
    ]
    total: Counter[tuple[str, str]] = Counter()
    crashes: list[dict[str, Any]] = []
    peak = done = 0
    # A process that dies (a segmentation fault) ends this program with BrokenProcessPool: that is a finding too.
    with ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn")) as pool:
        for result in pool.map(work, tasks):
            total.update(result["found"])
            crashes += result["crashes"]
            peak = max(peak, result["peak"])
            done = sum(total.values())
            print(f"{done} inputs, {len(crashes)} crashes, {time.perf_counter() - began:.0f} s", flush=True)
    print("\n| reader of | inputs | refused | read | crashes |\n|---|---|---|---|---|")
    for name in sorted(seeds):
        counts = [total[name, outcome] for outcome in ("refused", "read", "crashed")]
        print(f"| {name} | {sum(counts)} | {counts[0]} | {counts[1]} | {counts[2]} |")
    print(
        f"\n{done} inputs in {time.perf_counter() - began:.0f} s, peak memory of a process {peak / 2**20:.0f} MiB"
    )
    for crash in crashes[:50]:
        print(crash)
    if options.json:
        rows = [{"reader": n, "outcome": o, "inputs": c} for (n, o), c in sorted(total.items())]
        options.json.write_text(json.dumps({"rows": rows, "crashes": crashes, "peak": peak}, indent=2))


if __name__ == "__main__":
    main()
