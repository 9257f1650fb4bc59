"""A classifier with what serves it: files decoded elsewhere, batches, limits of what is taken on."""

import asyncio
import base64
import contextlib
import io
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from starlette.requests import Request

from mixlab.cpu.cost import measure_cost
from mixlab.cpu.inference import fast
from mixlab.data.modality import MAX_BYTES, mean_of_parts
from mixlab.errors import ExampleError
from mixlab.serving.batching import Batcher
from mixlab.serving.bodies import MAX_EXAMPLES, Contents
from mixlab.serving.decoder import DecoderError, Decoders, Job
from mixlab.serving.guard import RefusedError, busy
from mixlab.serving.hints import hint
from mixlab.serving.metrics import Metrics
from mixlab.serving.predict import Classifier
from mixlab.version import __version__

HIDDEN_AT_ONCE = 8  # parts, so that others do not wait long
DRAIN_SECONDS = 5.0  # from SIGTERM on, for what has to be decoded
PROBE_AGE, PROBE_WAIT = 1.0, 0.8  # those who ask /ready wait a second, as a rule


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one server takes on.

    body_bytes: of a request. read_seconds: to receive it. request_seconds: from then to the answer. probe_seconds:
    for the file by which /ready tries whether any are decoded. max_queue:
    examples that may wait. max_batch, max_wait_seconds: see `Batcher`. decoders: processes that decode.
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
        self.preprocess = classifier.preprocess
        self.modality = self.preprocess.modality
        self.probe_file = self.modality.probe(self.preprocess)
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
    def classify(self, kept: np.ndarray) -> list[np.ndarray]:
        """Kept examples (B, ...) -> probabilities (K,) for each; in the batcher's thread."""
        began = time.perf_counter()
        inputs, owner = self.preprocess.windows(torch.from_numpy(kept).to(self.classifier.device))
        probabilities = self._probabilities(inputs, owner)
        self.metrics.observe_batch(len(kept), time.perf_counter() - began)
        return list(probabilities)

    @torch.inference_mode()
    def _without(self, kept: torch.Tensor, parts: range) -> np.ndarray:
        """Probabilities (len(parts), K) of one kept example with one part after another hidden."""
        return self._probabilities(*self.preprocess.hidden(kept.to(self.classifier.device), parts))

    def _probabilities(self, inputs: torch.Tensor, owner: torch.Tensor | None) -> np.ndarray:
        logits = mean_of_parts(self.model, inputs, owner) / self.classifier.temperature
        found: np.ndarray = logits.softmax(dim=1).numpy()
        return found

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
        """RefusedError unless a file that came now would be decoded: one was a moment ago, or a test one is."""
        if self.is_draining:
            raise RefusedError(503, "draining", "the server is stopping", retry=5)
        if self.batching.done():
            raise RefusedError(503, "model", "the model does not answer", retry=5)
        if self.num_requests >= self.limits.max_requests:
            raise busy()
        if time.monotonic() - self.decoders.last_answer < PROBE_AGE:
            return
        if self.probe is None or self.probe.done():
            decoding = self.decoders.decode(
                Job(bytearray(self.probe_file), "", "file"), self.limits.probe_seconds
            )
            self.probe = asyncio.ensure_future(decoding)
            self.probe.add_done_callback(lambda probe: probe.cancelled() or probe.exception())
        await asyncio.wait([self.probe], timeout=PROBE_WAIT)
        if not self.probe.done() or self.probe.exception() is not None:
            raise RefusedError(503, "decoder", f"no process decodes {self.modality.many} now", retry=1)

    @contextlib.asynccontextmanager
    async def received(self, request: Request, plain: str = "file") -> AsyncIterator[Job]:
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
            raise RefusedError(400, "empty", f"the body is empty: send the {self.modality.one} itself")

    def _release(self, job: Job) -> None:
        self.num_waiting_bytes -= job.num_counted
        job.num_counted = 0
        with contextlib.suppress(BufferError):  # the error of a process that died holds it for a moment
            job.data.clear()

    async def contents(self, job: Job) -> Contents:
        """What is in a body; RefusedError if it cannot be read, or is one file that cannot."""
        kind = self.modality.one
        try:
            found = await self.decoders.decode(job, self.limits.request_seconds)
        except ExampleError as error:
            raise RefusedError(415, kind, error.message, hint=hint(self.modality, job.plain)) from error
        except DecoderError as error:
            raise RefusedError(503, "decoder", "this could not be decoded now", retry=1) from error
        finally:
            self._release(job)
        if not found.is_list and job.plain == "file" and found.examples[0].kept is None:
            reason = found.examples[0].reason
            raise RefusedError(415, kind, reason, hint=hint(self.modality, job.plain, reason))
        return found

    async def rows(self, found: Contents, top: int) -> dict[str, Any]:
        """What `mixlab predict --json` prints: a row for each example, in order, with labels or what is wrong."""
        good = [one.kept for one in found.examples if one.kept is not None]
        self.batcher.check_room(len(good))
        answers = iter(await asyncio.gather(*map(self.batcher.ask, good)))
        rows = [
            {"path": one.name, "error": one.reason}
            if one.kept is None
            else {"path": one.name, "predictions": self.labels(next(answers), top)}
            for one in found.examples
        ]
        return {self.modality.many: rows, "num_ok": len(good), "num_bad": len(rows) - len(good)}

    async def view(self, kept: np.ndarray) -> dict[str, Any]:
        """What the model takes in of one example, as a picture."""

        def draw() -> dict[str, Any]:
            view = self.preprocess.view(torch.from_numpy(kept))
            height, width, channels = view.picture.shape
            file = io.BytesIO()
            Image.fromarray(view.picture[..., 0] if channels == 1 else view.picture).save(file, "PNG")
            png = base64.b64encode(file.getvalue()).decode()
            return {"png": png, "width": width, "height": height, "seconds": view.seconds}

        return await asyncio.to_thread(draw)

    async def occlusion(self, kept: np.ndarray) -> dict[str, Any]:
        """How much the best label's probability falls where a part of the example is hidden: a grid of numbers."""
        example = torch.from_numpy(kept)
        view = self.preprocess.view(example)
        rows, columns = view.grid
        parts: list[np.ndarray] = []
        async with self.explaining:  # one at a time: others should not wait for it
            whole = await self.batcher.ask(kept)
            for start in range(0, rows * columns, HIDDEN_AT_ONCE):
                some = range(start, min(start + HIDDEN_AT_ONCE, rows * columns))
                parts += list(await self.batcher.between(partial(self._without, example, some)))
        best = int(whole.argmax())
        drop = np.array([whole[best] - part[best] for part in parts]).reshape(rows, columns)
        return {
            "label": self.classifier.class_names[best],
            "probability": float(whole[best]),
            "drop": [[round(float(value), 6) for value in row] for row in drop],
            "seconds": view.seconds,
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
        cost = measure_cost(own.model, self.preprocess.input_size, in_channels=self.preprocess.channels)
        return {
            "name": self.name,
            "version": __version__,
            "modality": self.modality.name,
            "class_names": list(own.class_names),
            **self.preprocess.facts(),
            "num_parameters": cost.num_parameters,
            "macs": cost.macs,
            "max_body_bytes": self.limits.body_bytes,
            "max_pictures": MAX_EXAMPLES,
        }
