"""A classifier with what serves it: images decoded elsewhere, batches, limits of what is taken on."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from starlette.requests import ClientDisconnect, Request

from mixlab.cpu.cost import measure_cost
from mixlab.cpu.inference import fast
from mixlab.data.images.preprocess import for_images
from mixlab.data.modality import MAX_BYTES
from mixlab.errors import ExampleError
from mixlab.serving.batching import Batcher
from mixlab.serving.bodies import MAX_PICTURES, Contents
from mixlab.serving.decoder import DecoderError, Decoders, Job
from mixlab.serving.guard import RefusedError, busy
from mixlab.serving.metrics import Metrics
from mixlab.serving.predict import Classifier
from mixlab.version import __version__

OCCLUSION_SIDE = 8  # parts along each side, at most
DRAIN_SECONDS = 5.0  # from SIGTERM on, for what has to be decoded
PROBE_AGE, PROBE_WAIT = 1.0, 0.8  # those who ask /ready wait a second, as a rule
PROBE = bytearray.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b550000000a49444154789c63680000008200"
    "8177cd72b60000000049454e44ae426082"
)  # a PNG of one pixel
HOW_TO_SEND = {
    "picture": "send the file itself: curl --data-binary @photo.jpg ADDRESS/predict; or a form: "
    'curl -F file=@photo.jpg ADDRESS/predict; or JSON: {"image": BASE64}; ADDRESS/docs shows each',
    "tar": "send a plain tar: tar cf - *.jpg | curl --data-binary @- ADDRESS/predict-many; or a form: "
    'curl -F file=@a.jpg -F file=@b.jpg ADDRESS/predict-many; or JSON: {"images": [BASE64, ...]}',
}
SEND_WHOLE = (
    "the image itself is damaged: does it open in a viewer? Save it again as JPEG or PNG, and send that"
)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one server takes on.

    body_bytes: of a request. read_seconds: to receive it. request_seconds: from then to the answer. probe_seconds:
    for the image by which /ready tries whether any are decoded. max_queue:
    images that may wait. max_batch, max_wait_seconds: see `Batcher`. decoders: processes that decode.
    max_requests: at a time, once their bodies are here. waiting_bytes: of all bodies that are here or on their way
    and not decoded yet.
    """

    body_bytes: int = min(64 * 2**20, MAX_BYTES)
    read_seconds: float = 10.0
    request_seconds: float = 20.0
    probe_seconds: float = 3.0
    max_queue: int = 256
    max_batch: int = 32
    max_wait_seconds: float = 0.004
    decoders: int = 2
    max_requests: int = 256
    waiting_bytes: int = 128 * 2**20


class Service:
    """A classifier with what serves it: decoders and a batcher. `name`: what people call the model."""

    def __init__(self, classifier: Classifier, name: str, limits: Limits) -> None:
        self.classifier, self.name, self.limits = classifier, name, limits
        self.metrics = Metrics()
        self.preprocess = for_images(classifier.preprocess, "the server")
        self.decoders = Decoders(self.preprocess, limits.decoders)
        self.model = fast(classifier.model)
        self.batcher = Batcher(
            self.classify,
            max_batch=limits.max_batch,
            max_wait=limits.max_wait_seconds,
            max_queue=limits.max_queue,
        )
        self.num_requests, self.num_waiting_bytes = 0, 0
        self.is_draining = False
        self.loop: asyncio.AbstractEventLoop | None = None  # once it runs
        self.probe: asyncio.Future[Contents] | None = None
        self.explaining = asyncio.Semaphore(1)

    @torch.inference_mode()
    def classify(self, pixels: np.ndarray) -> list[np.ndarray]:
        """uint8 (B, channels, height, width) -> probabilities (K,) for each; in the batcher's thread."""
        began = time.perf_counter()
        image = self.classifier.preprocess.to_input(torch.from_numpy(pixels).to(self.classifier.device))
        logits = self.model(image).float() / self.classifier.temperature
        probabilities = logits.softmax(dim=1).cpu().numpy()
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
        """Say on /ready that no more requests should come; what is not decoded soon will not be. Twice: at once."""
        if self.loop is not None:
            seconds = 0.0 if self.is_draining else DRAIN_SECONDS
            with contextlib.suppress(RuntimeError):  # it has ended
                self.loop.call_soon_threadsafe(self.loop.call_later, seconds, self.decoders.kill)
        self.is_draining = True

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """With its processes and its batcher."""
        self.loop = asyncio.get_running_loop()
        async with self.decoders:
            self.batching = asyncio.create_task(self.batcher.run())
            try:
                yield
            finally:
                self.is_draining = True
                self.batching.cancel()
                await asyncio.gather(self.batching, return_exceptions=True)

    async def check_ready(self) -> None:
        """RefusedError unless an image that came now would be decoded: one was a moment ago, or a test one is."""
        if self.is_draining:
            raise RefusedError(503, "draining", "the server is stopping", retry=5)
        if self.batching.done():
            raise RefusedError(503, "model", "the model does not answer", retry=5)
        if self.num_requests >= self.limits.max_requests:
            raise busy()
        if time.monotonic() - self.decoders.last_answer < PROBE_AGE:
            return
        if self.probe is None or self.probe.done():
            decoding = self.decoders.decode(Job(PROBE, "", "picture"), self.limits.probe_seconds)
            self.probe = asyncio.ensure_future(decoding)
            self.probe.add_done_callback(lambda probe: probe.cancelled() or probe.exception())
        await asyncio.wait([self.probe], timeout=PROBE_WAIT)
        if not self.probe.done() or self.probe.exception() is not None:
            raise RefusedError(503, "decoder", "no process decodes images now", retry=1)

    @contextlib.asynccontextmanager
    async def received(self, request: Request, plain: str = "picture") -> AsyncIterator[Job]:
        """The whole body, see `Job`, counted until it is decoded.

        RefusedError as soon as it is too large or comes too slowly, or too much waits.
        """
        job = Job(bytearray(), request.headers.get("content-type", ""), plain)
        try:
            try:
                async with asyncio.timeout(self.limits.read_seconds):
                    await self._receive(request, job)
            except TimeoutError:
                text = f"the body did not come in {self.limits.read_seconds:g} s"
                raise RefusedError(408, "too_slow", text) from None
            yield job
        finally:
            self._release(job)

    async def _receive(self, request: Request, job: Job) -> None:
        limits = self.limits
        too_large = RefusedError(
            413, "too_large", f"the body is too large: at most {limits.body_bytes / 1e6:.1f} MB"
        )
        declared = request.headers.get("content-length", "0")
        if not declared.isdigit() or int(declared) > limits.body_bytes:
            raise too_large
        if self.num_waiting_bytes + int(declared) > limits.waiting_bytes:  # better now than half-way
            raise busy()
        async for part in request.stream():
            if len(job.data) + len(part) > limits.body_bytes:
                raise too_large
            if self.num_waiting_bytes + len(part) > limits.waiting_bytes:
                raise busy()
            self.num_waiting_bytes += len(part)
            job.num_counted += len(part)
            job.data += part
        if not job.data:
            raise RefusedError(400, "empty", "the body is empty: send the image itself")

    def _release(self, job: Job) -> None:
        self.num_waiting_bytes -= job.num_counted
        job.num_counted = 0
        with contextlib.suppress(BufferError):  # the error of a process that died holds it for a moment
            job.data.clear()

    async def contents(self, job: Job) -> Contents:
        """What is in a body; RefusedError if it cannot be read, or is one image that cannot."""
        try:
            found = await self.decoders.decode(job, self.limits.request_seconds)
        except ExampleError as error:
            raise RefusedError(415, "image", error.message, hint=HOW_TO_SEND[job.plain]) from error
        except DecoderError as error:
            raise RefusedError(503, "decoder", "this could not be decoded now", retry=1) from error
        finally:
            self._release(job)
        if not found.is_list and job.plain == "picture" and found.pictures[0].pixels is None:
            reason = found.pictures[0].reason
            is_damaged = reason.startswith(("damaged: ", "truncated: "))
            hint = SEND_WHOLE if is_damaged else HOW_TO_SEND[job.plain]
            raise RefusedError(415, "image", reason, hint=hint)
        return found

    async def rows(self, found: Contents, top: int) -> dict[str, Any]:
        """What `mixlab predict --json` prints: a row for each image, in order, with labels or what is wrong."""
        good = [picture.pixels for picture in found.pictures if picture.pixels is not None]
        self.batcher.check_room(len(good))
        answers = iter(await asyncio.gather(*map(self.batcher.ask, good)))
        rows = [
            {"path": picture.name, "error": picture.reason}
            if picture.pixels is None
            else {"path": picture.name, "predictions": self.labels(next(answers), top)}
            for picture in found.pictures
        ]
        return {"images": rows, "num_ok": len(good), "num_bad": len(rows) - len(good)}

    async def occlusion(self, pixels: np.ndarray) -> dict[str, Any]:
        """How much the best label's probability falls where a part of the image is grey: a grid of numbers."""
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

    def metrics_text(self) -> bytes:
        """What was counted, and what waits now, as Prometheus reads it."""
        return self.metrics.text(
            waiting=self.batcher.waiting.qsize(),
            waiting_bytes=self.num_waiting_bytes,
            restarts=self.decoders.num_restarts,
        )

    def info(self) -> dict[str, Any]:
        """What the model is, for /info and the page."""
        own = self.classifier
        preprocess = self.preprocess
        cost = measure_cost(own.model, preprocess.image_size, in_channels=preprocess.channels)
        return {
            "name": self.name,
            "version": __version__,
            "class_names": list(own.class_names),
            "image_size": list(preprocess.image_size),
            "channels": preprocess.channels,
            "fit": preprocess.fit,
            "crop_fraction": preprocess.crop_fraction,
            "num_parameters": cost.num_parameters,
            "macs": cost.macs,
            "max_body_bytes": self.limits.body_bytes,
            "max_pictures": MAX_PICTURES,
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
