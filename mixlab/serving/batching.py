"""Requests that come at the same time go through the model together."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np


class QueueFullError(Exception):
    """More images wait than the server takes on."""


@dataclass
class _Waiting:
    pixels: np.ndarray
    answer: "asyncio.Future[Any]"


class Batcher:
    """Collects images for up to `max_wait` seconds, or until there are `max_batch`, and classifies them at once.

    classify: pixels uint8 (B, channels, height, width) -> an answer for each; it runs in a thread of its own.
    Images whose asker has gone are left out. max_queue: how many may wait.
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
        """QueueFullError if `count` more images are too many."""
        if self.waiting.qsize() + count > self.max_queue:
            raise QueueFullError

    async def ask(self, pixels: np.ndarray) -> Any:
        """The answer for one image, uint8 (channels, height, width). QueueFullError if too many wait."""
        self.check_room()
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.waiting.put_nowait(_Waiting(pixels, answer))
        return await answer  # a cancelled asker cancels it, and the image is left out

    async def run(self) -> None:
        """Until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            batch = await self._collect()
            if not batch:
                continue
            pixels = np.stack([one.pixels for one in batch])
            began = time.perf_counter()
            try:
                answers: list[Any] = await loop.run_in_executor(self.thread, self.classify, pixels)
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
