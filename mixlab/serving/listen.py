"""A server on a port: uvicorn, with a limit for slow headers, and a drain on SIGTERM."""

import asyncio
from collections.abc import Callable
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from mixlab.errors import UsageError
from mixlab.serving.guard import LOOPBACK, MAX_HEADER_BYTES, SECURITY_HEADERS, RefusedError
from mixlab.serving.service import Limits

HEADER_SECONDS = 10.0  # for the headers of a request to be complete
KEEP_ALIVE_SECONDS = 5
DRAIN_SECONDS = 20
MIN_TOKEN = 16  # characters
SECURITY_HEADERS_RAW = [(key.lower().encode(), value.encode()) for key, value in SECURITY_HEADERS.items()]


class TimedProtocol(H11Protocol):
    """uvicorn's, which waits for ever for headers that come byte by byte; here for HEADER_SECONDS."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._wait()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _wait(self) -> None:
        if not self._is_idle():
            self._stop()
        elif self._late is None:
            self._late = self.loop.call_later(HEADER_SECONDS, self._too_slow)

    def _stop(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP, refused as everything else is: JSON, with the same headers."""
        response = RefusedError(400, "usage", "this is no HTTP request").response()
        headers = [*response.raw_headers, *SECURITY_HEADERS_RAW, (b"connection", b"close")]
        for event in (
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=bytes(response.body)),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event))
        self.transport.close()

    def _too_slow(self) -> None:
        self._late = None
        if self._is_idle() and not self.transport.is_closing():
            self.transport.close()


class _Server(uvicorn.Server):
    def __init__(
        self, config: uvicorn.Config, started: Callable[[int], None], stopping: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self.say_started, self.say_stopping = started, stopping

    def handle_exit(self, sig: int, frame: Any) -> None:
        self.say_stopping()
        super().handle_exit(sig, frame)

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.say_started(self.servers[0].sockets[0].getsockname()[1])


def check_address(host: str, port: int, token: str | None) -> None:
    """UsageError if there is no such port, others could reach the server without a token, or the token is none."""
    if not 0 <= port <= 65535:
        raise UsageError(f"{port} is no port", where="--port", hint="0 to 65535; 0 takes a free one")
    if token is not None and (len(token) < MIN_TOKEN or not token.isascii() or not token.isprintable()):
        raise UsageError(
            f"a token has at least {MIN_TOKEN} printable characters",
            where="--token",
            hint='python -c "import secrets; print(secrets.token_urlsafe())" makes one',
        )
    if token is None and host not in ("127.0.0.1", "localhost", "::1"):
        raise UsageError(
            f"at {host} other machines could reach this server",
            where="--host",
            hint="give --token (or MIXLAB_TOKEN), or stay at 127.0.0.1",
        )


def allowed_hosts(host: str, names: tuple[str, ...] = ()) -> tuple[str, ...]:
    """What a Host header may say: loopback's names, `host`, and `names` by which it is reached from elsewhere."""
    return (*LOOPBACK, f"[{host}]" if ":" in host else host, *(name.lower() for name in names))


def make_server(
    app: ASGIApp,
    *,
    host: str,
    port: int,
    started: Callable[[int], None] = lambda port: None,
    stopping: Callable[[], None] = lambda: None,
) -> uvicorn.Server:
    """A server whose `run()` serves until SIGINT or SIGTERM; requests under way are answered first.

    started: called with the port once it listens; stopping: when a signal came.
    """
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=TimedProtocol,
        ws="none",
        lifespan="on",
        log_level="critical",
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=DRAIN_SECONDS,
    )
    return _Server(config, started, stopping)


def listen(server: uvicorn.Server) -> None:
    """Run it. UsageError if its port cannot be had."""
    try:
        server.run()
    except SystemExit as error:  # how uvicorn says so
        raise UsageError(
            f"nothing can listen at {server.config.host}:{server.config.port}",
            where="--port",
            hint="is it taken? --port 0 finds a free one",
        ) from error


def default_limits() -> Limits:
    """What suits this machine."""
    from mixlab.device import num_cores

    return Limits(decoders=max(min(num_cores(), 4), 1))
