"""The program beside a training that computes parts of its batches: `main`, started by workers.py.

It is no copy of the process that starts it, which may be a notebook, have threads of its own, or a GPU. What to
compute comes as JSON: which model, of which configuration, in which numbers, by which loss; all by name.
"""

import contextlib
import dataclasses
import importlib
import json
import mmap
import os
import select
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from typing import Any

import torch
from torch import Tensor

from mixlab.cpu.parts import SharedBatch, build_model
from mixlab.cpu.passes import Passes
from mixlab.device import keep_memory

HEAD = struct.Struct("!QQ")  # where in the memory the description of a job is: its place and its length
READY = b"r"  # said once the program has begun, and once for every job that it is ready for
PART = struct.Struct("!H")  # number of a part
FAILED = 65_535  # in its place
MAX_WORDS = 1000  # bytes of what went wrong
LOOK_SECONDS = 0.5  # between two looks whether the parent is still there


def describe(value: Any) -> Any:
    """`value` as JSON from which `made` makes it again: a dataclass, or a function or class that has a name.

    ValueError for what has none that another process would find it by.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: describe(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"of": _name(type(value)), "fields": fields}
    if isinstance(value, tuple):
        return [describe(item) for item in value]
    if value is None or isinstance(value, str | int | float):
        return value
    return {"named": _name(value)}


def _name(value: Any) -> str:
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", "<unknown>")
    if not module or module == "__main__" or getattr(sys.modules.get(module), name, None) is not value:
        raise ValueError(f"{name} of {module} has no name by which another process could find it")
    return f"{module}:{name}"


def made(description: Any) -> Any:
    """What `describe` described."""
    if isinstance(description, list):
        return tuple(made(item) for item in description)
    if not isinstance(description, dict):
        return description
    module, _, name = (description.get("of") or description["named"]).partition(":")
    found = getattr(importlib.import_module(module), name)
    if "of" not in description:
        return found
    return found(**{key: made(value) for key, value in description["fields"].items()})


def readable(descriptors: list[int], seconds: float | None) -> set[int]:
    """Which of them have something to read, or have been closed at the other end, at the latest after so long."""
    poll = select.poll()  # select() takes none above 1023
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    return {descriptor for descriptor, _ in poll.poll(None if seconds is None else 1000 * seconds)}


def map_tensors(memory: mmap.mmap, places: dict[str, tuple[str, list[int], int]]) -> dict[str, Tensor]:
    """Tensors that lie in `memory`: their names, each with dtype, shape and offset in bytes."""
    found = {}
    for name, (kind, shape, offset) in places.items():
        dtype = getattr(torch, kind)
        size = torch.Size(shape).numel()
        flat = torch.frombuffer(memory, dtype=dtype, count=size, offset=offset) if size else torch.empty(0)
        found[name] = flat.to(dtype).view(shape)
    return found


class _Job:
    """What to compute, from its description, and where it is written."""

    def __init__(self, head: bytes, descriptors: list[int]) -> None:
        memory, self.parts, self.done = descriptors
        place, length = HEAD.unpack(head)
        mapped = mmap.mmap(memory, 0)
        os.close(memory)
        facts = json.loads(mapped[place : place + length])
        torch.set_float32_matmul_precision(facts["matmul_precision"])
        torch.set_flush_denormal(facts["flushes_denormals"])
        tensors = map_tensors(mapped, facts["tensors"])
        self.results = tensors.pop("results")
        model = build_model(made(facts["kind"]), made(facts["config"]), facts["trained"], tensors)
        model.checkpoint_blocks = facts["checkpoint_blocks"]
        passes = Passes(model, getattr(torch, facts["dtype"]))
        self.batch = SharedBatch(passes, made(facts["loss"]), facts["drops"], tensors)

    def do_next(self) -> None:
        """Compute a part that nobody has begun, if there is one."""
        try:
            found = os.read(self.parts, PART.size)
        except BlockingIOError:
            return
        if found:
            (number,) = PART.unpack(found)
            self.results[number] = self.batch.compute(number)
            with contextlib.suppress(BrokenPipeError):  # nobody waits for it any more
                os.write(self.done, found)

    def close(self) -> None:
        os.close(self.parts)
        os.close(self.done)


def main(control: int, parent: int) -> None:
    """Take jobs from the socket `control`, and parts of them, until the other end is closed or `parent` has ended."""
    for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(kind, signal.SIG_IGN)  # what to do is for the first process to say
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    keep_memory()
    torch.set_num_threads(1)
    job: _Job | None = None
    with socket.socket(fileno=control) as ours:
        ours.sendall(READY)
        try:
            while True:
                sources = [control] if job is None else [control, job.parts]
                if control in readable(sources, None):
                    head, descriptors = _message(ours)
                    if job is not None:
                        job.close()
                    job = None  # its memory goes with it
                    if not head:
                        return
                    if descriptors:
                        job = _Job(head, descriptors)
                        ours.sendall(READY)
                elif job is not None:
                    job.do_next()
        except BaseException as error:
            traceback.print_exc()
            with contextlib.suppress(OSError):
                ours.sendall(f"{type(error).__name__}: {error}".encode()[:MAX_WORDS])
                if job is not None:
                    os.write(job.done, PART.pack(FAILED))
            raise SystemExit(1) from None


def _message(control: socket.socket) -> tuple[bytes, list[int]]:
    """Where a job is described, with its descriptors; without them there is no job now; nothing is the end."""
    try:
        head, descriptors, _, _ = socket.recv_fds(control, HEAD.size, 3)
    except ConnectionError:
        return b"", []
    return head, descriptors


def _end_with(parent: int) -> None:
    # The other end of the socket may be open in a process that the parent has forked.
    while os.getppid() == parent:
        time.sleep(LOOK_SECONDS)
    os._exit(1)
