"""A classifier with what serves it: pictures decoded elsewhere, batches, limits of what is taken on."""

import asyncio
import contextlib
import time
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from starlette.requests import ClientDisconnect, Request

import mixlab
from mixlab.data.decode import MAX_BYTES
from mixlab.errors import ImageError
from mixlab.models.cost import measure_cost
from mixlab.models.fast import fast
from mixlab.serving.batching import Batcher
from mixlab.serving.decoder import MAX_MEMBERS, Decoded, DecoderError, Decoders
from mixlab.serving.guard import RefusedError, busy
from mixlab.serving.metrics import Metrics
from mixlab.serving.predict import Classifier

OCCLUSION_SIDE = 8  # parts along each side, at most


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one server takes on.

    body_bytes: of a request. read_seconds: to receive it. request_seconds: from then to the answer. max_queue:
    pictures that may wait. max_batch, max_wait_seconds: see `Batcher`. decoders: processes that decode.
    max_requests: at a time, once their bodies are here. reading_bytes: of all bodies on their way.
    """

    body_bytes: int = min(64 * 2**20, MAX_BYTES)
    read_seconds: float = 10.0
    request_seconds: float = 20.0
    max_queue: int = 256
    max_batch: int = 32
    max_wait_seconds: float = 0.004
    decoders: int = 2
    max_requests: int = 256
    reading_bytes: int = 512 * 2**20


class Service:
    """A classifier with what serves it: decoders and a batcher. `name`: what people call the model."""

    def __init__(self, classifier: Classifier, name: str, limits: Limits) -> None:
        self.classifier, self.name, self.limits = classifier, name, limits
        self.metrics = Metrics()
        self.decoders = Decoders(classifier.preprocess, limits.decoders)
        self.model = fast(classifier.model)
        self.batcher = Batcher(
            self.classify,
            max_batch=limits.max_batch,
            max_wait=limits.max_wait_seconds,
            max_queue=limits.max_queue,
        )
        self.num_requests, self.num_reading = 0, 0
        self.is_draining = False
        self.explaining = asyncio.Semaphore(1)

    @torch.inference_mode()
    def classify(self, pixels: np.ndarray) -> list[np.ndarray]:
        """uint8 (B, channels, height, width) -> probabilities (K,) for each; in the batcher's thread."""
        began = time.perf_counter()
        image = self.classifier.preprocess.normalize(torch.from_numpy(pixels).to(self.classifier.device))
        probabilities = self.model(image).float().softmax(dim=1).cpu().numpy()
        self.metrics.observe_batch(len(pixels), time.perf_counter() - began)
        return list(probabilities)

    def labels(self, probabilities: np.ndarray, top: int) -> list[dict[str, Any]]:
        """The `top` labels, best first."""
        names = self.classifier.class_names
        best = np.argsort(-probabilities, kind="stable")[: min(top, len(names))]
        return [{"label": names[i], "probability": float(probabilities[i])} for i in best]

    @contextlib.contextmanager
    def admitted(self) -> Iterator[None]:
        """Count a request whose body is here; RefusedError if there are too many."""
        if self.num_requests >= self.limits.max_requests:
            raise busy()
        self.num_requests += 1
        try:
            yield
        finally:
            self.num_requests -= 1

    def drain(self) -> None:
        """Say on /ready that no more requests should come."""
        self.is_draining = True

    async def receive(self, request: Request) -> bytes:
        """The whole body; RefusedError as soon as it is too large or comes too slowly, or too many come at once."""
        limits = self.limits
        too_large = RefusedError(413, "too_large", f"a body may have {limits.body_bytes} bytes")
        declared = request.headers.get("content-length", "0")
        if not declared.isdigit() or int(declared) > limits.body_bytes:
            raise too_large
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(limits.read_seconds):
                async for part in request.stream():
                    size += len(part)
                    self.num_reading += len(part)
                    parts.append(part)
                    if size > limits.body_bytes:
                        raise too_large
                    if self.num_reading > limits.reading_bytes:
                        raise busy()
        except TimeoutError:
            text = f"the body did not come in {limits.read_seconds:g} s"
            raise RefusedError(408, "too_slow", text) from None
        finally:
            self.num_reading -= size
        if not size:
            raise RefusedError(400, "empty", "the body is empty: send the picture itself")
        return b"".join(parts)

    async def pictures(self, kind: str, data: bytes) -> list[Decoded]:
        """What is in a body; RefusedError if it cannot be read."""
        try:
            return await self.decoders.decode(kind, data, self.limits.request_seconds)
        except ImageError as error:
            raise RefusedError(415, "image", error.message) from error
        except DecoderError as error:
            raise RefusedError(503, "decoder", "this could not be decoded now", retry=1) from error

    async def one(self, data: bytes) -> np.ndarray:
        """The pixels of the picture that a body is."""
        (picture,) = await self.pictures("one", data)
        if picture.pixels is None:
            raise RefusedError(415, "image", picture.reason)
        return picture.pixels

    async def occlusion(self, pixels: np.ndarray) -> dict[str, Any]:
        """How much the best label's probability falls where a part of the picture is grey: a grid of numbers."""
        height, width = pixels.shape[1:]
        rows, columns = (min(OCCLUSION_SIDE, side) for side in (height, width))
        edges = [
            np.linspace(0, side, parts + 1).astype(int) for side, parts in ((height, rows), (width, columns))
        ]
        hidden = np.repeat(pixels[None], rows * columns, axis=0)
        for number in range(rows * columns):
            row, column = divmod(number, columns)
            place = np.s_[:, edges[0][row] : edges[0][row + 1], edges[1][column] : edges[1][column + 1]]
            hidden[number][place] = 128
        async with self.explaining:  # one at a time: others should not wait for it
            whole = await self.batcher.ask(pixels)
            self.batcher.check_room(len(hidden))
            parts = await asyncio.gather(*(self.batcher.ask(picture) for picture in hidden))
        best = int(whole.argmax())
        drop = np.array([whole[best] - part[best] for part in parts]).reshape(rows, columns)
        return {
            "label": self.classifier.class_names[best],
            "probability": float(whole[best]),
            "drop": [[round(float(value), 6) for value in row] for row in drop],
        }

    def info(self) -> dict[str, Any]:
        """What the model is, for /info and the page."""
        own = self.classifier
        cost = measure_cost(own.model, own.preprocess.image_size, in_channels=own.preprocess.channels)
        return {
            "name": self.name,
            "version": mixlab.__version__,
            "class_names": list(own.class_names),
            "image_size": list(own.preprocess.image_size),
            "channels": own.preprocess.channels,
            "fit": own.preprocess.fit,
            "crop_fraction": own.preprocess.crop_fraction,
            "num_parameters": cost.num_parameters,
            "macs": cost.macs,
            "max_body_bytes": self.limits.body_bytes,
            "max_pictures": MAX_MEMBERS,
        }


async def unless_gone(request: Request, work: Coroutine[Any, Any, Any], seconds: float) -> Any:
    """The result of `work`, which is cancelled when the asker goes away or `seconds` are over."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_until_gone(request))
    try:
        await asyncio.wait((task, gone), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if gone.done():
            raise ClientDisconnect
        raise RefusedError(503, "too_slow", "this took too long", retry=1)
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
