"""`mixlab serve`: a classifier over HTTP, for a page and for programs.

    POST /predict        one picture as the body -> {"predictions": [...]}
    POST /predict-many   a plain tar of at most 64 pictures -> what `mixlab predict --json` prints
    POST /occlusion      one picture -> how much each part of it matters for the best label
    GET  /info /health /ready /metrics /openapi.json /docs, and the page at /

Nothing is fetched from anywhere, no model is loaded at a person's wish, and pictures are decoded in processes of
their own. Every answer but the page is JSON; errors are {"error": {"kind", "message"}} and name no path of this
machine.
"""

import asyncio
import contextlib
import hmac
import importlib.resources
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import mixlab
from mixlab.data.decode import MAX_BYTES
from mixlab.errors import ImageError
from mixlab.models.cost import measure_cost
from mixlab.models.fast import fast
from mixlab.serving.batching import Batcher, QueueFullError
from mixlab.serving.decoder import MAX_MEMBERS, Decoded, DecoderError, Decoders
from mixlab.serving.metrics import Metrics
from mixlab.serving.predict import Classifier

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
OPEN_PATHS = (
    "/",
    "/page.js",
    "/ui.js",
    "/page.css",
    "/health",
    "/ready",
)  # without a token: nothing of the model
PAGE = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/docs": ("docs.html", "text/html; charset=utf-8"),
}
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; media-src 'self' blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
OCCLUSION_SIDE = 8  # parts along each side, at most
MAX_TOP = 1000


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


class RefusedError(Exception):
    """An answer other than 200: status, kind and message; retry: seconds after which to come again."""

    def __init__(self, status: int, kind: str, message: str, retry: int | None = None) -> None:
        super().__init__(message)
        self.status, self.kind, self.message, self.retry = status, kind, message, retry

    def response(self) -> Response:
        headers = {} if self.retry is None else {"Retry-After": str(self.retry)}
        if self.status in (408, 413):
            headers["Connection"] = "close"  # what is still coming will not be read
        body = {"error": {"kind": self.kind, "message": self.message}}
        return JSONResponse(body, self.status, headers=headers)


BUSY = RefusedError(503, "busy", "too many requests wait; come again", retry=1)


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
        """Count a request whose body is here; BUSY if there are too many."""
        if self.num_requests >= self.limits.max_requests:
            raise BUSY
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
                        raise BUSY
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


def _top(request: Request) -> int:
    text = request.query_params.get("top", "5")
    if not (text.isascii() and text.isdigit()) or not 1 <= int(text[:6]) <= MAX_TOP or len(text) > 6:
        raise RefusedError(400, "usage", f"top must be a number from 1 to {MAX_TOP}")
    return int(text)


def create_app(service: Service, *, hosts: tuple[str, ...] = LOOPBACK, token: str | None = None) -> ASGIApp:
    """The ASGI application. hosts: names that a Host header may have, without the port. token: what callers need."""

    async def predict(request: Request) -> dict[str, Any]:
        top = _top(request)
        data = await service.receive(request)

        async def work() -> list[dict[str, Any]]:
            return service.labels(await service.batcher.ask(await service.one(data)), top)

        with service.admitted():
            return {"predictions": await unless_gone(request, work(), service.limits.request_seconds)}

    async def predict_many(request: Request) -> dict[str, Any]:
        top = _top(request)
        data = await service.receive(request)

        async def work() -> list[dict[str, Any]]:
            found = await service.pictures("tar", data)
            good = [picture.pixels for picture in found if picture.pixels is not None]
            service.batcher.check_room(len(good))
            answers = iter(await asyncio.gather(*map(service.batcher.ask, good)))
            return [
                {"path": picture.name, "error": picture.reason}
                if picture.pixels is None
                else {"path": picture.name, "predictions": service.labels(next(answers), top)}
                for picture in found
            ]

        with service.admitted():
            rows = await unless_gone(request, work(), service.limits.request_seconds)
        num_bad = sum("error" in row for row in rows)
        return {"images": rows, "num_ok": len(rows) - num_bad, "num_bad": num_bad}

    async def occlusion(request: Request) -> dict[str, Any]:
        data = await service.receive(request)

        async def work() -> dict[str, Any]:
            return await service.occlusion(await service.one(data))

        with service.admitted():
            found: dict[str, Any] = await unless_gone(request, work(), service.limits.request_seconds)
        return found

    facts: dict[str, Any] = {}

    async def info(request: Request) -> dict[str, Any]:
        if not facts:
            facts.update(await asyncio.to_thread(service.info))
        return facts

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "alive"})

    async def ready(request: Request) -> Response:
        if service.is_draining:
            return RefusedError(503, "draining", "the server is stopping", retry=5).response()
        return JSONResponse({"status": "ready"})

    async def metrics(request: Request) -> Response:
        text = service.metrics.text(service.batcher, service.decoders)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def openapi(request: Request) -> Response:
        return Response(asset("openapi.json"), media_type="application/json")

    async def page(request: Request) -> Response:
        name, kind = PAGE[request.url.path]
        return Response(asset(name), headers={"Content-Type": kind})

    def answer(
        handler: Callable[[Request], Awaitable[dict[str, Any]]],
    ) -> Callable[[Request], Awaitable[Response]]:
        async def respond(request: Request) -> Response:
            try:
                return JSONResponse(await handler(request))
            except RefusedError as error:
                return error.response()
            except QueueFullError:
                return BUSY.response()
            except ClientDisconnect:
                return Response(status_code=499)  # nobody reads it

        return respond

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with service.decoders:
            task = asyncio.create_task(service.batcher.run())
            try:
                yield
            finally:
                service.is_draining = True
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    routes = [
        Route("/predict", answer(predict), methods=["POST"]),
        Route("/predict-many", answer(predict_many), methods=["POST"]),
        Route("/occlusion", answer(occlusion), methods=["POST"]),
        Route("/info", answer(info), methods=["GET"]),
        Route("/health", health, methods=["GET"]),
        Route("/ready", ready, methods=["GET"]),
        Route("/metrics", metrics, methods=["GET"]),
        Route("/openapi.json", openapi, methods=["GET"]),
        *(Route(path, page, methods=["GET"]) for path in PAGE),
    ]
    handlers: dict[Any, Any] = {HTTPException: http_error, Exception: unexpected}
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)
    return Guard(app, hosts, token, service.metrics)


async def http_error(request: Request, error: Exception) -> Response:
    """Starlette's own refusals as JSON."""
    assert isinstance(error, HTTPException)
    kind = {404: "not_found", 405: "method"}.get(error.status_code, "usage")
    response = RefusedError(error.status_code, kind, str(error.detail)).response()
    response.headers.update(error.headers or {})
    return response


async def unexpected(request: Request, error: Exception) -> Response:
    """What nobody thought of, without its text."""
    return RefusedError(500, "internal", "this is a fault of the server").response()


def asset(name: str) -> bytes:
    """A file of the page."""
    return importlib.resources.files("mixlab.serving").joinpath("page", name).read_bytes()


class Guard:
    """Before anything else: whose host is asked, from which page, with which token; and headers for every answer.

    The Host of every request must be one of ours, else a page elsewhere could reach this server under a name of its
    own (DNS rebinding); an Origin, which browsers send, must be this server.
    """

    def __init__(self, app: ASGIApp, hosts: tuple[str, ...], token: str | None, metrics: Metrics) -> None:
        self.app, self.hosts, self.token, self.metrics = app, hosts, token, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return
            await self.app(scope, receive, send)
            return
        began, status = time.perf_counter(), 500

        async def guarded(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                given = {key.lower() for key, _ in message["headers"]}
                extra = [
                    (key.lower().encode(), value.encode())
                    for key, value in SECURITY_HEADERS.items()
                    if key.lower().encode() not in given
                ]
                message = {**message, "headers": [*message["headers"], *extra]}
            await send(message)

        try:
            refused = self._refusal(scope)
            await (self.app if refused is None else refused.response())(scope, receive, guarded)
        finally:
            self.metrics.observe_request(scope["path"], status, time.perf_counter() - began)

    def _refusal(self, scope: Scope) -> RefusedError | None:
        headers: dict[str, list[str]] = {}
        for key, value in scope["headers"]:
            headers.setdefault(key.decode("latin-1"), []).append(value.decode("latin-1"))
        hosts = headers.get("host", [])
        if len(hosts) != 1 or _without_port(hosts[0]) not in self.hosts:
            return RefusedError(403, "host", "this server does not answer to that Host")
        origins = headers.get("origin", [])
        if any(origin.partition("://")[2] != hosts[0] for origin in origins):
            return RefusedError(403, "origin", "pages of other origins may not ask this server")
        if self.token is not None and scope["path"] not in OPEN_PATHS:
            given = headers.get("authorization", [""])[0].partition(" ")
            is_bearer = given[0].lower() == "bearer"
            if not is_bearer or not hmac.compare_digest(given[2].encode(), self.token.encode()):
                return RefusedError(401, "token", "this needs the header Authorization: Bearer TOKEN")
        return None


def _without_port(host: str) -> str:
    """`localhost:8000` -> `localhost`, `[::1]:8000` -> `[::1]`."""
    end = host.rfind("]")
    colon = host.rfind(":")
    return (host if colon <= end else host[:colon]).lower()
