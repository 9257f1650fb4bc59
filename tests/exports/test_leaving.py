"""Everything that leaves this machine: no place, user or host name in it, and hostile names do no harm there."""

import csv
import getpass
import json
import os
import re
import shutil
import socket
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import mixlab
from mixlab.checkpoint.convert import convert
from mixlab.checkpoint.open import open_weights
from mixlab.checkpoint.store import save_weights
from mixlab.errors import UsageError
from mixlab.escape import from_csv
from mixlab.exports.card import write_card
from mixlab.exports.export import export
from mixlab.exports.package import write_package
from mixlab.exports.push import write_repository
from mixlab.report.screen import Screen
from mixlab.serving.ui import describe_run
from tests.forked import mixlab as command

pytest.importorskip("onnx")

HOSTILE = {
    "lines": "a\u2066 red",
    "override": "b\u202egpj.exe",
    "formula": "=1+1",
    "html": "<script>alert(1)<!--",
    "ticks": "d``` # e",
    "link": "[f](javascript:g)",
}
MARK = "place-of-somebody"  # in the path of data and run, and so of everything that could leak it


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run on a folder of hostile class and file names, taught by another run, in a place of a known name."""
    place = tmp_path_factory.mktemp(MARK)
    draw = np.random.default_rng(0)
    for number, name in enumerate(HOSTILE.values()):
        folder = place / "data" / name.replace("/", "")
        folder.mkdir(parents=True)
        for i in range(10):
            shade = draw.integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(shade).save(folder / f"=cmd{number}{i}.png")
    options = {
        "model__hidden_dim": 8, "model__token_mlp_dim": 4, "model__channel_mlp_dim": 8, "model__num_blocks": 1,
        "threads": 1, "epochs": None, "steps": 4, "batch_size": 16,
    }  # fmt: skip
    screen, data = Screen(quiet=True), str(place / "data")
    mixlab.train(data, "digits", run=place / "teacher", screen=screen, figures=False, **options)
    mixlab.train(
        data, "digits", run=place / "run", screen=screen, figures=False, distill__teacher=str(place / "teacher"),
        distill__views=1, **options,
    )  # fmt: skip
    return place


def texts(path: Path) -> dict[str, str]:
    """The readable content of a file, of every file in a folder, and of every member of an archive."""
    if path.is_dir():
        return {
            name: text for file in path.rglob("*") if file.is_file() for name, text in texts(file).items()
        }
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return {
                f"{path.name}/{name}": archive.read(name).decode("latin-1") for name in archive.namelist()
            }
    return {path.name: path.read_bytes().decode("latin-1")}


def check_nothing_of_ours(found: dict[str, str]) -> None:
    ours = [MARK, os.getcwd(), sys.prefix, sys.base_prefix, str(Path.home()), "site-packages"]
    ours += [
        name for name in (socket.gethostname(), getpass.getuser()) if len(name) > 5
    ]  # others are in any text
    for name, text in found.items():
        for word in ours:
            assert word not in text, f"{word} in {name}: {text[max(text.find(word) - 80, 0) :][:160]}"
        assert not re.search(r'File ."?/|/(home|root|tmp|usr|var|opt)/\w', text), name


@pytest.mark.parametrize(
    "to", ["onnx", *(pytest.param(to, marks=pytest.mark.slow) for to in ("openvino", "torch-export"))]
)
def test_exports_hold_nothing_of_ours(to, place, tmp_path):
    if to == "openvino":
        pytest.importorskip("openvino")
    weights = open_weights(place / "run")
    export(weights, tmp_path / "model", to=to, examples=[np.zeros((9, 9, 3), dtype=np.uint8)])
    found = texts(tmp_path)
    assert len(found) >= 2  # the record beside it too
    check_nothing_of_ours(found)


def test_a_package_and_a_repository_hold_nothing_of_ours_and_predict_escapes(place, tmp_path):
    weights = open_weights(place / "run")
    card = write_card(weights, place / "run")
    write_package(weights, tmp_path / "model.zip", card, [np.zeros((9, 9, 3), dtype=np.uint8)])
    for format in ("mixlab", "mixlab-timm"):
        write_repository(weights, tmp_path / format, card, format=format)
    convert(weights, tmp_path / f"{MARK}.npz")
    bare = open_weights(
        (tmp_path / f"{MARK}.npz").rename(tmp_path / "bare.npz")
    )  # without what stands beside it
    write_repository(bare, tmp_path / "bare", card, format="mixlab-timm")
    (tmp_path / "bare.npz").unlink()
    (tmp_path / f"{MARK}.npz.json").rename(tmp_path / "beside.json")
    check_nothing_of_ours(texts(tmp_path))
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        archive.extractall(tmp_path / "package")
    import subprocess

    Image.new("RGB", (9, 9)).save(tmp_path / "\x1b.png")
    done = subprocess.run(
        [sys.executable, "predict.py", str(tmp_path / "\x1b.png")],
        cwd=tmp_path / "package", capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "\x1b" not in done.stdout
    assert "\u202e" not in done.stdout
    assert r"\x1b.png" in done.stdout


def test_the_report_and_the_page_of_runs_hold_nothing_of_ours(place):
    check_nothing_of_ours({"report.html": (place / "run" / "report.html").read_text()})
    shown = describe_run(place / "run")
    check_nothing_of_ours({"ui": json.dumps(shown, ensure_ascii=False)})
    assert shown["unreadable"] == []
    for text in ((place / "run" / "report.html").read_text(), json.dumps(shown, ensure_ascii=False)):
        assert "\x1b" not in text
        assert "\u202e" not in text


def test_a_card_shows_hostile_names_as_they_are(place):
    card = write_card(open_weights(place / "run"), place / "run", data="<b>`x`\nevil: yes")
    check_nothing_of_ours({"card": card})
    head, body = card.removeprefix("---\n").split("\n---\n", 1)
    front = yaml.safe_load(head)
    assert front["model-index"][0]["results"][0]["dataset"]["name"] == r"<b>`x`\nevil: yes"
    assert "evil" not in front
    with pytest.raises(UsageError, match="licence"):
        write_card(open_weights(place / "run"), place / "run", licence="mit\nevil: yes")
    prose = re.sub(r"(?s)(`{3,}).*?\n\1\n", "", body)
    for sign in ("\x1b", "\u202e"):
        assert sign not in card
    for text in ("<script>", "<b>", "```", "[f]("):
        assert text not in prose.replace("\\" + text[0], "")
    assert "steps = 4" in body


def test_a_card_says_the_steps_that_were_taken(place, tmp_path):
    run = Path(shutil.copytree(place / "run", tmp_path / "run"))
    recipe = (run / "recipe.toml").read_text()
    (run / "recipe.toml").write_text(recipe.replace("steps = 4", "steps = 6591"))
    card = write_card(open_weights(run), run)
    assert "6591" not in card
    assert "steps = 4" in card


def test_the_terminal_gets_no_escape_sequences_and_spreadsheets_no_formulas(place, tmp_path):
    pictures = sorted((place / "data" / HOSTILE["lines"]).iterdir())[:2]
    done = command("predict", place / "run", *pictures, "--csv", "out.csv", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    evaluated = command("evaluate", place / "run", cwd=tmp_path)
    for text in (done.stdout, done.stderr, evaluated.stdout, evaluated.stderr):
        assert not re.search("[\x1b\u202e]", text)
    bad = command("predict", place / "run", "no\x1b[31m\u202ething.png", cwd=tmp_path)
    assert r"no\x1b[31m\u202ething.png" in bad.stderr
    for path in (tmp_path / "out.csv", place / "run" / "predictions.csv"):
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        labels = [row.get("label") for row in rows]
        assert "=1+1" not in labels
        assert "'=1+1" in labels
        assert {from_csv(label) for label in labels} <= set(HOSTILE.values())


def test_paths_of_data_and_teacher_are_base_names_in_what_describes_the_weights(place):
    provenance = open_weights(place / "run").provenance
    assert (provenance["data"], provenance["teacher"]) == ("data", "teacher")
    assert MARK not in (place / "run" / "config.json").read_text()
    assert str(place) in (place / "run" / "recipe.toml").read_text()  # which stays, and goes on with it


def test_class_names_of_strangers_weights_do_not_reach_the_terminal_as_they_are(place, tmp_path):
    weights = open_weights(place / "run")
    names = ("a\x1b[31mred", *weights.class_names[1:])
    save_weights(tmp_path / "strange", replace(weights, class_names=names))
    shown = command("predict", tmp_path / "strange", place / "data" / HOSTILE["lines"], cwd=tmp_path)
    assert "\x1b" not in shown.stdout
    assert r"a\x1b[31mred" in shown.stdout
