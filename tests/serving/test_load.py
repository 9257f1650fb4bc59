"""`mixlab serve` where too much comes, where parts of it stand still, and where clients do not read."""

import concurrent.futures
import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
import time
from dataclasses import replace

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from benchmarks.serving_limits import large, stopped
from mixlab.errors import MixlabError
from mixlab.serving.decoder import DecoderError, Decoders, Process
from mixlab.serving.listen import TimedProtocol, listen, make_server
from mixlab.serving.predict import load
from mixlab.serving.server import create_app
from mixlab.serving.service import Service
from tests.serving.test_server import (  # noqa: F401
    LIMITS,
    ask,
    picture,
    raw,
    run,
    server,
    serving,
    until,
)


def post(port, data, **options):
    return ask(port, "/predict", data, **options)[0]


def pids(service):
    return [one.process.pid for one in service.decoders.processes]


# -- bytes that wait -----------------------------------------------------------------------------------------


def test_bytes_that_wait_are_limited_across_connections(run):  # noqa: F811
    data = picture(size=(150, 150))
    limits = replace(LIMITS, waiting_bytes=3 * len(data), read_seconds=5.0, decoders=1)
    head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(data)
    with serving(run, limits) as (port, service):
        clients = [socket.create_connection(("127.0.0.1", port), timeout=20) for _ in range(3)]
        for client in clients:  # all but the last byte
            client.sendall(head + data[:-1])
        until(lambda: service.num_waiting_bytes == 3 * (len(data) - 1))
        status, headers, answer = ask(port, "/predict", data)
        assert (status, answer["error"]["kind"]) == (503, "busy")
        assert int(headers["Retry-After"]) >= 1
        assert f"mixlab_waiting_bytes {float(3 * (len(data) - 1))}".encode() in ask(port, "/metrics")[2]
        for client in clients:
            client.sendall(data[-1:])
            assert client.recv(12) == b"HTTP/1.1 200"
            client.close()
        assert service.num_waiting_bytes == 0
        assert post(port, data) == 200


def test_what_is_in_a_stopped_decoder_is_counted_until_its_end_also_when_nobody_waits(run):  # noqa: F811
    data = picture(size=(300, 300))
    limits = replace(LIMITS, decoders=1, request_seconds=1.5)
    with serving(run, limits) as (port, service):
        os.kill(pids(service)[0], signal.SIGSTOP)
        with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
            client.sendall(
                b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(data) + data
            )
            until(lambda: service.num_waiting_bytes == len(data))
            time.sleep(0.2)
        time.sleep(0.3)  # it has gone
        assert (service.num_waiting_bytes, service.num_requests) == (len(data), 1)
        until(lambda: service.num_waiting_bytes == 0, 5)
        until(lambda: post(port, picture()) == 200)


@pytest.mark.slow  # gigabytes through sockets
def test_fifty_bodies_of_sixty_mebibytes_at_once_grow_memory_by_768_at_most(run):  # noqa: F811
    found = large(str(run))
    for kind in ("noise", "picture", "form", "json"):
        assert found[kind]["growth_mib"] <= 768, found
        assert found[kind]["recovery_seconds"] <= 5
        assert found[kind]["stderr"] == ""
        assert found[kind]["statuses"].keys() <= {"200", "415", "503"}


# -- decoders that stand still -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(40, 30), (300, 300)])  # less, and more, than a pipe holds
def test_a_decoder_that_stands_still_is_replaced_at_the_deadline(run, size):  # noqa: F811
    limits = replace(LIMITS, decoders=2, request_seconds=1.5)
    with serving(run, limits) as (port, service):
        for pid in pids(service):
            os.kill(pid, signal.SIGSTOP)
        began = time.monotonic()
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda seed: ask(port, "/predict", picture(seed, size)), range(4)))
        assert time.monotonic() - began < 5
        assert {status for status, _, _ in answers} == {503}
        assert all("Retry-After" in headers for _, headers, _ in answers)
        until(lambda: [post(port, picture(seed, size)) for seed in range(4)] == [200] * 4)
        assert service.decoders.num_restarts >= 2


def test_a_job_whose_time_is_over_is_not_begun_and_costs_no_process(run):  # noqa: F811
    limits = replace(LIMITS, decoders=1, request_seconds=1.0)
    with serving(run, limits) as (port, service):
        os.kill(pids(service)[0], signal.SIGSTOP)
        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            statuses = set(pool.map(lambda seed: post(port, picture(seed)), range(12)))
        assert statuses == {503}
        until(lambda: post(port, picture()) == 200)
        assert service.decoders.num_restarts <= 2  # not one for each that had waited


def test_ready_tells_the_truth_of_decoders_and_makes_them_well(run):  # noqa: F811
    with serving(run, replace(LIMITS, decoders=2, probe_seconds=1.2)) as (port, service):
        until(lambda: ask(port, "/ready")[0] == 200)
        assert post(port, picture()) == 200
        for pid in pids(service):
            os.kill(pid, signal.SIGSTOP)
        time.sleep(1.1)  # an answer of a moment ago speaks for it
        began = time.monotonic()
        status, headers, answer = ask(port, "/ready")
        assert (status, answer["error"]["kind"]) == (503, "decoder")
        assert "Retry-After" in headers
        assert time.monotonic() - began < 2.0  # those who ask give up soon
        assert ask(port, "/health")[0] == 200
        until(lambda: ask(port, "/ready")[0] == 200, 20)
        assert post(port, picture()) == 200


@pytest.mark.slow
def test_decoders_come_back_where_the_process_that_makes_them_stands_still(run):  # noqa: F811
    def change(service):
        service.decoders = Decoders(service.classifier.preprocess, 1, start_seconds=3.0)

    with serving(run, replace(LIMITS, request_seconds=1.0), change=change) as (port, service):
        for pid in (*pids(service), service.decoders.forkserver):
            os.kill(pid, signal.SIGSTOP)
        assert post(port, picture()) == 503
        until(lambda: post(port, picture()) == 200, 60)
        until(lambda: ask(port, "/ready")[0] == 200)


def test_ready_says_when_more_come_than_are_answered(run):  # noqa: F811
    def slow(service):
        quick = service.batcher.classify
        service.batcher.classify = lambda pixels: time.sleep(1.0) or quick(pixels)

    with (
        serving(run, replace(LIMITS, max_requests=1), change=slow) as (port, service),
        concurrent.futures.ThreadPoolExecutor(1) as pool,
    ):
        first = pool.submit(post, port, picture())
        until(lambda: service.num_requests == 1)
        assert ask(port, "/ready")[2]["error"]["kind"] == "busy"
        assert first.result() == 200
        until(lambda: ask(port, "/ready")[0] == 200)


class Failing(Process):
    def start(self):
        raise DecoderError("a decoding process did not start")


def test_a_server_without_decoders_does_not_start_and_says_why(run):  # noqa: F811
    service = Service(load(run, device="cpu"), "a-model", LIMITS)
    service.decoders = Decoders(service.classifier.preprocess, 1, process_type=Failing)
    app = create_app(service)
    with pytest.raises(MixlabError, match="decode files did not start"):
        listen(make_server(app, host="127.0.0.1", port=0))


@contextlib.contextmanager
def a_server(run):  # noqa: F811
    """`mixlab serve` in a process of its own: its port and the process."""
    command = [sys.executable, "-m", "mixlab", "serve", str(run), "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield int(json.loads(process.stdout.readline())["address"].rsplit(":", 1)[1]), process
        finally:
            process.kill()


@pytest.mark.slow  # new processes
def test_a_server_whose_decoders_stand_still_ends_within_ten_seconds(run):  # noqa: F811
    found = stopped(str(run))
    found.pop("mode")
    for kind, one in found.items():
        assert one["ended"], kind
        assert one["seconds_to_end"] <= 10, kind
        assert one["ready"] == 503, kind
        assert one["processes_left"] == 0, kind
        assert one["stderr"] == "", kind
        assert one["posts"].keys() <= {"503"}, kind


@pytest.mark.slow  # a new process
def test_ctrl_c_twice_ends_a_server_whose_decoders_stand_still_at_once(run):  # noqa: F811
    from benchmarks.serving_limits import decoding_processes

    with a_server(run) as (port, process):
        assert post(port, picture()) == 200
        still = decoding_processes(process.pid)
        for pid in still:
            os.kill(pid, signal.SIGSTOP)
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            posts = [pool.submit(post, port, picture(size=(300, 300))) for _ in range(2)]
            time.sleep(0.5)
            process.send_signal(signal.SIGINT)
            time.sleep(0.5)
            process.send_signal(signal.SIGINT)
            began = time.monotonic()
            process.wait(timeout=30)
            assert time.monotonic() - began < 4
            for one in posts:
                with contextlib.suppress(OSError):
                    assert one.result() in (500, 503)  # no time is taken for a better one
        assert "Traceback" not in process.stderr.read()
        assert not any(os.path.exists(f"/proc/{pid}") for pid in still)


# -- clients, and what they send -----------------------------------------------------------------------------


class Hasty(TimedProtocol):
    write_seconds = 1.0
    keep_alive_seconds = 1


def test_a_client_that_does_not_read_is_closed(run):  # noqa: F811
    question = b"GET /docs HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with serving(run, protocol=Hasty) as (port, _), socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(0.2)
        client.connect(("127.0.0.1", port))
        with contextlib.suppress(TimeoutError):  # until the server does not take any more
            while True:
                client.sendall(question * 20)
        client.settimeout(10)
        end = time.monotonic() + 20
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < end:
                time.sleep(0.1)
                client.sendall(b"G")
        assert time.monotonic() < end
        assert ask(port, "/health")[0] == 200


class Few(TimedProtocol):
    max_connections = 5


def test_connections_have_a_limit(run):  # noqa: F811
    with serving(run, protocol=Few) as (port, _):
        clients = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(5)]
        status, headers, answer = ask(port, "/health")
        assert (status, answer["error"]["kind"]) == (503, "busy")
        assert int(headers["Retry-After"]) >= 1
        for client in clients:
            client.close()
        until(lambda: ask(port, "/health")[0] == 200)


@pytest.mark.parametrize("headers", [
    b"Content-Length: 5\r\nTransfer-Encoding: chunked", b"Transfer-Encoding: chunked\r\nContent-Length: 0",
    b"transfer-encoding: Chunked\r\ncontent-length: 50", b"Content-Length: 5\r\nContent-Length: 6",
    b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked", b"Transfer-Encoding: gzip, chunked",
    b"Content-Length: +5",
])  # fmt: skip
@pytest.mark.parametrize("path", ["/predict", "/health"])
def test_two_lengths_of_a_body_are_refused_and_the_connection_is_closed(server, headers, path):  # noqa: F811
    body = b"0\r\n\r\nGET /info HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server[0]), timeout=10) as client:
        client.sendall(b"POST %s HTTP/1.1\r\nHost: localhost\r\n%s\r\n\r\n" % (path.encode(), headers) + body)
        answer = b"".join(iter(lambda: client.recv(65536), b""))  # until it is closed
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.count(b"HTTP/1.1") == 1
    assert b"connection: close" in answer.lower()


def pax(records, name="a.png", content=b"abc"):
    """A tar of one file with these extended headers."""
    text = b""
    for key, value in records.items():
        record = f" {key}={value}\n".encode()
        length = len(record) + 1
        length = len(record) + len(str(length + len(str(length)) - 1))
        text += str(length).encode() + record
    head, member = tarfile.TarInfo("x"), tarfile.TarInfo(name)
    head.type, head.size, member.size = tarfile.XHDTYPE, len(text), len(content)
    pad = lambda data: data.ljust(-(-len(data) // 512) * 512, b"\0")  # noqa: E731
    return head.tobuf() + pad(text) + member.tobuf() + pad(content) + bytes(10240)


@pytest.fixture(scope="module")
def roomy(run):  # noqa: F811
    with serving(run, replace(LIMITS, body_bytes=5_000_000)) as found:
        yield found


def long_name():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("n" * 2_000_000))
    return file.getvalue()


@pytest.mark.parametrize("body", [
    pax({"size": "9" * 23}), pax({"size": "-1"}), pax({"GNU.sparse.map": "1,2,x"}),
    pax({"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "3000000000"}),
    pax({"GNU.sparse.map": ",".join(["0"] * 3), "GNU.sparse.size": "9" * 30}), long_name(),
    pax({"path": "n" * 2_000_000}),
])  # fmt: skip
def test_odd_tars_are_refused_and_no_decoder_dies(roomy, body):
    port, service = roomy
    before = service.decoders.num_restarts
    status, _, answer = ask(port, "/predict-many", body)
    rows = [answer] if status == 415 else answer["images"]  # a damaged member may have a row of its own
    assert status in (200, 415)
    assert all("error" in row and "predictions" not in row for row in rows)
    assert service.decoders.num_restarts == before


def test_a_sparse_file_in_a_tar_is_no_plain_file_and_takes_no_memory(server):  # noqa: F811
    body = pax({"GNU.sparse.size": "1500000000", "GNU.sparse.numblocks": "1", "GNU.sparse.map": "0,3"})
    status, _, answer = ask(server[0], "/predict-many", body)
    assert (status, answer["images"]) == (200, [{"path": "a.png", "error": "not a plain file"}])


def test_a_jpeg_of_thousands_of_scans_is_refused_at_once(roomy):
    from tests.data.images.test_scans import progressive

    status, _, answer = ask(roomy[0], "/predict", progressive((2000, 2000), "L", 2000))
    assert status == 415
    assert "scans" in answer["error"]["message"]
