"""A fault at every call by which a checkpoint is saved: which checkpoint loads afterwards?

    python -m benchmarks.reliability.faults [--rounds 5] [--json FILE]

A save is run once to count its calls that touch the disk: mkdir, open, write of a tensor or text file, fsync,
replace, read, remove. Then it is run again and again with the k-th of them failing (ENOSPC, EIO, EPERM) or ending the
process (kill), for every k; kill both before and after the call. A right save leaves the previous or the new
checkpoint loadable, never neither, and raises DiskError, naming the place, or succeeds.
"""

import argparse
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from mixlab.checkpoint import checkpoints, store
from mixlab.checkpoint.checkpoints import Checkpoint, load_newest_checkpoint, save_checkpoint
from mixlab.errors import DiskError

KILLED = 77
# Where a save touches the disk: (object, name of the function on it).
SITES = (
    (Path, "mkdir"), (Path, "write_text"), (Path, "write_bytes"), (Path, "unlink"), (os, "open"), (os, "fsync"),
    (os, "replace"), (shutil, "rmtree"), (store, "save_file"), (checkpoints, "sha256"),
)  # fmt: skip


@contextmanager
def _watched(action: Callable[[int, Callable[[], Any]], Any]) -> Iterator[None]:
    """Every call of SITES goes through action(number of the call, the call itself)."""
    counter = iter(range(10**9))
    inside = [False]  # rmtree opens and unlinks by itself: that is one call

    def replacement(original: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            if inside[0]:
                return original(*arguments, **options)
            inside[0] = True
            try:
                return action(next(counter), lambda: original(*arguments, **options))
            finally:
                inside[0] = False

        return call

    with ExitStack() as stack:
        for owner, name in SITES:
            stack.enter_context(patch.object(owner, name, replacement(getattr(owner, name))))
        yield


def count_calls(work: Callable[[], object]) -> int:
    """How many calls `work` makes that touch the disk."""
    seen: list[int] = []

    def note(number: int, call: Callable[[], Any]) -> Any:
        seen.append(number)
        return call()

    with _watched(note):
        work()
    return len(seen)


@contextmanager
def inject(number: int, error: int | None, *, after: bool = False) -> Iterator[list[int]]:
    """The call of that number fails with `error`; None ends the process before it, or `after` it."""
    hit: list[int] = []

    def fail(current: int, call: Callable[[], Any]) -> Any:
        if current != number:
            return call()
        hit.append(current)
        if error is not None:
            raise OSError(error, os.strerror(error))
        if after:
            call()
        os._exit(KILLED)

    with _watched(fail):
        yield hit


def example(step: int) -> Checkpoint:
    """A small checkpoint whose tensors say its step."""
    tensors = {
        name: {f"{name}.{i}": torch.full((50, 7), float(step)) for i in range(3)}
        for name in ("model", "ema", "optimizer")
    }
    return Checkpoint(step=step, tensors=tensors, state={"best": None, "seconds": 1.5})


def try_one(folder: Path, call: int, error: int | None, after: bool) -> str:
    """What came of a save with that fault: `previous` or `new` loads, or what is wrong."""
    before = load_newest_checkpoint(folder)[0].step
    child = os.fork()
    if child == 0:
        status = 0
        try:
            with inject(call, error, after=after):
                save_checkpoint(folder, example(before + 1))
        except DiskError as failure:
            status = 1 if failure.where else 3
        except BaseException:
            status = 4
        os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status not in (0, 1, KILLED):
        return f"the save ended with status {status}"
    found, rejected = load_newest_checkpoint(folder)
    values = {float(v) for group in found.tensors.values() for t in group.values() for v in t.flatten()}
    if found.step not in (before, before + 1) or values != {float(found.step)} or rejected:
        return f"step {found.step} loads after {before}, values {values}, rejected {rejected}"
    if status == 0 and found.step == before:
        return "the save said nothing, and the new checkpoint is not there"
    checkpoints.sweep(folder)
    return "previous" if found.step == before else "new"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    faults: dict[str, tuple[int | None, bool]] = {
        "ENOSPC": (errno.ENOSPC, False), "EIO": (errno.EIO, False), "EPERM": (errno.EPERM, False),
        "kill before": (None, False), "kill after": (None, True),
    }  # fmt: skip
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "checkpoints"
        for step in (1, 2):
            save_checkpoint(folder, example(step))
        total = count_calls(lambda: save_checkpoint(folder, example(3)))
        for fault, (error, after) in faults.items():
            found: dict[str, int] = {}
            for _ in range(options.rounds):
                for call in range(total):
                    result = try_one(folder, call, error, after)
                    found[result] = found.get(result, 0) + 1
            rows.append({"fault": fault, "calls": total, "tries": total * options.rounds, **found})
            print(rows[-1], flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))
    bad = [row for row in rows if set(row) - {"fault", "calls", "tries", "previous", "new"}]
    print("every fault left a checkpoint that loads" if not bad else f"WRONG: {bad}")


if __name__ == "__main__":
    main()
