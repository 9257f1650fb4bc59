"""Checkpoints on disk: the newest whole one is found, whatever happened to the others."""

import pytest
import torch

from mixlab.checkpoint.checkpoints import Checkpoint, load_newest_checkpoint, save_checkpoint, sweep
from mixlab.errors import DiskError, WeightsError


def checkpoint(step: int) -> Checkpoint:
    tensors = {"model": {"a": torch.full((4,), float(step))}, "optimizer": {"0.step": torch.tensor(1.0)}}
    return Checkpoint(step=step, tensors=tensors, state={"best": None, "seconds": 1.5})


def test_the_newest_checkpoint_is_loaded_and_only_the_last_two_are_kept(tmp_path):
    for step in (5, 10, 15):
        save_checkpoint(tmp_path, checkpoint(step))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000010", "step_00000015"]
    loaded, rejected = load_newest_checkpoint(tmp_path)
    assert loaded.step == 15
    assert loaded.state == {"best": None, "seconds": 1.5}
    assert torch.equal(loaded.tensors["model"]["a"], torch.full((4,), 15.0))
    assert rejected == []


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]
)
def test_one_flipped_bit_anywhere_sends_us_to_the_checkpoint_before(tmp_path, name):
    for step in (5, 10):
        save_checkpoint(tmp_path, checkpoint(step))
    path = tmp_path / "step_00000010" / name
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    loaded, rejected = load_newest_checkpoint(tmp_path)
    assert loaded.step == 5
    assert len(rejected) == 1
    assert "step_00000010" in rejected[0]


def test_without_any_valid_checkpoint_the_error_names_each(tmp_path):
    save_checkpoint(tmp_path, checkpoint(5))
    (tmp_path / "step_00000005" / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="step_00000005"):
        load_newest_checkpoint(tmp_path)
    with pytest.raises(WeightsError, match="no checkpoint"):
        load_newest_checkpoint(tmp_path / "nowhere")


def test_a_failed_save_leaves_the_old_checkpoint_and_nothing_half_written(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, checkpoint(5))

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mixlab.checkpoint.checkpoints.save_tensors", full)
    with pytest.raises(DiskError, match="No space left"):
        save_checkpoint(tmp_path, checkpoint(10))
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000005"]
    assert load_newest_checkpoint(tmp_path)[0].step == 5


def test_what_a_killed_save_left_behind_is_swept(tmp_path):
    save_checkpoint(tmp_path, checkpoint(5))
    (tmp_path / ".step_00000010.123.tmp").mkdir()
    (tmp_path / ".step_00000010.123.tmp" / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".config.json.123.tmp").write_bytes(b"half")
    sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000005"]
