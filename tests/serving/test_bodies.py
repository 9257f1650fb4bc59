"""How people send images to `mixlab serve`: forms, base64, odd Content-Types; with the programs that they use."""

import base64
import html
import json
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from http.client import HTTPConnection

import pytest

pytest.importorskip("starlette")
pytest.importorskip("python_multipart")

from benchmarks.serving_limits import ask as ask_kept
from benchmarks.serving_limits import odd_body, small_pictures
from mixlab.data.images.preprocess import ImagePreprocess
from mixlab.errors import ExampleError
from mixlab.serving import bodies
from mixlab.serving.predict import load
from mixlab.serving.server import asset
from tests.serving.test_server import ask, picture, run, same, server, serving, tar_of  # noqa: F401

needs = {program: shutil.which(program) is None for program in ("curl", "node", "bash", "base64", "tar")}
needs_curl = pytest.mark.skipif(needs["curl"], reason="there is no curl")
BOUNDARY = "----a-boundary"


def form(*files, name="file", boundary=BOUNDARY):
    """Content-Type and body, as browsers and curl write them. files: (file name, content)."""
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"; filename="{file_name}"\r\n'
        "Content-Type: application/octet-stream\r\n\r\n".encode()
        + content
        + b"\r\n"
        for file_name, content in files
    ]
    return {"Content-Type": f"multipart/form-data; boundary={boundary}"}, b"".join(
        parts
    ) + f"--{boundary}--\r\n".encode()


def expected(run, data, top=5):  # noqa: F811
    return load(run).predict(data, top=top)[0]["predictions"]


def encoded(data):
    return base64.b64encode(data).decode()


def curl(folder, *arguments):
    """Status and answer of real curl."""
    found = subprocess.run(
        ["curl", "-sS", "-w", "\n%{http_code}", *arguments],
        cwd=folder,
        capture_output=True,
        check=True,
        timeout=60,
    )
    answer, _, status = found.stdout.rpartition(b"\n")
    return int(status), json.loads(answer)


@needs_curl
def test_curl_may_send_a_picture_in_every_way_it_has(server, run, tmp_path):  # noqa: F811
    address = f"http://127.0.0.1:{server[0]}/predict?top=3"
    data = picture(1)
    (tmp_path / "x.png").write_bytes(data)
    (tmp_path / "x.json").write_text(json.dumps({"image": encoded(data)}))
    for arguments in (
        ("-F", "file=@x.png"), ("-F", "image=@x.png;type=image/png"), ("-F", "f=@x.png;filename=../../etc/passwd"),
        ("--data-binary", "@x.png"), ("-T", "x.png", "-X", "POST"), ("-d", "@x.json"), ("--json", "@x.json"),
        ("--data-binary", "@x.png", "-H", "Content-Type: application/octet-stream"),
        ("--data-binary", "@x.png", "-H", "Content-Type: image/png; charset=binary"),
        ("--data-binary", "@x.png", "-H", "Content-Type: application/json"),
        ("--data-binary", "@x.png", "-H", "Content-Type: multipart/form-data"),
    ):  # fmt: skip
        status, answer = curl(tmp_path, *arguments, address)
        assert status == 200, (arguments, answer)
        same(answer["predictions"], expected(run, data, top=3))


@needs_curl
def test_a_file_that_curl_damaged_is_refused_with_the_way_to_send_it(server, tmp_path):  # noqa: F811
    (tmp_path / "x.png").write_bytes(picture(1))
    status, answer = curl(tmp_path, "-d", "@x.png", f"http://127.0.0.1:{server[0]}/predict")
    assert status == 415
    assert "curl -d" in answer["error"]["message"]
    assert "curl --data-binary @photo.jpg" in answer["error"]["hint"]
    assert "curl -F file=@photo.jpg" in answer["error"]["hint"]


def test_no_picture_is_refused_with_an_example_of_how_to_send_one(server):  # noqa: F811
    for path, example in (
        ("/predict", "-F file=@photo.jpg"),
        ("/predict-many", "-F file=@a.jpg -F file=@b.jpg"),
    ):
        for headers, body in (
            ({}, b"hello"), ({"Content-Type": "text/plain"}, b"https://example.com/cat.jpg"),
            ({"Content-Type": "multipart/form-data"}, b"--x\r\n\r\n"), form(), (form()[0], b"cut"),
            ({"Content-Type": "application/json"}, b'{"url": "https://example.com/cat.jpg"}'),
            ({"Content-Type": "application/x-www-form-urlencoded"}, b"image=iVBORw0KGgo"),
        ):  # fmt: skip
            status, _, answer = ask(server[0], path, body, headers=headers)
            assert (status, answer["error"]["kind"]) == (415, "image"), (path, headers, body)
            assert example in answer["error"]["hint"]


def test_several_files_of_a_form_are_answered_in_order_and_a_bad_one_in_its_place(server, run):  # noqa: F811
    good = [picture(1), picture(2, kind="JPEG")]
    files = (
        ("a.png", good[0]),
        ("C:\\photos\\broken.jpg", b"\xff\xd8\xff no"),
        ("고양이.jpg", good[1]),
        ("", b""),
    )
    headers, body = form(*files)
    for path in ("/predict?top=2", "/predict-many?top=2"):
        status, _, answer = ask(server[0], path, body, headers=headers)
        assert status == 200
        assert (answer["num_ok"], answer["num_bad"]) == (2, 2)
        assert [row["path"] for row in answer["images"]] == ["a.png", "broken.jpg", "고양이.jpg", "file"]
        assert answer["images"][3]["error"] == "the file is empty"
        for row, data in zip((answer["images"][0], answer["images"][2]), good, strict=True):
            same(row["predictions"], expected(run, data, top=2))
    status, _, answer = ask(server[0], "/predict-many", form(files[0])[1], headers=headers)
    assert (status, len(answer["images"])) == (200, 1)
    assert ask(server[0], "/occlusion", body, headers=headers)[0] == 415


def test_base64_in_json_is_read_however_it_was_written(server, run):  # noqa: F811
    data = picture(3)
    text = encoded(data)
    wrapped = base64.encodebytes(data).decode()
    urlsafe = base64.urlsafe_b64encode(data).decode().rstrip("=")
    for value in (text, wrapped, urlsafe, "data:image/png;base64," + text):
        for kind in (
            "application/json",
            "application/json; charset=utf-8",
            "text/plain",
            "application/ld+json",
        ):
            status, _, answer = ask(
                server[0], "/predict", json.dumps({"image": value}), headers={"Content-Type": kind}
            )
            assert status == 200, (value[:30], kind, answer)
            same(answer["predictions"], expected(run, data))
    body = json.dumps({"images": [text, "no base64!", encoded(b"no image"), text]}, indent=2)
    for path in ("/predict", "/predict-many"):
        status, _, answer = ask(server[0], path, body, headers={"Content-Type": "application/json"})
        assert (status, answer["num_ok"], answer["num_bad"]) == (200, 2, 2)
        assert [row["path"] for row in answer["images"]] == [f"images[{i}]" for i in range(4)]
        assert answer["images"][1]["error"] == "not base64"
        same(answer["images"][3]["predictions"], expected(run, data))
    status, _, answer = ask(server[0], "/predict-many", json.dumps({"image": text}))
    assert (status, answer["images"][0]["path"]) == (200, "image")
    assert ask(server[0], "/occlusion", json.dumps({"image": text}))[0] == 200


@pytest.mark.parametrize("body", [
    b'{"image": 7}', b'{"images": "text"}', b'{"images": []}', b'{"image": "a", "top": 3}', b'{"images": [null]}',
    b"{",
    b'{"image": "\\ud800"}', b'{"image": "' + b"9" * 5000, b"[" * 200_000, b'{"images": [' + b'"",' * 65 + b'""]}',
    b'{"a":' * 500 + b"1" + b"}" * 500, '{"image": "é"}'.encode("latin-1"), b'"text"', b"null", b"1e999",
])  # fmt: skip
def test_json_that_is_no_picture_is_refused(server, body):  # noqa: F811
    status, _, answer = ask(server[0], "/predict", body, headers={"Content-Type": "application/json"})
    assert (status, answer["error"]["kind"]) == (415, "image"), answer


def test_a_form_has_limits(server):  # noqa: F811
    tiny = picture(size=(8, 8))
    part = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="top"\r\n\r\n%s\r\n--{BOUNDARY}--\r\n'
    headers = form()[0]
    cases = {
        "files": form(*((f"{i}.png", tiny) for i in range(65))),
        "is no file": (headers, (part % "3").encode()),
        "form": ({"Content-Type": "multipart/form-data; boundary=" + "b" * 300}, b"--b"),
        "no files": form(),
        "Part": (headers, (part % ("y" * 2000)).encode()),
        "Invalid": (headers, (f"--{BOUNDARY}\r\n" + "A: b" * 5000 + f"\r\n\r\n--{BOUNDARY}--").encode()),
    }
    for text, (headers, body) in cases.items():
        status, _, answer = ask(server[0], "/predict", body, headers=headers)
        assert status == 415, text
        assert text in answer["error"]["message"]
    headers, body = form(*((f"{i}.png", tiny) for i in range(64)))
    assert ask(server[0], "/predict", body, headers=headers)[2]["num_ok"] == 64


def test_names_that_strangers_chose_come_back_harmless(server):  # noqa: F811
    names = ("../../etc/passwd", "\x1b[31mred", "\u202egnp.exe", "x" * 3000, "tab\there")
    for headers, body in (
        form(*((name, picture()) for name in names[:3])),
        ({}, tar_of(dict.fromkeys(names, picture()))),
    ):
        rows = ask(server[0], "/predict-many", body, headers=headers)[2]["images"]
        assert all(row["path"].isprintable() and len(row["path"]) <= 255 for row in rows)
        assert "predictions" in rows[0]


def test_nothing_of_a_form_is_written_to_disk(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a file was made")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    headers, body = form(("a.png", bytes(5_000_000)))
    assert bodies.form_files(body, headers["Content-Type"]) == [("a.png", bytes(5_000_000))]


def test_a_tar_keeps_working_under_any_content_type_and_with_odd_names(server):  # noqa: F811
    body = tar_of({"{a}.png": picture(1), "BM.png": picture(2)})
    for kind in ("application/x-tar", "application/json", "application/octet-stream", ""):
        status, _, answer = ask(server[0], "/predict-many", body, headers={"Content-Type": kind})
        assert (status, answer["num_ok"]) == (200, 2)
        assert [row["path"] for row in answer["images"]] == ["{a}.png", "BM.png"]


def examples():
    found = re.findall(
        r'<pre tabindex="0" data-run="(\w+) (\w+)">(.*?)</pre>', asset("docs.html").decode(), re.DOTALL
    )
    return [pytest.param(*one, id=f"{one[0]}-{one[1]}-{number}") for number, one in enumerate(found)]


@pytest.mark.parametrize(("program", "case", "text"), examples())
def test_the_examples_of_the_page_for_programs_work(server, run, tmp_path, program, case, text):  # noqa: F811
    needed = {"bash": ("bash", "curl", "base64", "tar"), "node": ("node",), "python": ()}[program]
    for name in needed:
        if needs[name]:
            pytest.skip(f"there is no {name}")
    if "import requests" in text:
        pytest.importorskip("requests")
    files = {
        "photo.jpg": picture(1, kind="JPEG"),
        "a.jpg": picture(2, kind="JPEG"),
        "b.jpg": picture(3, kind="JPEG"),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    text = html.unescape(text)
    assert "http://127.0.0.1:8000/" in text
    text = text.replace("http://127.0.0.1:8000/", f"http://127.0.0.1:{server[0]}/")
    command = {
        "bash": ["bash", "-c", text], "node": ["node", "--input-type=module", "-e", text],
        "python": [sys.executable, "-W", "ignore::ResourceWarning", "-c", text],
    }[program]  # fmt: skip
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    answer = json.loads(found.stdout)
    if case == "one":
        same(answer["predictions"], expected(run, files["photo.jpg"], top=3))
    elif case == "many":
        assert (answer["num_ok"], answer["num_bad"]) == (2, 0)
        for row, name in zip(answer["images"], ("a.jpg", "b.jpg"), strict=True):
            same(row["predictions"], expected(run, files[name], top=3))
    else:
        assert len(answer["drop"]) == 8


def test_the_page_for_programs_has_an_example_of_each_program():
    assert Counter(one.values[0] for one in examples()).keys() == {"bash", "python", "node"}
    spec = json.loads(asset("openapi.json"))
    for path in ("/predict", "/predict-many", "/occlusion"):
        content = spec["paths"][path]["post"]["requestBody"]["content"]
        assert {"multipart/form-data", "application/json"} <= set(content)


def test_three_hundred_odd_bodies_are_answered_or_refused(server):  # noqa: F811
    good = [data for data in small_pictures() if len(data) < 20_000]
    draw = random.Random(7)
    connection = HTTPConnection("127.0.0.1", server[0], timeout=30)
    statuses = Counter(ask_kept(connection, *odd_body(draw, good))[0] for _ in range(300))
    connection.close()
    assert set(statuses) <= {200, 400, 413, 415, 431}
    assert statuses[200] > 20
    assert statuses[415] > 20


def test_what_is_read_is_what_was_sent():
    preprocess = ImagePreprocess(image_size=(8, 8))
    data = picture(5)
    headers, body = form(("a", data))
    for content, kind in (
        (data, "text/html"),
        (body, headers["Content-Type"]),
        (json.dumps({"image": encoded(data)}).encode(), ""),
    ):
        found = bodies.read_body(content, kind, "file", preprocess)
        assert not found.is_list
        assert (
            found.examples[0].kept == bodies.read_body(data, "", "file", preprocess).examples[0].kept
        ).all()
    assert bodies.from_base64("-_-_") == b"\xfb\xff\xbf"
    with pytest.raises(ExampleError, match="not base64"):
        bodies.from_base64("a")
    with pytest.raises(ExampleError, match="not a tar"):
        list(bodies.tar_files(b"no tar at all" * 100))


def test_a_damaged_image_is_called_damaged_not_sent_wrongly(server):  # noqa: F811
    status, _, answer = ask(server[0], "/predict", picture(2, kind="JPEG")[:200])
    assert status == 415
    assert answer["error"]["message"].startswith(("damaged: ", "truncated: "))
    assert "the image itself is damaged" in answer["error"]["hint"]
