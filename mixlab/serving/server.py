"""`mixlab serve`: a classifier over HTTP, for a page and for programs.

    POST /predict        one file -> {"predictions": [...]}; several -> as /predict-many
    POST /predict-many   at most 64 files -> what `mixlab predict --json` prints
    POST /occlusion      one file -> how much each part of it matters for the best label
    POST /view           one file -> what the model takes in of it, as a picture
    GET  /info /health /ready /metrics /openapi.json /docs, and the page at /

A file is the body itself, one of a form, or base64 in JSON; many are a plain tar, or the same (see `bodies`).
Nothing is fetched from anywhere, no model is loaded at a person's wish, and files are decoded in processes of
their own. Every answer but the page is JSON; errors are {"error": {"kind", "message"}}, at times with a "hint", and
name no path of this machine.
"""

import asyncio
import contextlib
import importlib.resources
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from pathlib import PurePath
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from mixlab.data.modality import MODALITIES, Modality
from mixlab.serving.batching import QueueFullError
from mixlab.serving.bodies import Contents
from mixlab.serving.guard import LOOPBACK, PAGE_FILES, Guard, RefusedError, busy, http_error, unexpected
from mixlab.serving.service import Service

KINDS = {"html": "text/html", "js": "text/javascript", "css": "text/css"}
MAX_TOP = 1000


def _top(request: Request) -> int:
    text = request.query_params.get("top", "5")
    if not (text.isascii() and text.isdigit()) or not 1 <= int(text[:6]) <= MAX_TOP or len(text) > 6:
        raise RefusedError(400, "usage", f"top must be a number from 1 to {MAX_TOP}")
    return int(text)


def _only(found: Contents, one: str) -> np.ndarray:
    """The one example that a request was to have, as it is kept. one: what it is called."""
    if found.is_list or found.examples[0].kept is None:
        raise RefusedError(415, one, f"this takes one {one} at a time")
    return found.examples[0].kept


def create_app(
    service: Service,
    *,
    hosts: tuple[str, ...] = LOOPBACK,
    token: str | None = None,
    root_path: str = "",
    language: str | None = None,
) -> ASGIApp:
    """The ASGI application. hosts: names that a Host header may have, without the port. token: what callers need.
    root_path: a prefix of all paths, such as `/mixlab`, whether or not the proxy before it takes it away.
    language: of the page, instead of the browser's; one of LANGUAGES."""
    one = service.modality.one

    async def answered(
        request: Request, plain: str, work: Callable[[Contents], Awaitable[dict[str, Any]]]
    ) -> dict[str, Any]:
        """What `work` makes of the examples that a request has, within its time."""
        async with service.received(request, plain) as job:

            async def everything() -> dict[str, Any]:
                return await work(await service.contents(job))

            with service.admitted():
                answer: dict[str, Any] = await unless_gone(
                    request, everything(), service.limits.request_seconds
                )
        return answer

    async def predict(request: Request) -> dict[str, Any]:
        top = _top(request)

        async def work(found: Contents) -> dict[str, Any]:
            if found.is_list:
                return await service.rows(found, top)
            return {"predictions": service.labels(await service.batcher.ask(_only(found, one)), top)}

        return await answered(request, "file", work)

    async def predict_many(request: Request) -> dict[str, Any]:
        top = _top(request)
        return await answered(request, "tar", lambda found: service.rows(found, top))

    async def occlusion(request: Request) -> dict[str, Any]:
        return await answered(request, "file", lambda found: service.occlusion(_only(found, one)))

    async def view(request: Request) -> dict[str, Any]:
        return await answered(request, "file", lambda found: service.view(_only(found, one)))

    facts: dict[str, Any] = {}

    async def info(request: Request) -> dict[str, Any]:
        if not facts:
            facts.update(await asyncio.to_thread(service.info))
        return facts

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "alive"})

    async def ready(request: Request) -> dict[str, Any]:
        await service.check_ready()
        return {"status": "ready"}

    async def metrics(request: Request) -> Response:
        text = service.metrics_text()
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def docs(request: Request) -> Response:
        return HTMLResponse(docs_for(service.modality))

    async def openapi(request: Request) -> Response:
        spec = spec_for(service.modality)
        return JSONResponse(spec | {"servers": [{"url": root_path}]} if root_path else spec)

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
        async with service.running():
            yield

    routes = [
        Route("/predict", answer(predict), methods=["POST"]),
        Route("/predict-many", answer(predict_many), methods=["POST"]),
        Route("/occlusion", answer(occlusion), methods=["POST"]),
        Route("/view", answer(view), methods=["POST"]),
        Route("/info", answer(info), methods=["GET"]),
        Route("/health", health, methods=["GET"]),
        Route("/ready", answer(ready), methods=["GET"]),
        Route("/metrics", metrics, methods=["GET"]),
        Route("/openapi.json", openapi, methods=["GET"]),
        *page_routes({"/": "page.html"}, language),
        Route("/docs", docs, methods=["GET"]),
    ]
    handlers: dict[Any, Any] = {HTTPException: http_error, Exception: unexpected}
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)
    app.router.redirect_slashes = False
    return Guard(app, hosts, token, service.metrics, root_path)


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


def page_routes(pages: Mapping[str, str], language: str | None) -> list[Route]:
    """The HTML files of `pages`, by path, and what they load. language: as for `create_app`."""
    files = {**pages, **{f"/{name}": name for name in PAGE_FILES}}

    async def page(request: Request) -> Response:
        name = files[request.scope["path"]]
        content = asset(name)
        if name.endswith(".html"):
            content = content.replace(b'data-language=""', f'data-language="{language or ""}"'.encode())
        kind = KINDS[name.rpartition(".")[2]]
        return Response(content, headers={"Content-Type": f"{kind}; charset=utf-8"})

    return [Route(path, page, methods=["GET"]) for path in files]


def docs_for(modality: Modality) -> str:
    """The page for programs, whose examples are requests that a model of this modality answers."""
    text = asset("docs.html").decode()
    if modality.name == "images":
        return text
    example = modality.program.example if modality.program else "FILE"
    words = {
        "photo.jpg": example,
        ".jpg": PurePath(example).suffix,
        "images": modality.many,
        "image": modality.one,
    }

    def of_modality(found: re.Match[str]) -> str:
        return re.sub("|".join(map(re.escape, words)), lambda word: words[word[0]], found[0])

    return re.sub("<pre.*?</pre>", of_modality, text, flags=re.DOTALL)


def spec_for(modality: Modality) -> dict[str, Any]:
    """The OpenAPI description, without the bodies and answers of other modalities."""
    others = {word for one in MODALITIES.values() if one is not modality for word in (one.one, one.many)}

    def is_other(schema: Any) -> bool:
        names = schema.get("required") if isinstance(schema, dict) else None
        return isinstance(names, list) and bool(others & set(names))

    def own(value: Any) -> Any:
        if isinstance(value, list):
            return [own(one) for one in value if not is_other(one)]
        if not isinstance(value, dict):
            return value
        kept = {key: own(one) for key, one in value.items() if key not in others}
        return {key: one for key, one in kept.items() if (key, one) != ("example", {})}

    found: dict[str, Any] = own(json.loads(asset("openapi.json")))
    return found


def asset(name: str) -> bytes:
    """A file of the page."""
    return importlib.resources.files("mixlab.serving").joinpath("page", name).read_bytes()
