"""benchmarks/gpu: all of it rehearsed in tiny, what is cut keeps what it has, images come out as they went in."""

import argparse
import contextlib
import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.gpu import speed
from benchmarks.gpu.figure import draw
from benchmarks.gpu.pictures import list_pictures, pack
from benchmarks.gpu.run import PARTS, Part, Running, append, read_lines
from mixlab.data.images.decode import decode
from mixlab.errors import DataError, UsageError

ROOT = Path(__file__).resolve().parents[1]
FORKS = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # here the children only wait, or end


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """The folder of a rehearsal, and what it printed; HOME and TMPDIR are beside it."""
    folder = tmp_path_factory.mktemp("gpu")
    variables = {"HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp"), "PYTHONPATH": str(ROOT)}
    for name in ("home", "tmp", "elsewhere"):
        (folder / name).mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--out", str(folder / "out"), "--rehearse", "--commit", "abc"],
        cwd=folder / "elsewhere", env=os.environ | variables, capture_output=True, text=True, check=False,
    )  # fmt: skip
    log = folder / "out" / "log.txt"
    assert done.returncode == 0, done.stdout + done.stderr + (log.read_text()[-5000:] if log.exists() else "")
    return folder, done.stdout


@pytest.mark.slow
def test_the_rehearsal_does_every_part_and_writes_nothing_elsewhere(rehearsed):
    folder, said = rehearsed
    assert {path.name for path in (folder / "out").iterdir()} == {"gpu.jsonl", "log.txt"}
    for name in ("home", "tmp", "elsewhere"):
        assert not list((folder / name).iterdir()), name
    lines = read_lines(folder / "out" / "gpu.jsonl")
    ends = {line["part"]: line for line in lines if "status" in line}
    assert ends.keys() == {part.name for part in PARTS}
    for name, end in ends.items():
        assert end["status"] == "done", end
        assert end["rows"] == sum(line["part"] == name and "row" in line for line in lines) > 0
        assert end["facts"]["commit"] == "abc"
        assert f"{name}: done" in said
    last = [line for line in lines if "status" in line][-1]
    assert {"card", "torch", "cuda", "cpu", "cores", "commit"} <= last["facts"].keys()


@pytest.mark.slow
def test_the_rows_of_the_rehearsal_have_speeds_shares_and_ratios(rehearsed):
    lines = read_lines(rehearsed[0] / "out" / "gpu.jsonl")

    def rows(part):
        return [line["row"] for line in lines if line["part"] == part and "row" in line]

    for part in ("inference", "compiled", "training"):
        speeds = [row for row in rows(part) if "images_per_second" in row]
        assert all(row["images_per_second"] > 0 and row["share_of_product"] > 0 for row in speeds)
        assert any(row["share_of_product"] == 1 and "product" in row["side"] for row in speeds)
        assert any(
            "ratio" in row and row["range"][0] <= row["median"] <= row["range"][1] for row in rows(part)
        )
        same = [
            row["relative_difference_of_logits"]
            for row in rows(part)
            if "relative_difference_of_logits" in row
        ]
        assert len(same) == 1
        assert same[0] < 1e-5
        assert not [row for row in rows(part) if "failed" in row]
    assert all(row["outcome"] in ("passed", "skipped") for row in rows("tests"))
    assert any(row["outcome"] == "passed" for row in rows("tests"))
    assert {"threads", "images_per_second"} <= rows("cores")[0].keys()


@pytest.mark.slow
def test_figures_are_drawn_from_the_file(rehearsed, tmp_path):
    drawn = draw(rehearsed[0] / "out" / "gpu.jsonl", tmp_path / "figures")
    assert [path.stem for path in drawn] == ["inference", "compiled", "training", "cores"]
    for path in drawn:
        with Image.open(path) as figure:
            assert figure.width > 500
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match="no speeds"):
        draw(tmp_path / "empty.jsonl", tmp_path / "none")


def options(tmp_path, **changes):
    return argparse.Namespace(**{"out": tmp_path, "rehearse": True, "cifar": [], "part": None} | changes)


def running_commands():
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            yield path.read_bytes()


@FORKS
def test_a_part_that_takes_too_long_is_ended_with_its_children_and_keeps_its_rows(tmp_path):
    append(tmp_path / "gpu.jsonl", {"part": "doctor", "row": {"found": 1}})
    running = Running(
        Part("doctor", 0.2), options(tmp_path), 0.2, lambda given: subprocess.run(["sleep", "97"])
    )
    began = time.monotonic()
    while not running.is_over:
        time.sleep(0.01)
    line = running.end()
    assert time.monotonic() - began < 5
    assert (line["status"], line["rows"]) == ("cut", 1)
    assert "longer than" in line["error"]
    assert not list((tmp_path / "work").iterdir())
    assert not any(b"sleep\x0097" in command for command in running_commands())


@FORKS
def test_a_part_that_is_cut_before_it_has_a_group_of_its_own_ends_too(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "setsid", lambda: time.sleep(97))  # in the fork, as on a machine that is busy
    running = Running(Part("doctor", 0.0), options(tmp_path), 0.0, lambda given: None)
    began = time.monotonic()
    assert running.end()["status"] == "cut"
    assert time.monotonic() - began < 30


@FORKS
def test_a_part_that_fails_says_why(tmp_path):
    def fail(given):
        append(given.out / "gpu.jsonl", {"part": given.part, "error": "MemoryError: none left"})
        os._exit(1)

    running = Running(Part("training", 9), options(tmp_path), 9, fail)
    while not running.is_over:
        time.sleep(0.01)
    assert running.end()["error"] == "MemoryError: none left"


def test_a_line_cut_in_its_middle_is_left_out(tmp_path):
    path = tmp_path / "gpu.jsonl"
    append(path, {"part": "doctor"})
    with path.open("a") as file:
        file.write('{"part": "te')
    assert read_lines(path) == [{"part": "doctor"}]


def test_the_batch_is_doubled_until_memory_is_out(tmp_path):
    made = []

    def make(size):
        made.append(size)
        if size == 32:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return lambda: time.sleep(0.001)

    side = speed.Side("one", make, flops=1.0)
    tried = speed.find_batch_size(side, torch.device("cpu"), 4096, time.monotonic() + 60)
    assert made == [8, 16, 32]
    assert list(tried) == [8, 16]
    assert side.batch_size in tried
    assert side.facts == {"out_of_memory_at": 32}
    with pytest.raises(RuntimeError, match="a shape"):  # what is no lack of memory is told
        speed.find_batch_size(
            speed.Side("two", fail_by_shape, 1.0), torch.device("cpu"), 8, time.monotonic() + 60
        )


def fail_by_shape(size):
    raise RuntimeError("a shape")


@pytest.mark.parametrize("name", ["half", "half.zip"])
def test_packed_pictures_are_every_second_one_bit_for_bit(name, tmp_path):
    random = np.random.default_rng(0)
    pixels = {}
    for label in ("cat", "dog"):
        for number in range(5):
            path = tmp_path / "source" / "train" / label / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels[label, number] = random.integers(0, 255, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels[label, number]).save(path)
    found = []
    for half, count in ((1, 6), (2, 4)):
        out = tmp_path / str(half) / name
        out.parent.mkdir()
        assert f"{count} images" in pack(str(tmp_path / "source"), out, half)
        (tmp_path / f"work{half}").mkdir()
        with list_pictures([out], tmp_path / f"work{half}").open() as file:
            rows = list(csv.DictReader(file))
        found += [(row["label"], decode(Path(row["path"]).read_bytes()).tobytes()) for row in rows]
        assert len(rows) == count
    assert sorted(found) == sorted((label, p.tobytes()) for (label, _), p in pixels.items())
    with pytest.raises(UsageError, match="there already"):
        pack(str(tmp_path / "source"), tmp_path / "1" / name, 1)


def test_results_are_not_written_over_and_wrong_uses_are_told(tmp_path):
    (tmp_path / "gpu.jsonl").write_text(json.dumps({"part": "doctor"}) + "\n")
    for words, said in (
        (["--out", str(tmp_path)], "is there already"),
        ([], "--out DIR"),
        (["--out", str(tmp_path / "new"), "--cifar", str(tmp_path / "none.zip")], "there is no"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.gpu", *words],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2
        assert said in done.stderr
