"""Requests that come at the same time go through the model together."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np


class QueueFullError(Exception):
    """More examples wait than the server takes on."""


@dataclass
class _Waiting:
    kept: np.ndarray
    answer: "asyncio.Future[Any]"


class Batcher:
    """Collects examples for up to `max_wait` seconds, or until there are `max_batch`, and classifies them at once.

    classify: examples as they are kept, (B, ...) -> an answer for each; it runs in a thread of its own.
    Those whose asker has gone are left out. max_queue: how many may wait.
    """

    def __init__(
        self, classify: Callable[[np.ndarray], list[Any]], *, max_batch: int, max_wait: float, max_queue: int
    ) -> None:
        self.classify, self.max_batch, self.max_wait, self.max_queue = (
            classify,
            max_batch,
            max_wait,
            max_queue,
        )
        self.waiting: asyncio.Queue[_Waiting] = asyncio.Queue()
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self.num_batches, self.num_pictures, self.busy_seconds = 0, 0, 0.0

    def check_room(self, count: int = 1) -> None:
        """QueueFullError if `count` more examples are too many."""
        if self.waiting.qsize() + count > self.max_queue:
            raise QueueFullError

    async def ask(self, kept: np.ndarray) -> Any:
        """The answer for one example. QueueFullError if too many wait."""
        self.check_room()
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.waiting.put_nowait(_Waiting(kept, answer))
        return await answer  # a cancelled asker cancels it, and the example is left out

    async def between(self, work: Callable[[], Any]) -> Any:
        """The result of `work`, done in the model's thread between two batches; not if it is cancelled first."""
        return await asyncio.get_running_loop().run_in_executor(self.thread, work)

    async def run(self) -> None:
        """Until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            batch = await self._collect()
            if not batch:
                continue
            kept = np.stack([one.kept for one in batch])
            began = time.perf_counter()
            try:
                answers: list[Any] = await loop.run_in_executor(self.thread, self.classify, kept)
            except asyncio.CancelledError:
                raise
            except Exception as error:
                for one in batch:
                    if not one.answer.done():
                        one.answer.set_exception(error)
                continue
            self.busy_seconds += time.perf_counter() - began
            self.num_batches += 1
            self.num_pictures += len(batch)
            for one, answer in zip(batch, answers, strict=True):
                if not one.answer.done():
                    one.answer.set_result(answer)

    async def _collect(self) -> list[_Waiting]:
        batch = [await self.waiting.get()]
        end = time.monotonic() + self.max_wait
        while len(batch) < self.max_batch:
            if self.waiting.empty():
                left = end - time.monotonic()
                if left <= 0:
                    break
                try:
                    batch.append(await asyncio.wait_for(self.waiting.get(), left))
                except TimeoutError:
                    break
            else:
                batch.append(self.waiting.get_nowait())
        return [one for one in batch if not one.answer.done()]
