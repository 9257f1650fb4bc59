"""Before anything else: to which host, from which page, with which token; and how refusals look."""

import hmac
import time
from urllib.parse import parse_qs

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mixlab.serving.metrics import Metrics

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
PAGE_FILES = (
    "page.css", "language.js",
    "page.js", "page_texts.js", "map.js", "results.js", "images.js", "sounds.js", "sound_texts.js", "recorder.js",
    "ui.js", "ui_texts.js", "chart.js", "compare.js",
)  # fmt: skip
# Without a token: nothing of the model or of a run.
OPEN_PATHS = ("/", *(f"/{name}" for name in PAGE_FILES), "/docs", "/openapi.json", "/health", "/ready")
ANY_HOST = "*"
PROBES = ("/health", "/ready")  # what asks them knows an address, not a name, and they tell nothing
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
    """An answer other than 200: status, kind and message; hint: what to do; retry: seconds until coming again.

    is_last: whether the connection is closed then, whatever else comes on it.
    """

    def __init__(
        self,
        status: int,
        kind: str,
        message: str,
        *,
        hint: str | None = None,
        retry: int | None = None,
        is_last: bool = False,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.message, self.hint, self.retry = status, kind, message, hint, retry
        self.is_last = is_last or status in (408, 413)  # what is still coming will not be read

    def response(self) -> Response:
        headers = {} if self.retry is None else {"Retry-After": str(self.retry)}
        if self.is_last:
            headers["Connection"] = "close"
        hint = {} if self.hint is None else {"hint": self.hint}
        return JSONResponse(
            {"error": {"kind": self.kind, "message": self.message} | hint}, self.status, headers=headers
        )


def busy() -> RefusedError:
    """Come again; a new one each time, since one that is raised again keeps all its tracebacks."""
    return RefusedError(503, "busy", "too many requests wait; come again", retry=1)


async def http_error(request: Request, error: Exception) -> Response:
    """Starlette's own refusals as JSON."""
    assert isinstance(error, HTTPException)
    kind = {404: "not_found", 405: "method"}.get(error.status_code, "usage")
    hint = (
        "GET /docs lists the addresses, and how each is called" if error.status_code in (404, 405) else None
    )
    response = RefusedError(error.status_code, kind, str(error.detail), hint=hint).response()
    response.headers.update(error.headers or {})
    return response


async def unexpected(request: Request, error: Exception) -> Response:
    """What nobody thought of, without its text."""
    return RefusedError(500, "internal", "this is a fault of the server").response()


class Guard:
    """Before anything else: to which host, from which page, with which token; and headers for every answer.

    The Host of every request must be one of ours, else a page elsewhere could reach this server under a name of its
    own (DNS rebinding); an Origin, which browsers send, must be this server. Probes answer to any Host, and so does
    /metrics where a token is needed. root_path: a prefix that a proxy may leave in the paths, such as `/mixlab`.
    """

    def __init__(
        self, app: ASGIApp, hosts: tuple[str, ...], token: str | None, metrics: Metrics, root_path: str = ""
    ) -> None:
        self.app, self.hosts, self.token, self.metrics, self.root_path = app, hosts, token, metrics, root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return
            await self.app(scope, receive, send)
            return
        began, status = time.perf_counter(), 500
        scope = self._without_prefix(scope)

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
            app = self.app if refused is None else refused.response()
            if refused is None and not scope["path"]:  # the prefix alone: the page's addresses need its slash
                app = RedirectResponse(f"{self.root_path}/", 308)
            await app(scope, receive, guarded)
        finally:
            self.metrics.observe_request(scope["path"], status, time.perf_counter() - began)

    def _refusal(self, scope: Scope) -> RefusedError | None:
        # h11 counts only what comes in several parts.
        if sum(len(key) + len(value) for key, value in scope["headers"]) > MAX_HEADER_BYTES:
            return RefusedError(431, "too_large", "the headers are too large")
        headers: dict[str, list[str]] = {}
        for key, value in scope["headers"]:
            headers.setdefault(key.decode("latin-1"), []).append(value.decode("latin-1"))
        if "content-length" in headers and "transfer-encoding" in headers:
            # A proxy before us may have believed the other one, and then the rest is another person's request.
            return RefusedError(400, "usage", "Content-Length and Transfer-Encoding together", is_last=True)
        hosts = headers.get("host", [])
        if not self._answers_to(hosts, scope["path"]):
            hint = "start it with --name NAME for each name that it is reached by"
            return RefusedError(403, "host", "this server does not answer to that Host", hint=hint)
        origins = headers.get("origin", [])
        if any([origin.partition("://")[2]] != hosts for origin in origins):
            return RefusedError(403, "origin", "pages of other origins may not ask this server")
        if self.token is not None and (scope["path"] or "/") not in OPEN_PATHS and not self._has_key(scope):
            given = headers.get("authorization", [""])[0].partition(" ")
            is_bearer = given[0].lower() == "bearer"
            if not is_bearer or not hmac.compare_digest(given[2].encode(), self.token.encode()):
                return RefusedError(401, "token", "this needs the header Authorization: Bearer TOKEN")
        return None

    def _without_prefix(self, scope: Scope) -> Scope:
        if not self.root_path or not f"{scope['path']}/".startswith(f"{self.root_path}/"):
            return scope
        return {**scope, "path": scope["path"].removeprefix(self.root_path)}

    def _answers_to(self, hosts: list[str], path: str) -> bool:
        if path in PROBES or (path == "/metrics" and self.token is not None):
            return True
        return len(hosts) == 1 and (ANY_HOST in self.hosts or _without_port(hosts[0]) in self.hosts)

    def _has_key(self, scope: Scope) -> bool:
        """Whether the address itself has the key of the folder of this file: links and images send no header."""
        if not scope["path"].startswith("/files/"):
            return False
        folder = "/".join(scope["path"].split("/")[:4])
        given = parse_qs(scope["query_string"].decode("latin-1")).get("key", [""])[0]
        return hmac.compare_digest(given.encode(), file_key(self.token, folder).encode())


def file_key(token: str | None, folder: str) -> str:
    """What opens the files of one folder, such as `/files/runs/NAME`, to its receiver; "" without a token."""
    return "" if token is None else hmac.new(token.encode(), folder.encode(), "sha256").hexdigest()


def _without_port(host: str) -> str:
    """`localhost:8000` -> `localhost`, `[::1]:8000` -> `[::1]`."""
    end = host.rfind("]")
    colon = host.rfind(":")
    return (host if colon <= end else host[:colon]).lower()
