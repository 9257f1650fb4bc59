"""Parts of a batch computed by forked processes, a core each: for models whose operations are short.

Threads would wait for Python's lock between such operations (a pyramid's two cores then do the work of 1.2; processes
1.8: LOG.md). What is exchanged lies in memory that all of them see; numbers of parts go round through a pipe from
which whoever is free takes the next, so a core that something else keeps busy slows a step by no more than its share.
"""

import ctypes
import mmap
import os
import select
import signal
import sys
import traceback
import warnings
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from mixlab.errors import TrainingError

LOOK_SECONDS = 1.0  # between two looks whether the others are still alive
FAILED = 255  # in the place of a part's number
MAX_PARTS = 250


def can_fork() -> bool:
    """Whether this machine has what this file needs: a fork, and pipes that can be opened again."""
    return sys.platform == "linux" and os.path.isdir("/proc/self/fd")


def _shared(like: Tensor) -> Tensor:
    """A copy in memory that forked processes share; it is gone with the last of them."""
    memory = mmap.mmap(-1, max(like.numel() * like.element_size(), 1))
    return torch.frombuffer(memory, dtype=like.dtype, count=like.numel()).view(like.shape).copy_(like)


class Processes:
    """Processes beside this one that compute parts of a batch: `compute(part)` -> a tensor of `size` numbers.

    inputs: tensors that `compute` reads and this process may change between two batches; they are moved into shared
    memory here. Everything else is as it was when the processes were forked, in `__init__`.
    """

    def __init__(
        self,
        compute: Callable[[int], Tensor],
        size: int,
        max_parts: int,
        inputs: list[Tensor],
        num_others: int,
    ) -> None:
        for tensor in inputs:
            tensor.data = _shared(tensor.data)
        self._compute = compute
        self._results = _shared(torch.zeros(max_parts, size))
        self._parts_out, self._parts_in = os.pipe()
        self._done_out, self._done_in = os.pipe()
        # Opened once more, so that reading without waiting is this process's way alone.
        self._parts_out_now = os.open(f"/proc/self/fd/{self._parts_out}", os.O_RDONLY | os.O_NONBLOCK)
        self._children = [self._fork() for _ in range(num_others)]
        descriptors = (self._parts_in, self._parts_out, self._parts_out_now, self._done_in, self._done_out)
        self._end = weakref.finalize(self, _end, descriptors, list(self._children), os.getpid())

    def _fork(self) -> int:
        with warnings.catch_warnings():  # of a fork among threads: those of torch are not used in the child
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child:
            return child
        status = 1
        try:
            for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                signal.signal(kind, signal.SIG_IGN)  # what to do is for the first process to say
            with suppress(AttributeError, OSError):
                ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
            os.close(self._parts_in)
            torch.set_num_threads(1)
            while number := os.read(self._parts_out, 1):
                self._results[number[0]] = self._compute(number[0])
                os.write(self._done_in, number)
            status = 0
        except BaseException:
            traceback.print_exc()
            with suppress(OSError):
                os.write(self._done_in, bytes([FAILED]))
        finally:
            os._exit(status)

    def compute(self, num_parts: int) -> Tensor:
        """All parts 0 ... num_parts - 1, by whoever is free: (num_parts, size), valid until the next call."""
        self._check()
        os.write(self._parts_in, bytes(range(num_parts)))
        missing = num_parts
        with _one_thread():
            while number := self._next():
                self._results[number[0]] = self._compute(number[0])
                missing -= 1
        while missing:
            ready, _, _ = select.select([self._done_out], [], [], LOOK_SECONDS)
            done = os.read(self._done_out, missing) if ready else b""
            if not done or FAILED in done:
                self._check(FAILED in done)
            missing -= len(done)
        return self._results[:num_parts]

    def _next(self) -> bytes:
        """The number of a part that nobody has begun, or nothing."""
        try:
            return os.read(self._parts_out_now, 1)
        except BlockingIOError:
            return b""

    def _check(self, has_failed: bool = False) -> None:
        """TrainingError if one of the other processes has ended, or said that it does."""
        if has_failed or any(os.waitpid(child, os.WNOHANG) != (0, 0) for child in self._children):
            raise TrainingError(
                "a process that computed part of the batch has ended",
                where="training",
                hint="if the machine was out of memory, lower --batch-size; --resume goes on from the last one saved",
            )

    def close(self) -> None:
        """End the other processes."""
        self._end()


def _end(descriptors: tuple[int, ...], children: list[int], owner: int) -> None:
    if os.getpid() != owner:
        return  # a copy of the object in a forked process
    for descriptor in descriptors:
        os.close(descriptor)
    for child in children:
        with suppress(OSError):
            os.kill(child, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(child, 0)


class _one_thread:  # noqa: N801
    """This process computes on one core, as the others do."""

    def __enter__(self) -> None:
        self._before = torch.get_num_threads()
        torch.set_num_threads(1)

    def __exit__(self, *_: Any) -> None:
        torch.set_num_threads(self._before)
