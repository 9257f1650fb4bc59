"""Parts of a batch computed by programs beside this one, a core each: for models whose operations are short.

Threads would wait for Python's lock between such operations (a pyramid's two cores then do the work of 1.2;
processes 1.8: LOG.md). The programs are started anew, never forked: a copy of a process that has exported a model, or
has a GPU or threads, cannot compute. What is exchanged lies in memory that all of them see; numbers of parts go round
through a pipe from which a free one takes the next, so a core that something else keeps busy slows a step by no
more than its share.
"""

import atexit
import json
import mmap
import os
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor

from mixlab.cpu.worker import FAILED, HEAD, MAX_WORDS, PART, READY, map_tensors, readable
from mixlab.errors import TrainingError

LOOK_SECONDS = 1.0  # between two looks whether the others are still alive
MAX_PARTS = 10_000  # numbers that a pipe holds
TIMEOUT_SECONDS = 300.0
ALIGNMENT = 64  # bytes
TRIAL_SECONDS = 30.0
START = (
    "import json, sys\n"
    "path, control, parent = json.loads(sys.argv[1])\n"
    "sys.path[:] = path\n"
    "from mixlab.cpu.worker import main\n"
    "main(control, parent)\n"
)


class Program:
    """A program that computes: it starts while others work, and can take one job after the other."""

    def __init__(self) -> None:
        """OSError where none can be started."""
        path = [place for place in sys.path if isinstance(place, str)]  # Python passes over others too
        self.control, theirs = socket.socketpair()
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", START, json.dumps([path, theirs.fileno(), os.getpid()])],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # that of a command belongs to its result
                env=os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for the first process
            )
        except BaseException:
            self.control.close()
            raise
        finally:
            theirs.close()
        self.num_expected = 1  # times that it has to say that it is ready
        self._end = weakref.finalize(self, _end, self.control, self.process, os.getpid())

    def is_ready(self, seconds: float = 0.0) -> bool:
        """Whether it has begun, and has what it needs for its job. OSError with its words if it ended instead.

        seconds: how long to wait for its next word.
        """
        while self.num_expected and readable([self.control.fileno()], seconds):
            word = self.control.recv(1)
            if word != READY:
                raise OSError(self._last_words(word))
            self.num_expected -= 1
        return not self.num_expected

    def _last_words(self, first: bytes) -> str:
        words = first
        with suppress(OSError):
            while more := self.control.recv(MAX_WORDS, socket.MSG_DONTWAIT):
                words += more
        return words.decode(errors="replace") or "a program that computes ended"

    def has_ended(self) -> bool:
        """Whether it has, by whatever."""
        return self.process.poll() is not None

    def give(self, head: bytes, descriptors: list[int]) -> None:
        """A job, described at the place `head` of the first of three descriptors; the others are its pipes."""
        socket.send_fds(self.control, [head], descriptors)
        self.num_expected += 1

    def leave(self) -> None:
        """Its job is over."""
        self.control.sendall(bytes(HEAD.size))

    def end(self) -> None:
        """Also where it is stopped, or has ended."""
        self._end()


def _end(control: socket.socket, process: "subprocess.Popen[bytes]", owner: int) -> None:
    control.close()
    if os.getpid() != owner:  # a copy of the object in a forked process
        process.returncode = 0  # it is not that one's to wait for
        return
    with suppress(OSError):
        process.kill()
    process.wait()


_spare: list[
    Program
] = []  # without a job; a list's own operations need no lock, and a finalizer may take none


def _forget() -> None:
    while _spare:
        _spare.pop().end()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def why_none() -> str | None:
    """Why this system cannot have such programs, or None where it can as far as anybody knows."""
    if os.name != "posix":
        return "this system cannot hand open files to a program that it starts"
    if not sys.executable or getattr(sys, "frozen", False):
        return "there is no Python to start"
    return None


def try_program() -> str:
    """What becomes of one, for `doctor`: a sentence."""
    reason, began = why_none(), time.monotonic()
    if reason is None:
        try:
            program = Program()
            try:
                while not program.is_ready(1.0):
                    if time.monotonic() - began > TRIAL_SECONDS:
                        raise OSError(f"it did not begin in {TRIAL_SECONDS:.0f} s")
            finally:
                program.end()
        except OSError as error:
            reason = str(error)
    if reason is None:
        return f"begin in {time.monotonic() - began:.1f} s"
    return f"none: {reason}; threads compute instead, slower"


def are_spare() -> bool:
    """Whether there are programs that have begun and have no job."""
    return bool(_spare)


def end_programs() -> None:
    """End those without a job."""
    with suppress(IndexError):
        while True:
            _spare.pop().end()


atexit.register(end_programs)


def _take(number: int) -> list[Program]:
    found: list[Program] = []
    try:
        while len(found) < number:
            try:
                program = _spare.pop()
            except IndexError:
                found.append(Program())
                continue
            if program.has_ended():
                program.end()
            else:
                found.append(program)
    except OSError:
        for program in found:
            program.end()
        raise
    return found


def _memory_file(num_bytes: int) -> int:
    """A descriptor of memory: no file that anybody else finds, and not of /dev/shm, which containers keep small.

    OSError where there is not enough of it.
    """
    if hasattr(os, "memfd_create"):
        found = os.memfd_create("mixlab", os.MFD_CLOEXEC)
        os.truncate(found, num_bytes)
        return found
    with tempfile.TemporaryFile() as file:
        file.write(bytes(num_bytes))  # a full disk is an error here, and would end the process later
        file.flush()
        return os.dup(file.fileno())


class Workers:
    """Programs beside this one that compute parts of a batch, one job: `compute(part)` -> a row of `size` numbers.

    facts: what the job is (see `worker._Job`). tensors: what it reads; copies of them, in memory that all see, are in
    `tensors`, and what is written there is what the programs compute with.
    """

    def __init__(
        self,
        facts: dict[str, Any],
        tensors: dict[str, Tensor],
        size: int,
        max_parts: int,
        num_others: int,
        timeout_seconds: float = TIMEOUT_SECONDS,
    ) -> None:
        """timeout_seconds: how long no part may become ready before the others are given up.

        OSError where no program can be started.
        """
        self._timeout_seconds = timeout_seconds
        likes = tensors | {"results": torch.empty(max_parts, size, dtype=torch.float32, device="meta")}
        places, end = {}, 0
        for name, like in likes.items():
            end += -end % ALIGNMENT
            places[name] = (str(like.dtype).removeprefix("torch."), list(like.shape), end)
            end += like.numel() * like.element_size()
        flags = {
            "matmul_precision": torch.get_float32_matmul_precision(),
            "flushes_denormals": bool(torch.full((1,), 1e-40).mul(1.0) == 0),
        }
        description = json.dumps(facts | flags | {"tensors": places}).encode()
        with ExitStack() as stack:
            memory = _memory_file(end + len(description))
            stack.callback(os.close, memory)
            mapped = mmap.mmap(memory, 0)
            mapped[end:] = description
            self.tensors = map_tensors(mapped, places)
            for name, tensor in tensors.items():
                self.tensors[name].copy_(tensor)
            self._results = self.tensors.pop("results")
            self._programs = _take(num_others)
            self._parts_out, self._parts_in = os.pipe()
            self._done_out, done_in = os.pipe()
            stack.callback(os.close, done_in)
            ours = [self._parts_out, self._parts_in, self._done_out]
            self._end = weakref.finalize(self, _give_back, ours, list(self._programs), os.getpid())
            os.set_blocking(self._parts_out, False)  # for all who read it
            for program in self._programs:
                program.give(HEAD.pack(end, len(description)), [memory, self._parts_out, done_in])

    def are_ready(self) -> bool:
        """Whether all programs have begun. OSError if one ended instead."""
        return all(program.is_ready() for program in self._programs)

    def wait(self, seconds: float) -> None:
        """Until all are ready, at most so long. OSError if one ended instead."""
        end = time.monotonic() + seconds
        for program in self._programs:
            while not program.is_ready(max(end - time.monotonic(), 0.0)) and time.monotonic() < end:
                pass

    def compute(self, num_parts: int, own: Callable[[int], Tensor]) -> Tensor:
        """All parts 0 ... num_parts - 1, by workers that are free: (num_parts, size), valid until the next call.

        own: computes a part here. TrainingError if another process has ended, or gives nothing for too long; these
        workers must not get work then.
        """
        self._check()
        os.write(self._parts_in, b"".join(PART.pack(number) for number in range(num_parts)))
        missing, waited = num_parts, 0.0
        while (number := self._next()) is not None:
            self._results[number] = own(number)
            missing -= 1
        while missing:
            ready = readable([self._done_out], LOOK_SECONDS)
            found = os.read(self._done_out, missing * PART.size) if ready else b""
            done = [number for (number,) in PART.iter_unpack(found)]
            # At the end of a pipe all who wrote to it are gone, though the system may not say so yet.
            is_over = bool(ready) and not done
            if not done or FAILED in done:
                self._check(is_over or FAILED in done)
            # Looks are counted, not the clock: it goes on while Ctrl-Z holds this process.
            waited = 0.0 if done else waited + LOOK_SECONDS
            if waited >= self._timeout_seconds:
                raise TrainingError(
                    f"the processes that compute parts of the batch gave none for {waited:.0f} s{self._stopped()}",
                    where="training",
                    hint="--resume goes on from the last one saved; --timeout-seconds waits longer",
                )
            missing -= len(done)
        return self._results[:num_parts]

    def _stopped(self) -> str:
        """Which of the other processes somebody has stopped, as a part of a sentence."""
        found = []
        for pid in self.pids:
            with suppress(OSError, IndexError), open(f"/proc/{pid}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] in "Tt":
                    found.append(str(pid))
        return f": {', '.join(found)} is stopped (SIGSTOP)" if found else ""

    def _next(self) -> int | None:
        """The number of a part that nobody has begun, if there is one."""
        try:
            (number,) = PART.unpack(os.read(self._parts_out, PART.size))
        except BlockingIOError:
            return None
        return int(number)

    def _check(self, has_failed: bool = False) -> None:
        """TrainingError if one of the other processes has ended, or said that it does."""
        if has_failed or any(program.has_ended() for program in self._programs):
            raise TrainingError(
                "a process that computed part of the batch has ended",
                where="training",
                hint="if the machine was out of memory, lower --batch-size; --resume goes on from the last one saved",
            )

    @property
    def pids(self) -> list[int]:
        """Process ids of the programs."""
        return [program.process.pid for program in self._programs]

    def close(self, *, is_whole: bool = True) -> None:
        """The job is over; its programs are there for another one, or ended if it is not whole: some may be at it."""
        if not is_whole:
            for program in self._programs:
                program.end()
        self._end()


def _give_back(descriptors: list[int], programs: list[Program], owner: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
    for program in programs:
        if program.has_ended() or os.getpid() != owner:
            program.end()
            continue
        try:
            program.leave()
        except OSError:
            program.end()
        else:
            _spare.append(program)
