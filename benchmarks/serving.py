"""What a server stands: right answers under load, refusals for hostile callers, and what it takes to recover.

    python -m benchmarks.serving RUN MODE [MODE ...] [--requests N] [--clients N] [--seconds S] [--json FILE]

RUN: weights. Each mode starts a server of its own, in a process of its own, and prints an object:

    mixed     N requests of C clients, three in four good images (answers compared with the model's), others hostile
    overload  four times as many clients as are answered at once, 1,000 slow ones, some that go away, a body of 10 GB
    fuzz      N cases of bytes that are nearly HTTP, over raw sockets
    schema    some N requests that schemathesis (its command `st`, not installed with mixlab) makes of /openapi.json
    batching  images a second and the 99th percentile with batches of up to 32, and of 1, in turns
    kills     a decoding process killed every 10 seconds, for S seconds
"""

import argparse
import concurrent.futures
import http.client
import io
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mixlab.serving.predict import load

GOOD, TOLERANCE = 48, 1e-4
REFUSALS = {400, 403, 404, 405, 408, 413, 415, 429, 431, 503}


def pictures() -> list[bytes]:
    """Noise of several sizes and formats."""
    rng = np.random.default_rng(0)
    found = []
    for number in range(GOOD):
        height, width = (int(side) for side in rng.integers(16, 300, 2))
        file = io.BytesIO()
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file, ("PNG", "JPEG", "WEBP")[number % 3])
        found.append(file.getvalue())
    return found


def hostile(draw: random.Random, good: list[bytes]) -> bytes:
    """A body that is no image, or a damaged one, or one that would take much to decode."""
    data = bytearray(draw.choice(good))
    kind = draw.randrange(5)
    if kind == 0:
        return bytes(draw.randbytes(draw.randrange(1, 5000)))
    if kind == 1:
        return bytes(data[: draw.randrange(1, len(data))])
    if kind == 2:
        for _ in range(draw.randrange(1, 20)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        return bytes(data)
    if kind == 3:
        return BOMB
    return b"\x89PNG\r\n\x1a\n" + draw.randbytes(200)


def _bomb() -> bytes:
    file = io.BytesIO()
    Image.new("L", (20_000, 20_000)).save(file, "PNG", compress_level=9)
    return file.getvalue()


BOMB = _bomb()


@contextmanager
def serving(run: str, max_batch: int = 32) -> Iterator[tuple[int, int]]:
    """A server in a process of its own: its port and its process."""
    command = [sys.executable, "-m", "benchmarks.serving", run, "serve", "--max-batch", str(max_batch)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline()), process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=40)
            process.kill()


def serve(run: str, max_batch: int) -> None:
    from dataclasses import replace

    from mixlab.serving.listen import default_limits, listen, make_server
    from mixlab.serving.server import create_app
    from mixlab.serving.service import Service

    limits = replace(default_limits(), max_batch=max_batch)
    service = Service(load(run, device="cpu"), "bench", limits)
    app = create_app(service)
    listen(make_server(app, host="127.0.0.1", port=0, started=lambda port: print(port, flush=True)))


class Client:
    """One connection that is kept, and made again where the server closed it."""

    def __init__(self, port: int) -> None:
        self.port, self.connection = port, http.client.HTTPConnection("127.0.0.1", port, timeout=60)

    def post(self, path: str, body: bytes) -> tuple[int, Any]:
        """Status and answer; 0 if the server closed the connection without one, twice."""
        for _ in range(2):
            try:
                self.connection.request("POST", path, body)
                answer = self.connection.getresponse()
                return answer.status, json.loads(answer.read())
            except (OSError, http.client.HTTPException, ValueError):
                self.connection.close()
        return 0, None


def is_right(answer: dict[str, Any], expected: list[dict[str, Any]]) -> bool:
    found = answer["predictions"]
    return [g["label"] for g in found] == [g["label"] for g in expected] and all(
        abs(a["probability"] - b["probability"]) < TOLERANCE for a, b in zip(found, expected, strict=True)
    )


def resident(pid: int) -> tuple[int, int]:
    """Bytes of a process, and of its children, those of theirs included."""
    own, children, waiting = 0, 0, [pid]
    while waiting:
        one = waiting.pop()
        with suppress(OSError):
            size = int(Path(f"/proc/{one}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
            if one == pid:
                own = size
            else:
                children += size
            for task in Path(f"/proc/{one}/task").iterdir():
                waiting += [int(child) for child in (task / "children").read_text().split()]
    return own, children


def mixed(run: str, num_requests: int, num_clients: int) -> dict[str, Any]:
    good = pictures()
    expected = [row["predictions"] for row in load(run, device="cpu").predict(good)]
    statuses: Counter[str] = Counter()
    wrong = 0
    with serving(run) as (port, pid):

        def work(number: int, count: int) -> tuple[Counter[str], int]:
            draw, client, found, bad = random.Random(number), Client(port), Counter[str](), 0
            for _ in range(count):
                if draw.random() < 0.75:
                    which = draw.randrange(len(good))
                    status, answer = client.post("/predict", good[which])
                    found[f"good {status}"] += 1
                    bad += status == 200 and not is_right(answer, expected[which])
                else:
                    status, _ = client.post("/predict", hostile(draw, good))
                    found[f"hostile {status}"] += 1
            return found, bad

        each = -(-num_requests // (10 * num_clients))  # rounded up, so that no fewer are made than asked for

        def everyone(first: int) -> None:
            nonlocal wrong
            with concurrent.futures.ThreadPoolExecutor(num_clients) as pool:
                for found, bad in pool.map(work, range(first, first + num_clients), [each] * num_clients):
                    statuses.update(found)
                    wrong += bad

        everyone(0)  # until caches and pools have their size
        sizes, began = [resident(pid)], time.monotonic()
        for tenth in range(1, 10):
            everyone(tenth * num_clients)
            sizes.append(resident(pid))
        seconds = time.monotonic() - began
    return {
        "mode": "mixed", "requests": sum(statuses.values()), "clients": num_clients,
        "statuses": dict(sorted(statuses.items())), "wrong_answers": wrong,
        "requests_per_second": round(9 * each * num_clients / seconds, 1),
        "memory_growth": round(sum(sizes[-1]) / sum(sizes[0]) - 1, 4),  # from the first tenth to the last
        "server_mib": [round(own / 2**20, 1) for own, _ in sizes],
        "decoders_mib": [round(children / 2**20, 1) for _, children in sizes],
    }  # fmt: skip


def overload(run: str, num_clients: int) -> dict[str, Any]:
    good = pictures()
    statuses: Counter[int] = Counter()
    with serving(run) as (port, pid):
        slow = []
        for _ in range(1000):
            client = socket.create_connection(("127.0.0.1", port), timeout=30)
            client.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n")
            slow.append(client)

        def work(number: int) -> Counter[int]:
            draw, client, found = random.Random(number), Client(port), Counter[int]()
            end = time.monotonic() + 20
            while time.monotonic() < end:
                if draw.random() < 0.1:  # goes away before the answer
                    data = draw.choice(good)
                    with socket.create_connection(("127.0.0.1", port), timeout=30) as gone:
                        gone.sendall(
                            b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
                            % len(data)
                        )
                        gone.sendall(data)
                    continue
                found[client.post("/predict", draw.choice(good))[0]] += 1
            return found

        with concurrent.futures.ThreadPoolExecutor(num_clients) as pool:
            for found in pool.map(work, range(num_clients)):
                statuses.update(found)
        with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
            client.sendall(
                b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10000000000\r\n\r\n"
            )
            statuses[int(client.recv(64).split()[1])] += 1
        began = time.monotonic()
        while Client(port).post("/predict", good[0])[0] != 200:
            time.sleep(0.05)
        recovery = time.monotonic() - began
        answers: Counter[str] = Counter()
        for client in slow:
            with suppress(OSError):
                answers[client.recv(12).decode() or "closed"] += 1
            client.close()
        memory = sum(resident(pid))
    return {
        "mode": "overload", "clients": num_clients, "statuses": dict(sorted(statuses.items())),
        "slow_clients": dict(answers), "recovery_seconds": round(recovery, 2), "memory_mib": round(memory / 2**20),
    }  # fmt: skip


def fuzz(run: str, num_cases: int, num_clients: int) -> dict[str, Any]:
    good = pictures()
    statuses: Counter[str] = Counter()
    with serving(run) as (port, _):

        def case(draw: random.Random) -> bytes:
            method = draw.choice(
                ["GET", "POST", "PUT", "OPTIONS", "TRACE", "CONNECT", "\x00", "post", "GET " * 3]
            )
            path = draw.choice(
                ["/predict", "/predict-many", "/info", "/", "//", "/%00", "*", "/" + "a" * 5000, "http://x/"]
            )
            lines = [f"{method} {path} HTTP/{draw.choice(['1.1', '1.0', '2.0', '9', ''])}"]
            names = [
                "Host",
                "Content-Length",
                "Transfer-Encoding",
                "Origin",
                "Authorization",
                "Expect",
                "Upgrade",
                "X\x00",
            ]
            for _ in range(draw.randrange(8)):
                values = [
                    "localhost",
                    "-1",
                    "5",
                    "99999999999",
                    "chunked",
                    "chunked, gzip",
                    "100-continue",
                    "websocket",
                    "\u00e9",
                    "",
                ]
                lines.append(f"{draw.choice(names)}: {draw.choice(values)}")
            head = draw.choice(["\r\n", "\n", "\r"]).join(lines).encode("utf-8") + draw.choice(
                [b"\r\n\r\n", b"\n\n", b""]
            )
            data = bytearray(
                head + draw.choice([b"", b"5\r\nhello\r\n0\r\n\r\n", draw.choice(good), draw.randbytes(50)])
            )
            for _ in range(draw.choice([0, 0, 1, 5])):
                data[draw.randrange(len(data))] = draw.randrange(256)
            return bytes(data)

        def work(number: int) -> Counter[str]:
            draw, found = random.Random(number), Counter[str]()
            for _ in range(-(-num_cases // num_clients)):
                try:
                    with socket.create_connection(("127.0.0.1", port), timeout=15) as client:
                        client.sendall(case(draw))
                        client.shutdown(socket.SHUT_WR)
                        start = client.recv(64)
                    found[start.split()[1].decode() if start.startswith(b"HTTP/") else "closed"] += 1
                except OSError as error:
                    found[type(error).__name__] += 1
            return found

        with concurrent.futures.ThreadPoolExecutor(num_clients) as pool:
            for found in pool.map(work, range(num_clients)):
                statuses.update(found)
        alive = Client(port).post("/predict", good[0])[0] == 200
    return {
        "mode": "fuzz",
        "cases": sum(statuses.values()),
        "statuses": dict(sorted(statuses.items())),
        "alive": alive,
    }


def schema(run: str, num_requests: int) -> dict[str, Any]:
    """Three operations take a body, and have a third of the cases each; the others have only a few."""
    with serving(run) as (port, _), tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [
            "st", "run", f"http://127.0.0.1:{port}/openapi.json", "-n", str(num_requests // 3),
            "--phases", "coverage,fuzzing", "-c", "not_a_server_error", "--continue-on-failure", "--no-color",
            "--report", "json", "--report-json-path", str(report),
        ]  # fmt: skip
        environment = os.environ | {
            "SCHEMATHESIS_HOOKS": "schema_hooks",
            "PYTHONPATH": str(Path(__file__).parent),
        }
        subprocess.run(command, cwd=folder, env=environment, stdout=sys.stderr)  # 1 where it found something
        found = json.loads(report.read_text())
        alive = Client(port).post("/predict", pictures()[0])[0] == 200
    return {
        "mode": "schema",
        "version": found["schemathesis_version"],
        "cases": found["test_cases"]["generated"],
        "server_errors": found["test_cases"]["with_failures"],
        "errors": found["errors"],
        "operations": found["operations"]["tested"],
        "seconds": round(found["running_time"]),
        "alive": alive,
    }


def batching(run: str, num_clients: int, rounds: int = 5, seconds: float = 6.0) -> dict[str, Any]:
    good = pictures()
    found: dict[int, list[tuple[float, float]]] = {32: [], 1: []}
    with serving(run, 32) as (together, _), serving(run, 1) as (alone, _):

        def work(port: int, end: float) -> list[float]:
            client, times = Client(port), []
            draw = random.Random(port)
            while (began := time.monotonic()) < end:
                if client.post("/predict", draw.choice(good))[0] == 200:
                    times.append(time.monotonic() - began)
            return times

        for number in range(rounds + 1):
            for size, port in ((32, together), (1, alone)):
                end = time.monotonic() + seconds
                with concurrent.futures.ThreadPoolExecutor(num_clients) as pool:
                    parts = pool.map(work, [port] * num_clients, [end] * num_clients)
                    times = sorted(t for part in parts for t in part)
                if number:
                    found[size].append((len(times) / seconds, times[int(0.99 * len(times))]))
    speed = [a[0] / b[0] for a, b in zip(found[32], found[1], strict=True)]
    late = [a[1] / b[1] for a, b in zip(found[32], found[1], strict=True)]
    return {
        "mode": "batching", "clients": num_clients, "rounds": rounds,
        "requests_per_second": {size: round(statistics.median(v[0] for v in own), 1) for size, own in found.items()},
        "p99_ms": {size: round(1000 * statistics.median(v[1] for v in own), 1) for size, own in found.items()},
        "throughput_ratio": round(statistics.median(speed), 3),
        "throughput_range": [round(min(speed), 3), round(max(speed), 3)],
        "p99_ratio": round(statistics.median(late), 3),
    }  # fmt: skip


def kills(run: str, num_clients: int, seconds: float) -> dict[str, Any]:
    good = pictures()
    expected = [row["predictions"] for row in load(run, device="cpu").predict(good)]
    statuses: Counter[int] = Counter()
    wrong, killed, end = 0, 0, time.monotonic() + seconds
    with serving(run) as (port, pid):

        def work(number: int) -> tuple[Counter[int], int]:
            draw, client, found, bad = random.Random(number), Client(port), Counter[int](), 0
            while time.monotonic() < end:
                which = draw.randrange(len(good))
                status, answer = client.post("/predict", good[which])
                found[status] += 1
                bad += status == 200 and not is_right(answer, expected[which])
            return found, bad

        with concurrent.futures.ThreadPoolExecutor(num_clients) as pool:
            futures = [pool.submit(work, number) for number in range(num_clients)]
            while time.monotonic() + 10 < end:
                time.sleep(10)
                with suppress(OSError, ValueError, IndexError):
                    os.kill(_a_decoder(pid), signal.SIGKILL)
                    killed += 1
            for future in futures:
                found, bad = future.result()
                statuses.update(found)
                wrong += bad
    return {
        "mode": "kills", "seconds": seconds, "kills": killed, "statuses": dict(sorted(statuses.items())),
        "wrong_answers": wrong,
    }  # fmt: skip


def _a_decoder(pid: int) -> int:
    """A decoding process: a child of the forkserver, which is a child of the server."""
    children = [
        int(c) for t in Path(f"/proc/{pid}/task").iterdir() for c in (t / "children").read_text().split()
    ]
    grandchildren = [
        int(c)
        for child in children
        for t in Path(f"/proc/{child}/task").iterdir()
        for c in (t / "children").read_text().split()
    ]
    return random.choice(grandchildren)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument(
        "modes", nargs="+", choices=["mixed", "overload", "fuzz", "schema", "batching", "kills", "serve"]
    )
    parser.add_argument("--requests", type=int, default=200_000)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--max-batch", type=int, default=32)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.modes == ["serve"]:
        serve(options.run, options.max_batch)
        return
    works = {
        "mixed": lambda: mixed(options.run, options.requests, options.clients),
        "overload": lambda: overload(options.run, 4 * 256),
        "fuzz": lambda: fuzz(options.run, options.requests, options.clients),
        "schema": lambda: schema(options.run, options.requests),
        "batching": lambda: batching(options.run, options.clients),
        "kills": lambda: kills(options.run, options.clients, options.seconds),
    }
    for mode in options.modes:
        result = works[mode]()
        print(json.dumps(result), flush=True)
        if options.json is not None:
            known = json.loads(options.json.read_text()) if options.json.exists() else {}
            options.json.write_text(json.dumps(known | {mode: result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
