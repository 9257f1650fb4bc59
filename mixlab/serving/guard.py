"""Before anything else: whose host is asked, from which page, with which token; and how refusals look."""

import hmac
import time
from urllib.parse import parse_qs

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mixlab.serving.metrics import Metrics

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
# Without a token: nothing of the model or of a run.
OPEN_PATHS = ("/", "/page.js", "/ui.js", "/page.css", "/docs", "/openapi.json", "/health", "/ready")
MAX_HEADER_BYTES = 16 * 1024
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; media-src 'self' blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


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


def busy() -> RefusedError:
    """Come again; a new one each time, since one that is raised again keeps all its tracebacks."""
    return RefusedError(503, "busy", "too many requests wait; come again", retry=1)


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
        # h11 counts only what comes in several parts.
        if sum(len(key) + len(value) for key, value in scope["headers"]) > MAX_HEADER_BYTES:
            return RefusedError(431, "too_large", "the headers are too large")
        headers: dict[str, list[str]] = {}
        for key, value in scope["headers"]:
            headers.setdefault(key.decode("latin-1"), []).append(value.decode("latin-1"))
        hosts = headers.get("host", [])
        if len(hosts) != 1 or _without_port(hosts[0]) not in self.hosts:
            return RefusedError(403, "host", "this server does not answer to that Host")
        origins = headers.get("origin", [])
        if any(origin.partition("://")[2] != hosts[0] for origin in origins):
            return RefusedError(403, "origin", "pages of other origins may not ask this server")
        if self.token is not None and scope["path"] not in OPEN_PATHS and not self._has_key(scope):
            given = headers.get("authorization", [""])[0].partition(" ")
            is_bearer = given[0].lower() == "bearer"
            if not is_bearer or not hmac.compare_digest(given[2].encode(), self.token.encode()):
                return RefusedError(401, "token", "this needs the header Authorization: Bearer TOKEN")
        return None

    def _has_key(self, scope: Scope) -> bool:
        """Whether the address itself has the key of the folder of this file: links and pictures send no header."""
        if not scope["path"].startswith("/files/"):
            return False
        folder = "/".join(scope["path"].split("/")[:4])
        given = parse_qs(scope["query_string"].decode("latin-1")).get("key", [""])[0]
        return hmac.compare_digest(given.encode(), file_key(self.token, folder).encode())


def file_key(token: str | None, folder: str) -> str:
    """What opens the files of one folder, such as `/files/runs/NAME`, to whoever was given it; "" without a token."""
    return "" if token is None else hmac.new(token.encode(), folder.encode(), "sha256").hexdigest()


def _without_port(host: str) -> str:
    """`localhost:8000` -> `localhost`, `[::1]:8000` -> `[::1]`."""
    end = host.rfind("]")
    colon = host.rfind(":")
    return (host if colon <= end else host[:colon]).lower()
