import json
import os
from pathlib import Path

import numpy as np
import pytest

from mixlab.errors import DiskError, MixlabError
from mixlab.report.run_log import RunLog, read_run_log


def log_of_steps(path: Path, *steps: int) -> RunLog:
    log = RunLog(path)
    for step in steps:
        log.write("train", step=step, loss=1 / step)
    return log


def test_what_is_written_is_read_back_in_order(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "metrics.jsonl")
    log.write("train", step=50, epoch=1.23, loss=0.5, accuracy=None)
    assert read_run_log(log.path) == [
        {"event": "train", "step": 50, "epoch": 1.23, "loss": 0.5, "accuracy": None}
    ]
    log.write("resume", step=50)
    assert [row["event"] for row in read_run_log(log.path)] == ["train", "resume"]


def test_opening_an_existing_log_keeps_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log_of_steps(path, 1, 2)
    log_of_steps(path, 3)
    assert [row["step"] for row in read_run_log(path)] == [1, 2, 3]


def test_numpy_values_become_plain_and_what_is_not_finite_becomes_null(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "metrics.jsonl")
    log.write(
        "train",
        step=np.int64(7),
        loss=np.float32("nan"),
        lr=float("inf"),
        good=np.bool_(True),
        shares=np.array([0.5, np.nan]),
        nested={"a": [float("-inf"), np.float64(2.0)]},
    )

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not strict JSON")

    assert json.loads(log.path.read_text(), parse_constant=refuse) == {
        "event": "train",
        "step": 7,
        "loss": None,
        "lr": None,
        "good": True,
        "shares": [0.5, None],
        "nested": {"a": [None, 2.0]},
    }


@pytest.mark.parametrize("tail", [b'{"event": "train", "st', b'{"event": "caf\xc3', b"\x00\x00\x00", b"{"])
def test_a_last_line_cut_short_is_dropped(tmp_path: Path, tail: bytes) -> None:
    path = log_of_steps(tmp_path / "metrics.jsonl", 1, 2).path
    path.write_bytes(path.read_bytes() + tail)
    assert [row["step"] for row in read_run_log(path)] == [1, 2]


def test_a_resumed_run_does_not_write_onto_a_line_cut_short(tmp_path: Path) -> None:
    path = log_of_steps(tmp_path / "metrics.jsonl", 1, 2).path
    path.write_bytes(path.read_bytes() + b'{"event": "train", "st')
    log_of_steps(path, 3)
    assert [row["step"] for row in read_run_log(path)] == [1, 2, 3]


def test_a_last_line_that_lacks_only_its_line_break_is_kept(tmp_path: Path) -> None:
    path = log_of_steps(tmp_path / "metrics.jsonl", 1, 2).path
    path.write_bytes(path.read_bytes().removesuffix(b"\n"))
    assert [row["step"] for row in read_run_log(path)] == [1, 2]
    log_of_steps(path, 3)
    assert [row["step"] for row in read_run_log(path)] == [1, 2, 3]


@pytest.mark.parametrize("bad", ["{oops}", "[1, 2]", '{"event": "train", "loss": NaN}', '{"step": 1}', ""])
def test_any_other_bad_line_is_named_by_its_number(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"event": "resume", "step": 1}}\n{bad}\n{{"event": "resume", "step": 3}}\n')
    with pytest.raises(MixlabError, match="line 2") as caught:
        read_run_log(path)
    assert str(path) in str(caught.value)


def test_a_missing_log_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(MixlabError, match=r"no such file.*metrics\.jsonl"):
        read_run_log(tmp_path / "metrics.jsonl")


def test_truncating_drops_only_later_steps_and_keeps_the_other_bytes(tmp_path: Path) -> None:
    log = log_of_steps(tmp_path / "metrics.jsonl", 50, 100)
    log.write("note", text="a line without a step")
    kept = log.path.read_bytes()
    log_of_steps(log.path, 101, 150)
    log.truncate_after(100)
    assert log.path.read_bytes() == kept
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_truncating_a_log_that_does_not_exist_does_nothing(tmp_path: Path) -> None:
    RunLog(tmp_path / "metrics.jsonl").truncate_after(3)
    assert os.listdir(tmp_path) == []


def test_a_log_that_cannot_be_replaced_stays_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = log_of_steps(tmp_path / "metrics.jsonl", 1, 2)
    before = log.path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(DiskError, match="No space left"):
        log.truncate_after(1)
    assert log.path.read_bytes() == before
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_a_log_in_a_place_that_cannot_be_written_is_a_disk_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(DiskError):
        RunLog(tmp_path / "file" / "metrics.jsonl").write("train", step=1)
