"""`mixlab serve`: right answers to programs, and refusals for hostile callers; a real server on a real port."""

import concurrent.futures
import contextlib
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from mixlab.checkpoint.store import Weights, save_weights
from mixlab.data.images.preprocess import ImagePreprocess
from mixlab.errors import UsageError
from mixlab.models.catalog import create_model, settings_of
from mixlab.serving.predict import load

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from prometheus_client.parser import text_string_to_metric_families

from mixlab.serving.guard import SECURITY_HEADERS
from mixlab.serving.listen import TimedProtocol, check_address, make_server
from mixlab.serving.server import create_app
from mixlab.serving.service import Limits, Service

LIMITS = Limits(decoders=2, read_seconds=1.0, body_bytes=300_000, request_seconds=10.0)
TOKEN = "a-token-of-these-tests"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.manual_seed(0)
    model = create_model("mixer_pico4", num_classes=5, image_size=24)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("run")
    weights = Weights(
        model=model,
        model_settings=settings_of(model.config),
        preprocess=ImagePreprocess(image_size=(24, 24)),
        class_names=tuple(f"class <{number}>" for number in range(5)),
        provenance={},
    )
    save_weights(folder, weights)
    return folder


@contextlib.contextmanager
def serving(run, limits=LIMITS, token=None, change=lambda service: None, protocol=TimedProtocol, **options):
    """A server in a thread: its port and its service. options: of the application."""
    service = Service(load(run, device="cpu"), "a-model", limits)
    change(service)
    port = concurrent.futures.Future()
    app = create_app(service, token=token, **options)
    server = make_server(app, host="127.0.0.1", port=0, started=port.set_result, protocol=protocol)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield port.result(timeout=60), service
    finally:
        server.should_exit = True
        thread.join(timeout=60)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def server(run):
    with serving(run) as found:
        yield found


def ask(port, path, body=None, method=None, headers=None, timeout=30):
    """(status, headers, JSON or bytes) of one request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request(method or ("GET" if body is None else "POST"), path, body, headers or {})
        answer = connection.getresponse()
        content = answer.read()
        kind = answer.headers.get("Content-Type", "")
        return (
            answer.status,
            answer.headers,
            json.loads(content) if content and kind == "application/json" else content,
        )
    finally:
        connection.close()


def until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def picture(seed=0, size=(40, 30), kind="PNG"):
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def tar_of(files):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def same(found, expected):
    assert [guess["label"] for guess in found] == [guess["label"] for guess in expected]
    ours, theirs = ([guess["probability"] for guess in guesses] for guesses in (found, expected))
    assert ours == pytest.approx(theirs, abs=1e-5)


def test_a_picture_gets_the_answer_that_predict_gives(server, run):
    port, _ = server
    for seed, kind, top in ((0, "PNG", 5), (1, "JPEG", 2), (2, "WEBP", 1)):
        data = picture(seed, kind=kind)
        status, headers, answer = ask(port, f"/predict?top={top}", data)
        assert status == 200
        same(answer["predictions"], load(run).predict(data, top=top)[0]["predictions"])
        assert all(headers[name] == value for name, value in SECURITY_HEADERS.items())
        assert "server" not in {name.lower() for name in headers}


def test_many_at_once_get_their_own_answers(server, run):
    port, service = server
    pictures = [picture(seed) for seed in range(40)]
    before = service.batcher.num_batches
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda data: ask(port, "/predict", data), pictures))
    expected = load(run).predict(pictures)
    for (status, _, answer), row in zip(answers, expected, strict=True):
        assert status == 200
        same(answer["predictions"], row["predictions"])
    assert service.batcher.num_batches - before < 40  # some went together


def test_a_tar_gets_the_object_of_predict(server, run):
    port, _ = server
    files = {"a/one.png": picture(1), "broken.jpg": b"\xff\xd8\xff nothing", "zwei-é.png": picture(2)}
    status, _, answer = ask(port, "/predict-many?top=3", tar_of(files))
    assert status == 200
    assert (answer["num_ok"], answer["num_bad"]) == (2, 1)
    assert [row["path"] for row in answer["images"]] == list(files)
    assert "error" in answer["images"][1]
    for number in (0, 2):
        expected = load(run).predict(list(files.values())[number], top=3)[0]["predictions"]
        same(answer["images"][number]["predictions"], expected)


@pytest.mark.parametrize("body", [
    tar_of({f"{i}.png": b"x" for i in range(65)}), b"no tar at all" * 100, tar_of({}), picture(),
    b"\x1f\x8b" + bytes(600),
])  # fmt: skip
def test_what_is_no_tar_of_few_pictures_is_refused(server, body):
    status, _, answer = ask(server[0], "/predict-many", body)
    assert status == 415
    assert set(answer["error"]) == {"kind", "message", "hint"}


def test_a_tar_cannot_point_elsewhere(server):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for kind, name in ((tarfile.SYMTYPE, "link"), (tarfile.LNKTYPE, "hard"), (tarfile.CHRTYPE, "device")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
    status, _, answer = ask(server[0], "/predict-many", file.getvalue())
    assert status == 200
    assert {row["error"] for row in answer["images"]} == {"not a plain file"}


def bomb():
    file = io.BytesIO()
    Image.new("1", (20_000, 10_000)).save(file, "PNG")
    return file.getvalue()


def test_bodies_that_are_no_pictures_are_refused_without_a_path(server):
    port, _ = server
    for body in (
        b"hello",
        b"\x00" * 1000,
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        picture()[:100],
        b"GIF89a",
    ):
        status, _, answer = ask(port, "/predict", body)
        assert status == 415
        assert answer["error"]["kind"] == "image"
        assert "/" not in answer["error"]["message"].replace("and/or", "")
    assert ask(port, "/predict", b"")[0] == 400
    assert ask(port, "/predict", picture())[0] == 200


def test_a_picture_of_too_many_pixels_is_refused(run):
    data = bomb()
    with serving(run, replace(LIMITS, body_bytes=10_000_000)) as (port, _):
        status, _, answer = ask(port, "/predict", data)
        assert status == 415
        assert "pixels" in answer["error"]["message"]


def test_a_body_that_is_too_large_is_refused_before_it_is_here(server):
    port, _ = server
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10000000000\r\n\r\nx")
        assert client.recv(4096).startswith(b"HTTP/1.1 413 ")
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        chunk = b"10000\r\n" + bytes(0x10000) + b"\r\n"
        with contextlib.suppress(OSError):
            for _ in range(20):
                client.sendall(chunk)
        assert client.recv(4096).startswith(b"HTTP/1.1 413 ")


def test_a_slow_body_is_given_up(server):
    port, service = server
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nslow")
        began = time.monotonic()
        assert client.recv(4096).startswith(b"HTTP/1.1 408 ")
        assert 0.8 < time.monotonic() - began < 5
    assert service.num_waiting_bytes == 0


class Hasty(TimedProtocol):
    header_seconds = 0.5


def test_slow_headers_are_given_up(run):
    with (
        serving(run, protocol=Hasty) as (port, _),
        socket.create_connection(("127.0.0.1", port), timeout=10) as client,
    ):
        client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer = b""
        while b"alive" not in answer:
            answer += client.recv(4096)
        client.sendall(b"GET /health HTTP/1.1\r\n")
        began = time.monotonic()
        assert client.recv(4096) == b""
        assert time.monotonic() - began < 4


def test_other_hosts_and_origins_are_refused_for_every_method(server):
    port, _ = server
    for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH"):
        for headers in (
            {"Host": "evil.example"}, {"Host": f"127.0.0.1.evil.example:{port}"}, {"Host": ""},
            {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": f"http://localhost:{port + 1}"},
        ):  # fmt: skip
            assert ask(port, "/predict", b"x", method, headers)[0] == 403, (method, headers)
    own = {"Origin": f"http://127.0.0.1:{port}"}
    assert ask(port, "/predict", picture(), headers=own)[0] == 200
    assert ask(port, "/health", headers={"Host": f"localhost:{port}"})[0] == 200
    assert ask(port, "/predict", picture(), "DELETE")[0] == 405
    assert ask(port, "/etc/passwd")[0] == 404


def test_a_token_is_needed_where_there_is_one(run):
    with serving(run, token=TOKEN) as (port, _):
        right = {"Authorization": f"Bearer {TOKEN}"}
        for path, body in (
            ("/predict", picture()),
            ("/info", None),
            ("/metrics", None),
        ):
            for wrong in (
                {},
                {"Authorization": TOKEN},
                {"Authorization": f"Bearer {TOKEN}x"},
                {"Authorization": "Bearer"},
            ):
                status, _, answer = ask(port, path, body, headers=wrong)
                assert (status, answer["error"]["kind"]) == (401, "token")
            assert ask(port, path, body, headers=right)[0] == 200
        assert ask(port, "/")[0] == 200  # the page, which asks for the token
        for path in ("/health", "/docs", "/openapi.json"):  # which a link leads to, without a header
            assert ask(port, path)[0] == 200


def test_other_machines_need_a_token():
    with pytest.raises(UsageError, match="other machines could reach"):
        check_address("0.0.0.0", 8000, None)
    with pytest.raises(UsageError, match="at least 16"):
        check_address("127.0.0.1", 8000, "short")
    for port in (-1, 65536):
        with pytest.raises(UsageError, match="is no port"):
            check_address("127.0.0.1", port, None)
    check_address("0.0.0.0", 0, TOKEN)


def raw(port, text):
    with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
        client.sendall(text)
        client.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: client.recv(65536), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), head.decode("latin-1").lower(), body


def test_headers_have_a_limit_however_they_come(server):
    port, _ = server
    for size, expected in ((10_000, 200), (20_000, 431), (60_000, 431)):
        head = (
            f"GET /health HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nX: {'x' * size}\r\nConnection: close\r\n\r\n"
        )
        assert raw(port, head.encode())[0] == expected, size


@pytest.mark.parametrize("text", [
    b"GARBAGE\r\n\r\n", b"GET /health HTTP/1.1\r\n\r\n",
    b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: abc\r\n\r\n",
])  # fmt: skip
def test_what_is_no_http_is_refused_as_all_else_is(server, text):
    status, head, body = raw(server[0], text)
    assert status == 400
    assert json.loads(body)["error"]["kind"] == "usage"
    assert "content-type: application/json" in head
    assert "x-content-type-options: nosniff" in head


def test_a_path_with_a_slash_too_many_is_not_redirected(server):
    status, _, answer = ask(server[0], "/predict/", picture())
    assert (status, answer["error"]["kind"]) == (404, "not_found")


def test_a_decoder_that_is_killed_is_replaced_and_nobody_notices(run):
    with serving(run) as (port, service):
        for _ in range(3):
            processes = [one.process.pid for one in service.decoders.idle._queue]
            os.kill(processes[0], signal.SIGKILL)
            for seed in range(6):
                assert ask(port, "/predict", picture(seed))[0] == 200
        assert service.decoders.num_restarts == 3


def test_more_than_can_wait_are_told_to_come_again(run):
    def slow(service):
        quick = service.batcher.classify
        service.batcher.classify = lambda pixels: time.sleep(0.3) or quick(pixels)

    limits = replace(LIMITS, max_queue=2, max_batch=1, decoders=2)
    with serving(run, limits, change=slow) as (port, service):
        with concurrent.futures.ThreadPoolExecutor(24) as pool:
            answers = list(pool.map(lambda seed: ask(port, "/predict", picture(seed)), range(24)))
        assert {status for status, _, _ in answers} == {200, 503}
        busy = [headers for status, headers, _ in answers if status == 503]
        assert all(int(headers["Retry-After"]) >= 1 for headers in busy)
        assert ask(port, "/predict", picture())[0] == 200
        assert service.num_requests == 0


def test_what_nobody_waits_for_any_more_is_left_out(run):
    classified = []

    def slow(service):
        quick = service.batcher.classify
        service.batcher.classify = lambda pixels: (
            classified.append(len(pixels)) or time.sleep(0.5) or quick(pixels)
        )

    with serving(run, replace(LIMITS, max_batch=1), change=slow) as (port, service):
        clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(5)]
        data = picture()
        for client in clients:
            client.sendall(
                b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(data) + data
            )
        time.sleep(0.3)
        for client in clients:
            client.close()
        time.sleep(0.5)
        assert ask(port, "/predict", data)[0] == 200
        assert sum(classified) <= 3  # one was under way, perhaps one more had begun
        assert service.num_requests == 0


def test_occlusion_is_the_fall_of_the_best_labels_probability(server, run):
    port, _ = server
    data = picture(3)
    status, _, answer = ask(port, "/occlusion", data)
    assert status == 200
    classifier = load(run)
    pixels = classifier.preprocess.keep(np.asarray(Image.open(io.BytesIO(data)))).transpose(1, 2, 0)
    whole = classifier.predict(pixels, top=1)[0]["predictions"][0]
    assert answer["label"] == whole["label"]
    drop = np.array(answer["drop"])
    assert drop.shape == (8, 8)
    hidden = pixels.copy()
    hidden[6:9, 3:6] = 128  # 24 pixels in 8 parts: row 2, column 1
    rest = {g["label"]: g["probability"] for g in classifier.predict(hidden)[0]["predictions"]}
    assert drop[2, 1] == pytest.approx(whole["probability"] - rest[whole["label"]], abs=1e-5)


def test_what_it_says_of_itself(server, run):
    port, _ = server
    ask(port, "/predict", picture())
    status, _, info = ask(port, "/info")
    assert status == 200
    assert info["class_names"] == list(load(run).class_names)
    assert info["image_size"] == [24, 24]
    assert info["num_parameters"] == sum(p.numel() for p in load(run).model.parameters())
    families = {
        family.name: family for family in text_string_to_metric_families(ask(port, "/metrics")[2].decode())
    }
    counted = {
        tuple(s.labels.values()): s.value
        for s in families["mixlab_requests"].samples
        if s.name.endswith("total")
    }
    assert counted["/predict", "200"] >= 1
    assert families["mixlab_pictures"].samples[0].value >= 1
    spec = ask(port, "/openapi.json")[2]
    assert {"/predict", "/predict-many", "/info"} <= set(spec["paths"])
    for path, kind in (
        ("/", "text/html"),
        ("/page.js", "text/javascript"),
        ("/page.css", "text/css"),
        ("/docs", "text/html"),
    ):
        status, headers, content = ask(port, path)
        assert status == 200
        assert headers["Content-Type"].startswith(kind)
        assert b"http://" not in content.replace(b"http://127.0.0.1:8000", b"")
        assert b"https://" not in content


def test_bad_numbers_are_refused(server):
    for top in ("0", "-1", "1001", "x", "1e3", "٣", "9" * 5000):
        status, _, _ = ask(server[0], "/predict?top=" + "".join(f"%{b:02x}" for b in top.encode()), picture())
        assert status == 400


@pytest.mark.slow  # a new process
def test_open_opens_the_page_in_a_browser_once_the_server_answers(run, tmp_path):
    browser = tmp_path / "browser.py"  # writes what it gets at the address
    browser.write_text(
        "import sys, urllib.request\n"
        "page = urllib.request.urlopen(sys.argv[1], timeout=20).read()\n"
        f"open({str(tmp_path / 'seen')!r}, 'wb').write(sys.argv[1].encode() + b' ' + page)\n"
    )
    command = [
        sys.executable,
        "-m",
        "mixlab",
        "serve",
        str(run),
        "--port",
        "0",
        "--json",
        "--open",
        "--lang",
        "ko",
    ]
    environment = os.environ | {"BROWSER": f"{sys.executable} {browser} %s"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        address = json.loads(process.stdout.readline())["address"]
        until(lambda: (tmp_path / "seen").exists() and (tmp_path / "seen").stat().st_size > 0)
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)
    seen = (tmp_path / "seen").read_text()
    assert seen.startswith(f"{address} <!DOCTYPE html>")
    assert 'data-language="ko"' in seen


@pytest.mark.slow  # a new process
def test_the_command_stops_on_sigterm_after_its_last_answer(run):
    command = [sys.executable, "-m", "mixlab", "serve", str(run), "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        address = json.loads(process.stdout.readline())["address"]
        port = int(address.rsplit(":", 1)[1])
        assert ask(port, "/ready")[0] == 200
        body = picture()
        with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
            head = f"POST /predict HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: {len(body)}\r\n\r\n"
            client.sendall(head.encode() + body[:20])
            time.sleep(0.3)  # so that the request is under way
            process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
            client.sendall(body[20:])
            assert client.recv(12) == b"HTTP/1.1 200"
        assert process.wait(timeout=30) in (-signal.SIGTERM, 0, 143)
