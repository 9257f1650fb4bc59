"""What a server does at its limits: odd bodies, large ones all at once, decoders that stand still.

    python -m benchmarks.serving_limits RUN MODE [MODE ...] [--requests N] [--clients N] [--json FILE]

RUN: weights. Each mode starts a server of its own, in a process of its own, and prints an object:

    bodies   N forms, JSON objects and images, many of them damaged, under every Content-Type: no answer may be 5xx
    large    50 clients that send 60 MiB each at once, of each kind of body: how far memory grows, how soon it is well
    stopped  every decoding process stopped (SIGSTOP) with and without work, then SIGTERM: how long until the end
"""

import argparse
import base64
import concurrent.futures
import functools
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.serving import hostile, pictures, resident

MEBIBYTE = 2**20
FORM, BOUNDARY = "multipart/form-data", b"a-boundary-of-these-cases"
TYPES = (
    "image/png; charset=binary", "application/octet-stream", "application/x-www-form-urlencoded", "text/plain",
    "application/json", "application/json; charset=utf-16", "multipart/form-data", "multipart/mixed; boundary=x",
    'multipart/form-data; boundary="', "multipart/form-data; boundary=" + "b" * 300, "\u00e9", "", "a" * 3000,
)  # fmt: skip
NAMES = (
    "file",
    "",
    "a.png",
    "../../etc/passwd",
    "\u732b.png",
    "x" * 5000,
    'a"b',
    "a\\",
    "\x1b[31m",
    "\u202egnp",
    "a\x00b",
)


# -- bodies --------------------------------------------------------------------------------------------------


def pick(draw: random.Random, usual: Any, *odd: Any) -> Any:
    """Mostly what is usual."""
    return usual if draw.random() < 0.75 else draw.choice(odd)


def form(draw: random.Random, files: list[bytes]) -> tuple[str, bytes]:
    """A form with these files, its headers drawn from what is usual and what is odd."""
    mark, parts = b"--" + BOUNDARY, []
    for data in files:
        name, file_name = (pick(draw, usual, *NAMES) for usual in ("file", "a.png"))
        usual = f'form-data; name="{name}"; filename="{file_name}"'
        odd = (
            f"form-data; name=f; filename*=UTF-8''{file_name}",
            f'form-data; name="{name}"',
            "form-data",
            "",
        )
        lines = ["Content-Disposition: " + pick(draw, usual, *odd, f'attachment; filename="{file_name}"')]
        lines += pick(draw, [], ["X: y"], ["X: " + "y" * 5000], ["X: y"] * 12)
        lines += pick(draw, ["Content-Type: image/png"], [], ["Content-Transfer-Encoding: base64"], [":"])
        parts.append(mark + b"\r\n" + "\r\n".join(lines).encode() + b"\r\n\r\n" + data + b"\r\n")
    start = pick(draw, b"", b"a preamble\r\n", b"\r\n", b"BM")
    end = pick(draw, b"--\r\n", b"--", b"", b"\r\n--", b"--\r\nan epilogue")
    return f"{FORM}; boundary={BOUNDARY.decode()}", start + b"".join(parts) + mark + end


def json_body(draw: random.Random, files: list[bytes]) -> tuple[str, bytes]:
    """A JSON object with these files, or something near to one."""
    texts: list[Any] = []
    for data in files:
        text = draw.choice([base64.b64encode, base64.urlsafe_b64encode, base64.encodebytes])(data).decode()
        address = "data:image/png;base64," + text
        texts.append(
            pick(draw, text, address, text.rstrip("="), text[:-3], "", None, 7, [text], {"b64": text})
        )
    one, many = {"image": texts[0]}, {"images": texts}
    odd = (
        {"image": texts},
        {"images": texts[0]},
        texts,
        texts[0],
        {},
        one | many,
        {"img": 1},
        one | {"top": 3},
    )
    value = pick(draw, draw.choice([one, many]), *odd, {"images": []}, 1e999)
    text = json.dumps(value, ensure_ascii=draw.random() < 0.5)
    deep = ("[" * 100_000, '{"image":' * 5000, '{"image": "\\ud800"}', '{"image": ' + "9" * 5000 + "}")
    return "application/json", pick(draw, text, text[: len(text) // 2], *deep).encode()


def odd_body(draw: random.Random, good: list[bytes]) -> tuple[str, str, bytes]:
    """A path, a Content-Type and a body."""
    path = draw.choice(["/predict", "/predict", "/predict-many", "/occlusion"])
    number = pick(draw, 1, 2, 2, 5, 70)
    small = min(good, key=len)
    files = [
        (small if number > 5 else draw.choice(good)) if draw.random() < 0.75 else hostile(draw, good)[:20_000]
        for _ in range(number)
    ]
    plain = lambda draw, files: (draw.choice(TYPES), files[0])  # noqa: E731
    kind, body = draw.choice([form, form, json_body, json_body, plain])(draw, files)
    if draw.random() < 0.1:
        kind = draw.choice(TYPES)
    if body and draw.random() < 0.25:
        changed = bytearray(body)
        for _ in range(draw.choice([1, 5, 50])):
            changed[draw.randrange(min(len(changed), 400))] = draw.randrange(256)
        body = bytes(changed[: draw.choice([len(changed), len(changed) // 2 + 1])])
    return path, kind, body


def ask(connection: HTTPConnection, path: str, kind: str, body: bytes) -> tuple[int, bytes]:
    """Status and answer of one request, on a connection that is kept."""
    for attempt in range(2):
        try:
            connection.request("POST", path, body, {"Content-Type": kind.encode("utf-8")})  # type: ignore[dict-item]
            answer = connection.getresponse()
            return answer.status, answer.read()
        except OSError:  # closed in between, as a connection may be
            connection.close()
            if attempt:
                raise
    raise AssertionError


def once(port: int, path: str, kind: str, body: bytes) -> tuple[int, bytes]:
    """The same on a connection of its own."""
    with closing(HTTPConnection("127.0.0.1", port, timeout=120)) as connection:
        return ask(connection, path, kind, body)


def small_pictures() -> list[bytes]:
    """So that most of the time goes into what is odd, not into pixels."""
    return [data for data in pictures() if len(data) < 60_000]


def bodies(run: str, num_cases: int, num_clients: int) -> dict[str, Any]:
    good = small_pictures()
    statuses: Counter[int] = Counter()
    failures: list[dict[str, Any]] = []
    began = time.monotonic()

    def work(number: int, port: int) -> Counter[int]:
        draw, found = random.Random(number), Counter[int]()
        with closing(HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
            for case in range(-(-num_cases // num_clients)):
                path, kind, body = odd_body(draw, good)
                status, answer = ask(connection, path, kind, body)
                found[status] += 1
                if status >= 500 and len(failures) < 20:
                    failures.append({"client": number, "case": case, "answer": answer.decode()})
        return found

    with server(run) as running, concurrent.futures.ThreadPoolExecutor(num_clients) as pool:
        for found in pool.map(work, range(num_clients), [running.port] * num_clients):
            statuses.update(found)
        with closing(HTTPConnection("127.0.0.1", running.port, timeout=60)) as connection:
            connection.request("GET", "/metrics")
            (restarts,) = re.findall(
                rb"^mixlab_decoder_restarts (\S+)", connection.getresponse().read(), re.MULTILINE
            )
    return {
        "mode": "bodies", "cases": sum(statuses.values()), "statuses": dict(sorted(statuses.items())),
        "server_errors": sum(count for status, count in statuses.items() if status >= 500), "failures": failures,
        "decoder_restarts": float(restarts), "stderr": running.stderr, "seconds": round(time.monotonic() - began),
    }  # fmt: skip


# -- many large ones at once ---------------------------------------------------------------------------------


@functools.cache
def large_bodies(size: int) -> dict[str, tuple[str, bytes]]:
    """Content-Type and body of about `size` bytes, of each kind."""
    rng = np.random.default_rng(0)

    def noise(size: int) -> bytes:
        file, side = io.BytesIO(), int((size / 3) ** 0.5) - 8
        pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file, "PNG", compress_level=0)
        return file.getvalue()

    picture = noise(size)
    text = base64.b64encode(noise(size * 3 // 4)).decode()
    head = b"--" + BOUNDARY + b'\r\nContent-Disposition: form-data; name="f"; filename="a.png"\r\n\r\n'
    a_form = head + picture + b"\r\n--" + BOUNDARY + b"--\r\n"
    return {
        "noise": ("application/octet-stream", rng.bytes(size)),
        "picture": ("image/png", picture),
        "form": (f"multipart/form-data; boundary={BOUNDARY.decode()}", a_form),
        "json": ("application/json", json.dumps({"image": text}).encode()),
    }


def large(run: str, num_clients: int = 50, size: int = 60 * MEBIBYTE) -> dict[str, Any]:
    found: dict[str, Any] = {"mode": "large", "clients": num_clients, "mebibytes": size // MEBIBYTE}
    small = pictures()[0]
    for name, (kind, body) in large_bodies(size).items():
        with server(run) as running:
            port, pid = running.port, running.pid
            for _ in range(8):
                once(port, "/predict", "image/png", small)
            before, peak, over = sum(resident(pid)), 0, threading.Event()

            def watch(pid: int = pid, over: threading.Event = over) -> None:
                nonlocal peak
                while not over.wait(0.02):
                    peak = max(peak, sum(resident(pid)))

            watcher = threading.Thread(target=watch)
            watcher.start()
            statuses: Counter[str] = Counter()
            start = threading.Barrier(num_clients)

            def one(port: int = port, kind: str = kind, body: bytes = body, start: Any = start) -> str:
                start.wait()
                try:
                    return str(once(port, "/predict", kind, body)[0])
                except OSError as error:
                    return type(error).__name__

            with concurrent.futures.ThreadPoolExecutor(num_clients) as pool:
                for future in [pool.submit(one) for _ in range(num_clients)]:
                    statuses[future.result()] += 1
            began = time.monotonic()
            while once(port, "/predict", "image/png", small)[0] != 200:
                time.sleep(0.05)
            recovery = time.monotonic() - began
            over.set()
            watcher.join()
        found[name] = {
            "growth_mib": round((peak - before) / MEBIBYTE), "recovery_seconds": round(recovery, 2),
            "statuses": dict(sorted(statuses.items())), "stderr": running.stderr,
        }  # fmt: skip
    return found


# -- decoders that stand still -------------------------------------------------------------------------------


def decoding_processes(pid: int) -> list[int]:
    """Children of the forkserver, which is a child of the server."""
    return [grandchild for child in children_of(pid) for grandchild in children_of(child)]


def children_of(pid: int) -> list[int]:
    found: list[int] = []
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += [int(child) for child in (task / "children").read_text().split()]
    return found


def stopped(run: str) -> dict[str, Any]:
    """Seconds from SIGTERM to the end, and what /ready said, for each kind of standing still."""
    found: dict[str, Any] = {"mode": "stopped"}
    rng = np.random.default_rng(0)
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (1000, 1000, 3), dtype=np.uint8)).save(file, "PNG")
    for name, number in (
        ("idle", 0),
        ("with 2 posts of 3 MB", 2),
        ("with 20 posts of 3 MB", 20),
        ("forkserver too", 2),
    ):
        with server(run) as running:
            port, pid = running.port, running.pid
            once(port, "/predict", "image/png", pictures()[0])
            still = decoding_processes(pid)
            if name == "forkserver too":
                still += [child for child in children_of(pid) if children_of(child)]
            for process in still:
                os.kill(process, signal.SIGSTOP)

            def post(port: int = port) -> str:
                try:
                    return str(once(port, "/predict", "image/png", file.getvalue())[0])
                except OSError as error:
                    return type(error).__name__

            with concurrent.futures.ThreadPoolExecutor(max(number, 1)) as pool:
                posts = [pool.submit(post) for _ in range(number)]
                time.sleep(1)
                with closing(HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
                    connection.request("GET", "/ready")
                    ready = connection.getresponse().status
                began = time.monotonic()
                os.kill(pid, signal.SIGTERM)
                ended = _ends(pid, 60)
                seconds = time.monotonic() - began
                left = sum(not _ends(process, 10) for process in still)
                for process in [*still, *(() if ended else (pid,))]:
                    with suppress(OSError):
                        os.kill(process, signal.SIGKILL)
                statuses = Counter(one.result() for one in posts)
        found[name] = {
            "seconds_to_end": round(seconds, 2), "ended": ended, "ready": ready, "posts": dict(statuses),
            "processes_left": left, "stderr": running.stderr,
        }  # fmt: skip
    return found


def _ends(pid: int, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z":
                time.sleep(0.02)
                continue
        return True
    return False


# -- the server, and the command -----------------------------------------------------------------------------


@dataclass
class Running:
    """A server: its port, its process, and what it said on standard error, once it has ended."""

    port: int
    pid: int
    stderr: str = ""


@contextmanager
def server(run: str) -> Iterator[Running]:
    """`mixlab serve` itself."""
    command = [sys.executable, "-m", "mixlab", "serve", run, "--port", "0", "--device", "cpu", "--json"]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors) as process,
    ):
        assert process.stdout is not None
        address = json.loads(process.stdout.readline())["address"]
        running = Running(int(address.rsplit(":", 1)[1]), process.pid)
        try:
            yield running
        finally:
            process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=60)
            process.kill()
            errors.seek(0)
            running.stderr = "".join(line for line in errors if "Ctrl-C stops it" not in line)[-2000:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("modes", nargs="+", choices=["bodies", "large", "stopped"])
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    works = {
        "bodies": lambda: bodies(options.run, options.requests, options.clients),
        "large": lambda: large(options.run),
        "stopped": lambda: stopped(options.run),
    }
    for mode in options.modes:
        result = works[mode]()
        print(json.dumps(result, indent=1), flush=True)
        if options.json is not None:
            known = json.loads(options.json.read_text()) if options.json.exists() else {}
            options.json.write_text(json.dumps(known | {mode: result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
