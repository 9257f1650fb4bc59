"""Pictures of strangers, decoded in processes of their own: what goes wrong there ends that process, nothing else.

A process takes one job at a time through a pipe, has a limit of memory, and is replaced when it dies or takes too
long. What comes back is read as JSON and raw pixels, never unpickled.
"""

import asyncio
import contextlib
import io
import json
import math
import multiprocessing
import resource
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from mixlab.data.decode import decode
from mixlab.data.preprocess import Preprocess
from mixlab.errors import ImageError

MAX_MEMBERS = 64  # of a tar
MAX_ANSWER = 2**20  # bytes of JSON
MEMORY_BYTES = 2 * 2**30  # of address space, beyond what an idle process has
TRIES = 2  # a job whose process died is tried once more: another job may have been the reason


class DecoderError(Exception):
    """No process could finish the job: it died, or took too long."""


@dataclass(frozen=True)
class Decoded:
    """A picture of a job: its name in a tar; its pixels uint8 (channels, height, width), or why there are none."""

    name: str
    pixels: np.ndarray | None
    reason: str


def read_one(data: bytes, preprocess: Preprocess) -> list[Decoded]:
    """The picture that `data` is."""
    return [_read("", data, preprocess)]


def read_tar(data: bytes, preprocess: Preprocess) -> list[Decoded]:
    """The files of a plain tar, at most MAX_MEMBERS. ImageError if it is none, or has more."""
    found: list[Decoded] = []
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            for member in archive:
                if member.isdir():
                    continue
                if len(found) == MAX_MEMBERS:
                    raise ImageError(f"more than {MAX_MEMBERS} files in the tar")
                name = member.name.encode("utf-8", "replace").decode()
                if not member.isfile():
                    found.append(Decoded(name, None, "not a plain file"))
                    continue
                file = archive.extractfile(member)
                content = b"" if file is None else file.read()
                found.append(_read(name, content, preprocess))
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise ImageError(f"not a tar that can be read: {type(error).__name__}") from error
    if not found:
        raise ImageError("the tar has no files")
    return found


def _read(name: str, data: bytes, preprocess: Preprocess) -> Decoded:
    try:
        return Decoded(name, preprocess.pixels(decode(data)), "")
    except ImageError as error:
        return Decoded(name, None, error.message)
    except MemoryError:
        return Decoded(name, None, "decoding it would take too much memory")


def _serve(pipe: Any, preprocess: Preprocess) -> None:
    """A decoding process. In: kind, bytes. Out: JSON (a reason, or a row for each picture), then their pixels."""
    _limit_memory()
    while True:
        try:
            kind, data = pipe.recv_bytes(), pipe.recv_bytes()
        except (EOFError, OSError):
            return
        found: list[Decoded] = []
        answer: dict[str, Any] = {}
        try:
            found = (read_tar if kind == b"tar" else read_one)(data, preprocess)
            answer["pictures"] = [[one.name, one.reason, one.pixels is not None] for one in found]
        except ImageError as error:
            answer["refused"] = error.message
        except MemoryError:
            answer["refused"] = "decoding it would take too much memory"
        pipe.send_bytes(json.dumps(answer).encode())
        pipe.send_bytes(b"".join(one.pixels.tobytes() for one in found if one.pixels is not None))


def _limit_memory() -> None:
    with contextlib.suppress(OSError, ValueError), open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY_BYTES, now + MEMORY_BYTES))


class _Process:
    """One decoding process and the pipe to it."""

    def __init__(self, context: Any, preprocess: Preprocess) -> None:
        self.shape = (preprocess.channels, *preprocess.image_size)
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, preprocess), daemon=True)
        self.process.start()
        theirs.close()

    def work(self, kind: str, data: bytes, seconds: float) -> list[Decoded]:
        """The pictures, or ImageError. DecoderError if it died or takes longer; it must not be used again then."""
        try:
            self.pipe.send_bytes(kind.encode())
            self.pipe.send_bytes(data)
            if not self.pipe.poll(seconds):
                raise DecoderError("decoding took too long")
            answer = json.loads(self.pipe.recv_bytes(MAX_ANSWER))
            content = self.pipe.recv_bytes()
            number = len(content) // math.prod(self.shape)
            pixels = np.frombuffer(bytearray(content), dtype=np.uint8).reshape(number, *self.shape)
        except (EOFError, OSError, ValueError) as error:
            raise DecoderError("a decoding process ended") from error
        if "refused" in answer:
            raise ImageError(answer["refused"])
        rows = iter(pixels)
        return [
            Decoded(name, next(rows) if has_pixels else None, reason)
            for name, reason, has_pixels in answer["pictures"]
        ]

    def close(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


class Decoders:
    """Decoding processes, for use from one event loop."""

    def __init__(self, preprocess: Preprocess, number: int) -> None:
        self.context = multiprocessing.get_context(
            "forkserver"
        )  # new ones in milliseconds, without our threads
        self.context.set_forkserver_preload(["mixlab.serving.decoder"])
        self.preprocess, self.number = preprocess, number
        self.pool = ThreadPoolExecutor(number, thread_name_prefix="decoder")  # each waits for one process
        self.idle: asyncio.Queue[_Process] = asyncio.Queue()
        self.num_restarts = 0

    async def start(self) -> None:
        """Start them all."""
        loop = asyncio.get_running_loop()
        for process in await asyncio.gather(
            *(loop.run_in_executor(self.pool, self._new) for _ in range(self.number))
        ):
            self.idle.put_nowait(process)

    def _new(self) -> _Process:
        return _Process(self.context, self.preprocess)

    async def decode(self, kind: str, data: bytes, seconds: float) -> list[Decoded]:
        """The pictures of a job (`one` or `tar`). ImageError: what is wrong with it. DecoderError: nobody knows."""
        end = time.monotonic() + seconds
        loop = asyncio.get_running_loop()
        for attempt in range(TRIES):
            process = await self.idle.get()
            left = end - time.monotonic()
            # Shielded: a caller who goes away leaves the process to its job, not in the middle of an answer.
            work = loop.run_in_executor(self.pool, self._work, process, kind, data, left)
            try:
                return await asyncio.shield(work)
            except DecoderError:
                if attempt == TRIES - 1 or time.monotonic() > end:
                    raise
        raise AssertionError

    def _work(self, process: _Process, kind: str, data: bytes, seconds: float) -> list[Decoded]:
        """In a thread: one job, after which a process is idle again, this one or a new one."""
        try:
            return process.work(kind, data, max(seconds, 0.05))
        except DecoderError:
            process.close()
            self.num_restarts += 1
            process = self._new()
            raise
        finally:
            self._loop.call_soon_threadsafe(self.idle.put_nowait, process)

    async def __aenter__(self) -> "Decoders":
        self._loop = asyncio.get_running_loop()
        await self.start()
        return self

    async def __aexit__(self, *exception: Any) -> None:
        self.pool.shutdown(wait=True)
        while not self.idle.empty():
            self.idle.get_nowait().close()
