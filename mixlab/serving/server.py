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
import importlib.resources
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from mixlab.serving.batching import QueueFullError
from mixlab.serving.guard import LOOPBACK, Guard, RefusedError, busy, http_error, unexpected
from mixlab.serving.service import Service, unless_gone

PAGE = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/docs": ("docs.html", "text/html; charset=utf-8"),
}
MAX_TOP = 1000


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
                return busy().response()
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
    app.router.redirect_slashes = False
    return Guard(app, hosts, token, service.metrics)


def asset(name: str) -> bytes:
    """A file of the page."""
    return importlib.resources.files("mixlab.serving").joinpath("page", name).read_bytes()
