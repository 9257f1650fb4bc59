"""Files of strangers, decoded in processes of their own: what goes wrong there ends that process, nothing else.

A process takes one job at a time through a pipe, has a limit of memory, and is replaced when it dies or takes too
long. What comes back is read as JSON and raw numbers, never unpickled.
"""

import asyncio
import contextlib
import json
import logging
import math
import multiprocessing
import os
import resource
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from mixlab.data.modality import Preprocess
from mixlab.errors import ExampleError
from mixlab.serving.bodies import Contents, Decoded, read_body

MAX_ANSWER = 2**20  # bytes of JSON
LARGE_BYTES = 16 * 2**20
LEAST_SECONDS = 0.1  # a job with less time left is not begun
FIRST_SECONDS = (
    300.0  # for the first processes to start: everything is imported then, on a busy machine perhaps
)
START_SECONDS, AGAIN_SECONDS, CLOSE_SECONDS = 30.0, 1.0, 2.0
MEMORY_BYTES = 2 * 2**30  # of address space, beyond what an idle process has
TRIES = 2  # a job whose process died is tried once more: another job may have been the reason


class DecoderError(Exception):
    """No process could finish the job: it died, or took too long."""


@dataclass
class Job:
    """A body to decode. plain: what it is where it is neither a form nor JSON, `file` or `tar`.

    num_counted: its bytes that count as waiting, see `Service`.
    """

    data: bytearray
    content_type: str
    plain: str
    num_counted: int = 0


def _serve(pipe: Any, preprocess: Preprocess) -> None:
    """A decoding process, which says first who its parent is.

    In: JSON (Content-Type, and what the body is without one), the body.
    Out: JSON (a reason, or a row for each example), then the examples as they are kept.
    """
    _limit_memory()
    pipe.send_bytes(json.dumps(os.getppid()).encode())
    logging.disable()  # parsers that complain would fill the log at a stranger's wish
    while True:
        try:
            content_type, plain = json.loads(pipe.recv_bytes())
            head, content = _answer(pipe.recv_bytes(), content_type, plain, preprocess)
            pipe.send_bytes(head)
            pipe.send_bytes(content)
        except (EOFError, OSError, MemoryError):
            return


def _answer(data: bytes, content_type: str, plain: str, preprocess: Preprocess) -> tuple[bytes, bytes]:
    """A function of its own, so that nothing of a body is kept while the next one comes."""
    try:
        found = read_body(data, content_type, plain, preprocess)
    except ExampleError as error:
        return json.dumps({"refused": error.message}).encode(), b""
    except MemoryError:
        return json.dumps({"refused": "decoding it would take too much memory"}).encode(), b""
    except Exception as error:  # parsers raise nearly every type there is
        return json.dumps({"refused": f"damaged: {type(error).__name__}"}).encode(), b""
    rows = [[one.name, one.reason, one.kept is not None] for one in found.examples]
    content = b"".join(one.kept.tobytes() for one in found.examples if one.kept is not None)
    return json.dumps({"examples": rows, "is_list": found.is_list}).encode(), content


def _limit_memory() -> None:
    with contextlib.suppress(OSError, ValueError), open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY_BYTES, now + MEMORY_BYTES))


class Process:
    """One decoding process and the pipe to it."""

    def __init__(self, context: Any, preprocess: Preprocess) -> None:
        self.shape, self.dtype = preprocess.kept_shape, np.dtype(preprocess.kept_dtype)
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, preprocess), daemon=True)
        self.theirs = theirs

    def start(self) -> int:
        """The process id of its parent, once it runs. DecoderError if it does not."""
        try:
            self.process.start()
            self.theirs.close()
            return int(json.loads(self.pipe.recv_bytes(MAX_ANSWER)))
        except (EOFError, OSError, ValueError) as error:
            raise DecoderError("a decoding process did not start") from error
        finally:
            self.theirs.close()

    def work(self, job: Job) -> Contents:
        """The examples, or ExampleError. DecoderError if it died; it must not be used again then.

        It may be stopped, or never read what it is sent: the caller kills it when its time is over.
        """
        try:
            self.pipe.send_bytes(json.dumps([job.content_type, job.plain]).encode())
            self.pipe.send_bytes(job.data)
            answer = json.loads(self.pipe.recv_bytes(MAX_ANSWER))
            content = self.pipe.recv_bytes()
            number = len(content) // (math.prod(self.shape) * self.dtype.itemsize)
            kept = np.frombuffer(bytearray(content), dtype=self.dtype).reshape(number, *self.shape)
        except (EOFError, OSError, ValueError) as error:
            raise DecoderError("a decoding process ended") from error
        if "refused" in answer:
            raise ExampleError(answer["refused"])
        rows = iter(kept)
        found = [
            Decoded(name, next(rows) if is_good else None, reason)
            for name, reason, is_good in answer["examples"]
        ]
        return Contents(found, answer["is_list"])

    def kill(self) -> None:
        """End it, also where it is stopped; a caller that waits for its answer has a DecoderError."""
        if self.process.pid is not None:  # it has begun
            with contextlib.suppress(OSError):
                os.kill(self.process.pid, signal.SIGKILL)

    def close(self) -> None:
        self.kill()
        if self.process.pid is not None:
            self.process.join(CLOSE_SECONDS)
        self.pipe.close()


class Decoders:
    """Decoding processes, for use from one event loop.

    No job outlives its time: its process is killed then, whatever it is at, and another one takes its place.
    start_seconds: for one to start.
    """

    def __init__(
        self,
        preprocess: Preprocess,
        number: int,
        *,
        start_seconds: float = START_SECONDS,
        process_type: type[Process] = Process,
    ) -> None:
        self.start_seconds, self.process_type = start_seconds, process_type
        # New ones in milliseconds, without our threads.
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["mixlab.serving.decoder"])
        self.preprocess, self.number = preprocess, number
        self.pool = ThreadPoolExecutor(number, thread_name_prefix="decoder")  # each waits for one process
        self.processes: set[Process] = set()
        self.starting: set[Process] = set()
        self.idle: asyncio.Queue[Process | None] = asyncio.Queue()  # None: there will be no more
        self.large = asyncio.Semaphore(1)  # large bodies one at a time, so that others find a process too
        self.num_restarts, self.forkserver = 0, 0
        self.last_answer = -math.inf  # when a process last did a job; one that only began speaks for no other
        self.is_closed = False

    async def decode(self, job: Job, seconds: float) -> Contents:
        """The examples of a job. ExampleError: what is wrong with it. DecoderError: nobody knows."""
        end = time.monotonic() + seconds
        async with self.large if len(job.data) > LARGE_BYTES else contextlib.nullcontext():
            for _ in range(TRIES):
                try:
                    async with asyncio.timeout(end - time.monotonic()):
                        process = await self.idle.get()
                except TimeoutError:
                    break
                left = end - time.monotonic()
                if process is None or left < LEAST_SECONDS:
                    self.idle.put_nowait(process)
                    raise DecoderError("there was no time left for it")
                with contextlib.suppress(DecoderError):
                    return await self._ask(process, job, left)
        raise DecoderError("no process could decode it")

    async def _ask(self, process: Process, job: Job, seconds: float) -> Contents:
        work = self._loop.run_in_executor(self.pool, process.work, job)
        killer = self._loop.call_later(seconds, process.kill)

        def finish(work: "asyncio.Future[Contents]") -> None:
            killer.cancel()
            if isinstance(work.exception(), DecoderError):
                self.num_restarts += 1
                self._replace(process)
            else:
                self.last_answer = time.monotonic()
                self.idle.put_nowait(process)

        work.add_done_callback(finish)
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            # The caller has gone. The process stays at its job, and what the job holds is counted until its end.
            await asyncio.wait([work])
            raise

    def _replace(self, process: Process) -> None:
        """By a new one, unless all is ending."""
        self.processes.discard(process)
        if not self.is_closed:
            self._start(process)

    def _start(self, old: Process | None = None) -> "asyncio.Future[int]":
        """A new process, begun in a thread, after the end of `old`; another one if it does not start."""
        process = self.process_type(self.context, self.preprocess)

        def start() -> int:
            if old is not None:
                old.close()
            return process.start()

        def finish(work: "asyncio.Future[int]") -> None:
            late.cancel()
            self.starting.discard(process)
            if work.exception() is None and not self.is_closed:
                self.forkserver = work.result()
                self.processes.add(process)
                self.idle.put_nowait(process)
                return
            process.kill()
            if self.forkserver:  # without one it is the first start that failed
                self._loop.call_later(AGAIN_SECONDS, self._replace, process)

        self.starting.add(process)
        seconds = self.start_seconds if self.forkserver else FIRST_SECONDS
        late = self._loop.call_later(seconds, self._give_up, process)
        work = self._loop.run_in_executor(self.pool, start)
        work.add_done_callback(finish)
        return work

    def _give_up(self, process: Process) -> None:
        """It does not start: it stands still, or the forkserver does, which is not ours alone and is woken."""
        process.kill()
        self._wake_forkserver()

    def _wake_forkserver(self) -> None:
        if self.forkserver:
            with contextlib.suppress(OSError):
                os.kill(self.forkserver, signal.SIGCONT)

    def kill(self) -> None:
        """End all processes and whatever waits for one; no other takes its place."""
        self.is_closed = True
        self.idle.put_nowait(None)
        for process in self.processes:
            process.kill()
        for process in self.starting:
            process.kill()
        self._wake_forkserver()  # it ends with us, unless it stands still

    async def __aenter__(self) -> "Decoders":
        self._loop = asyncio.get_running_loop()
        await asyncio.gather(*(self._start() for _ in range(self.number)))
        return self

    async def __aexit__(self, *exception: Any) -> None:
        self.kill()
        self.pool.shutdown(wait=True)
        for process in self.processes:
            process.close()
