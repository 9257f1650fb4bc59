"""A server on a port: uvicorn, with a limit for slow headers, and a drain on SIGTERM."""

import asyncio
import re
import resource
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from mixlab.errors import MixlabError, UsageError
from mixlab.serving.guard import ANY_HOST, LOOPBACK, MAX_HEADER_BYTES, SECURITY_HEADERS, RefusedError
from mixlab.serving.service import Limits

MAX_CONNECTIONS = 4096  # at a time
OWN_FILES = 256  # beside those of the connections
DRAIN_SECONDS = 20
MIN_TOKEN = 16  # characters
HOST_NAME = re.compile(r"[A-Za-z0-9_.-]+|\[?[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*\]?")
ROOT_PATH = re.compile(r"(/[A-Za-z0-9_.~-]+)+")
SECURITY_HEADERS_RAW = [(key.lower().encode(), value.encode()) for key, value in SECURITY_HEADERS.items()]


class TimedProtocol(H11Protocol):
    """uvicorn's, which waits for ever for headers that come byte by byte, and for clients that do not read.

    header_seconds: for the headers of a request to be complete. write_seconds: for a client to read what was written.
    max_connections: that are open at a time.
    """

    header_seconds = 10.0
    keep_alive_seconds = 5
    write_seconds = 20.0
    max_connections = MAX_CONNECTIONS
    _late: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # pause_writing comes as soon as anything is left over
        if len(self.connections) > self.max_connections:
            self._refuse(RefusedError(503, "busy", "too many connections; come again", retry=1))
        else:
            self._wait()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._unread is None:
            self._unread = self.loop.call_later(self.write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_unread()

    def _stop_unread(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._wait()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        self._stop_unread()
        super().connection_lost(exc)

    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _wait(self) -> None:
        if not self._is_idle():
            self._stop()
        elif self._late is None:
            self._late = self.loop.call_later(self.header_seconds, self._too_slow)

    def _stop(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP, refused as everything else is: JSON, with the same headers."""
        self._refuse(RefusedError(400, "usage", "this is no HTTP request"))

    def _refuse(self, error: RefusedError) -> None:
        response = error.response()
        headers = [*response.raw_headers, *SECURITY_HEADERS_RAW, (b"connection", b"close")]
        reason = HTTPStatus(error.status).phrase.encode()
        for event in (
            h11.Response(status_code=error.status, headers=headers, reason=reason),
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


def allowed_hosts(host: str, names: tuple[str, ...] = (), token: str | None = None) -> tuple[str, ...]:
    """What a Host header may say: loopback's names, `host`, and `names` by which it is reached from elsewhere.

    UsageError if one is no name. `*` is any, with a token only: without one any page on the web could ask the server
    under a name of its own.
    """
    for name in names:
        if name == ANY_HOST and token is None:
            raise UsageError(
                "without a token a server answers to names of its own only, else any page on the web could ask it",
                where="--name '*'",
                hint="give --token (or MIXLAB_TOKEN), or each name",
            )
        if name != ANY_HOST and not HOST_NAME.fullmatch(name):
            raise UsageError(
                f"{name!r} is no name of a host",
                where="--name",
                hint="as in my.machine.example or 10.0.0.7, without http:// and port; '*' is any, with a token",
            )
    return (*LOOPBACK, *(_bracketed(name.lower()) for name in (host, *names)))


def _bracketed(name: str) -> str:
    """As a Host header has it: an IPv6 address in brackets."""
    return f"[{name}]" if ":" in name and not name.startswith("[") else name


def check_root_path(root_path: str) -> str:
    """`/mixlab/` -> `/mixlab`; "" stays. UsageError if it is no path."""
    found = root_path.rstrip("/")
    if found and not ROOT_PATH.fullmatch(found):
        raise UsageError(f"{root_path!r} is no path", where="--root-path", hint="as in /mixlab")
    return found


def make_server(
    app: ASGIApp,
    *,
    host: str,
    port: int,
    started: Callable[[int], None] = lambda port: None,
    stopping: Callable[[], None] = lambda: None,
    protocol: type[TimedProtocol] = TimedProtocol,
) -> uvicorn.Server:
    """A server whose `run()` serves until SIGINT or SIGTERM; requests under way are answered first.

    started: called with the port once it listens; stopping: when a signal came. protocol: of each connection.
    """
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=protocol,
        ws="none",
        lifespan="on",
        log_level="critical",
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        timeout_keep_alive=protocol.keep_alive_seconds,
        timeout_graceful_shutdown=DRAIN_SECONDS,
    )
    return _Server(config, started, stopping)


def _allow_connections() -> None:
    """Let the process have a file for each connection, or fewer connections where it may not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS + OWN_FILES
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    found = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (found, hard))
    TimedProtocol.max_connections = max(found - OWN_FILES, 16)


def listen(server: uvicorn.Server) -> None:
    """Run it. UsageError if its port cannot be had, MixlabError if it does not start for another reason."""
    _allow_connections()
    try:
        server.run()
    except SystemExit as error:  # how uvicorn says so
        if server.lifespan.should_exit:
            raise MixlabError(
                "the processes that decode files did not start",
                hint="is there memory left? Try again when the machine is less busy",
            ) from error
        raise UsageError(
            f"nothing can listen at {server.config.host}:{server.config.port}",
            where="--port",
            hint="is it taken? --port 0 finds a free one",
        ) from error


def default_limits() -> Limits:
    """What suits this machine."""
    from mixlab.device import num_cores

    return Limits(decoders=max(min(num_cores(), 4), 1))
