"""`mixlab ui`: what is in the folders of runs and studies, and nothing outside them."""

import concurrent.futures
import os
import shutil
import threading
import time
from datetime import UTC, datetime, timedelta

import pytest

import mixlab
from mixlab.commands.serving import ui
from mixlab.errors import UsageError
from mixlab.report.screen import Screen
from mixlab.report.tables import show_runs
from mixlab.training.run_folder import list_runs
from tests.serving.test_server import ask

pytest.importorskip("starlette")

from mixlab.serving.listen import make_server
from mixlab.serving.ui import create_ui

KNOWN = {"compare": "DATA", "filters": "WEIGHTS", "shuffle": "DATA"}
TOKEN = "a token of some length"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    for seed in (0, 1):
        run = folder / "runs" / f"run {seed}"
        mixlab.train(
            "digits", "digits", run=run, screen=Screen(quiet=True), figures=False, steps=20, seed=seed
        )
    (folder / "runs" / "no run").mkdir()
    (folder / "runs" / "run 0" / "figures" / "a.png").parent.mkdir(exist_ok=True)
    (folder / "runs" / "run 0" / "figures" / "a.png").write_bytes(b"\x89PNG")
    (folder / "studies" / "shuffle").mkdir(parents=True)
    (folder / "studies" / "shuffle" / "results.csv").write_text("model,top1\nMixer,0.5\n")
    (folder / "studies" / "filters" / "figures").mkdir(parents=True)
    (folder / "studies" / "filters" / "filters.csv").write_text("layer,opposed\n" + "1,0.5\n" * 300)
    (folder / "studies" / "filters" / "report.html").write_text("<!DOCTYPE html><p>filters</p>")
    (folder / "studies" / "filters" / "figures" / "stem.png").write_bytes(b"\x89PNG")
    (folder / "studies" / "empty").mkdir()
    (folder / "secret.txt").write_text("secret")
    return folder


@pytest.fixture(scope="module")
def port(place):
    port = concurrent.futures.Future()
    app = create_ui(place / "runs", place / "studies", list_runs, KNOWN)
    server = make_server(app, host="127.0.0.1", port=0, started=port.set_result)
    thread = threading.Thread(target=server.run)
    thread.start()
    yield port.result(timeout=60)
    server.should_exit = True
    thread.join(timeout=60)


def test_runs_and_studies_are_listed(port, place):
    status, _, found = ask(port, "/api/runs")
    assert status == 200
    assert {row["run"] for row in found["runs"]} == {"run 0", "run 1"}
    assert all(row["finished"] for row in found["runs"])
    assert [(study["study"], study["has_report"]) for study in found["studies"]] == [
        ("filters", True), ("shuffle", False),
    ]  # fmt: skip
    assert found["missing_studies"] == [{"study": "compare", "command": "mixlab study compare DATA"}]
    assert str(place) not in str(found)


def test_each_run_says_its_data_its_model_and_when_it_began(port, place):
    run = place / "runs" / "elsewhere"
    shutil.copytree(place / "runs" / "run 0", run)
    try:
        recipe = (run / "recipe.toml").read_text()
        (run / "recipe.toml").write_text(recipe.replace('source = "digits"', f'source = "{place}/my data"'))
        (run / "environment.json").write_text('{"started": "some day"}')
        os.utime(run / "metrics.jsonl", (time.time() - 1000,) * 2)
        rows = {row["run"]: row for row in ask(port, "/api/runs")[2]["runs"]}
        row = rows["run 0"]
        assert (row["data"], row["model"]) == ("digits", "mixer_pico2")
        began = datetime.fromisoformat(row["started"])
        assert timedelta(0) <= datetime.now(UTC) - began < timedelta(hours=1)
        assert row["idle_seconds"] < 3600
        assert (rows["elsewhere"]["data"], rows["elsewhere"]["started"]) == ("my data", None)
        assert rows["elsewhere"]["idle_seconds"] == pytest.approx(1000, abs=60)
        (run / "recipe.toml").write_text("data = 3\n[model]\nname = []\n")
        rows = {row["run"]: row for row in ask(port, "/api/runs")[2]["runs"]}
        assert (rows["elsewhere"]["data"], rows["elsewhere"]["model"]) == (None, None)
    finally:
        shutil.rmtree(run)


def test_tables_and_figures_of_a_study_are_shown(port):
    status, _, found = ask(port, "/api/studies/filters")
    assert status == 200
    assert found["figures"] == ["stem.png"]
    (table,) = found["tables"]
    assert (table["name"], table["columns"], table["num_rows"]) == ("filters.csv", ["layer", "opposed"], 300)
    assert table["rows"] == [["1", "0.5"]] * 200
    assert ask(port, "/files/studies/filters/report.html")[0] == 200
    assert ask(port, "/files/studies/filters/figures/stem.png")[0] == 200
    for name in ("empty", "none", ".."):
        assert ask(port, f"/api/studies/{name}")[0] == 404


def test_with_a_token_files_open_by_the_key_of_their_folder_and_by_no_other(place):
    app = create_ui(place / "runs", place / "studies", list_runs, KNOWN, token=TOKEN)
    ready = concurrent.futures.Future()
    server = make_server(app, host="127.0.0.1", port=0, started=ready.set_result)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        port, right = ready.result(timeout=60), {"Authorization": f"Bearer {TOKEN}"}
        assert ask(port, "/api/runs")[0] == 401
        keys = {s["study"]: s["key"] for s in ask(port, "/api/runs", headers=right)[2]["studies"]}
        keys["run"] = ask(port, "/api/runs/run%200", headers=right)[2]["key"]
        assert len(set(keys.values())) == 3
        report, figure = "/files/studies/filters/report.html", "/files/runs/run%200/figures/a.png"
        assert ask(port, f"{report}?key={keys['filters']}")[0] == 200
        assert ask(port, f"{figure}?key={keys['run']}")[0] == 200
        assert ask(port, report, headers=right)[0] == 200
        for path in (
            report, figure, f"{report}?key=", f"{report}?key={keys['shuffle']}", f"{figure}?key={keys['filters']}",
            f"/api/runs?key={keys['run']}", f"/api/runs/run%200?key={keys['run']}",
            f"/files/runs/run%201/report.html?key={keys['run']}", "*",
        ):  # fmt: skip
            assert ask(port, path)[0] == 401, path
    finally:
        server.should_exit = True
        thread.join(timeout=60)


def test_a_folder_that_was_named_must_be_there(tmp_path, monkeypatch):
    (tmp_path / "studies").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="no such folder") as error:
        ui(tmp_path / "wrong")
    assert error.value.where.endswith("wrong")


def test_a_run_is_described_from_its_files(port, place):
    status, _, found = ask(port, "/api/runs/run%200")
    assert status == 200
    assert found["finished"]
    test = found["result"]["test"]
    counts = found["confusion"]["counts"]
    assert sum(map(sum, counts)) == test["num_images"]
    assert sum(counts[i][i] for i in range(len(counts))) == test["num_correct"]
    assert found["curves"]["validation"][-1][2] is not None
    assert "[optimizer]" in found["recipe"]
    assert "a.png" in found["figures"]


def test_only_reports_and_figures_of_runs_can_be_had(port):
    status, headers, content = ask(port, "/files/runs/run%200/report.html")
    assert status == 200
    assert "sandbox" in headers["Content-Security-Policy"]
    assert content.startswith(b"<!DOCTYPE html>")
    assert ask(port, "/files/runs/run%200/figures/a.png")[0] == 200
    for path in (
        "/files/runs/run%200/recipe.toml", "/files/runs/run%200/../../secret.txt", "/files/runs/../secret.txt",
        "/files/runs/%2e%2e/secret.txt", "/files/runs/..%2fsecret.txt/report.html", "/api/runs/..",
        "/api/runs/no%20run",
        "/files/runs/run%200/figures/..%2f..%2f..%2fsecret.txt", "/files/runs/run%200//etc/passwd", "/api/runs/%00",
        "/files/studies/shuffle/results.csv", "/files/studies/none/report.html", "/files/runs/run%200/figures/b.png",
    ):  # fmt: skip
        status, _, answer = ask(port, path)
        assert status == 404, path
        assert "secret" not in str(answer)


def test_other_pages_cannot_ask(port):
    assert ask(port, "/api/runs", headers={"Host": "evil.example"})[0] == 403
    assert ask(port, "/api/runs", headers={"Origin": "http://evil.example"})[0] == 403
    assert ask(port, "/api/runs", b"x")[0] == 405
    for path in ("/", "/ui.js", "/ui_texts.js", "/chart.js", "/compare.js", "/language.js", "/page.css"):
        assert ask(port, path)[0] == 200


def damaged(place, name, content):
    """A copy of a run with one of its files replaced."""
    run = place / "runs" / f"damaged {name} {len(list((place / 'runs').iterdir()))}"
    shutil.copytree(place / "runs" / "run 0", run)
    (run / name).unlink(missing_ok=True)
    if content is None:
        os.mkfifo(run / name)
    else:
        (run / name).write_bytes(content)
    return run


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.jsonl", b'{"event": "validation", "step": 1}\n'),
        ("metrics.jsonl", b'{"event": "end", "step": 1, "test": 3}\n'),
        ("metrics.jsonl", b'{"event": "train", "step": "a"}\n'),
        ("metrics.jsonl", b'{"event": "train", "seconds": [1]}\n'),
        ("metrics.jsonl", b'{"event": "train", "x": ' + b"[" * 2000 + b"]" * 2000 + b"}\n"),
        ("metrics.jsonl", b"x" * 40_000_000 + b"\n"),
        ("metrics.jsonl", None),
        ("predictions.csv", b"path,prediction\na,b\n"),
        ("predictions.csv", b"path,label,prediction\n" + b"x" * 200_000),
        ("predictions.csv", None),
        ("environment.json", b"[1]"),
        ("environment.json", b'{"a": NaN}'),
        ("environment.json", None),
        ("recipe.toml", b"a" * 100_000),
    ],
)
def test_a_run_with_a_damaged_file_is_marked_and_hides_no_other(name, content, place, port, capsys):
    run = damaged(place, name, content)
    try:
        status, _, found = ask(port, "/api/runs")
        assert status == 200
        rows = {row["run"]: row for row in found["runs"]}
        assert {"run 0", "run 1"} <= rows.keys()
        assert bool(rows[run.name]["unreadable"]) == (name == "metrics.jsonl")
        status, _, shown = ask(port, f"/api/runs/{run.name.replace(' ', '%20')}")
        assert status == 200
        assert [text.partition(":")[0] for text in shown["unreadable"]] == [name]
        show_runs(list_runs(place / "runs"), Screen())
        assert ("unreadable" in capsys.readouterr().out) == (name == "metrics.jsonl")
    finally:
        shutil.rmtree(run)


@pytest.mark.parametrize(
    "name", ["report.html", "figures/a.png", "figures", "recipe.toml", "environment.json"]
)
def test_nothing_is_served_that_a_link_in_a_run_leads_to(name, place, port):
    run = place / "runs" / "linked"
    shutil.copytree(place / "runs" / "run 0", run)
    try:
        secrets = place / "secrets"
        secrets.mkdir(exist_ok=True)
        for file in ("a.png", "secret.txt"):
            (secrets / file).write_text('secret = "secret"')
        target = run / name
        shutil.rmtree(target) if target.is_dir() else target.unlink()
        target.symlink_to(secrets if name == "figures" else secrets / "secret.txt")
        for address in ("report.html", "figures/a.png"):
            status, _, body = ask(port, f"/files/runs/linked/{address}")
            if address.startswith(name):
                assert status == 404, body
        assert "secret" not in str(ask(port, "/api/runs/linked")[2]).replace("secrets", "")
    finally:
        shutil.rmtree(run)
