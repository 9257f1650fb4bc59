"""Weights and checkpoints on disk: read back equal, and refused by name when anything does not fit."""

import json

import pytest
import torch
from safetensors.torch import save_file

from mixlab.checkpoint.store import (
    Checkpoint,
    Weights,
    load_newest_checkpoint,
    load_weights,
    save_checkpoint,
    save_weights,
    sweep,
)
from mixlab.data.preprocess import Preprocess
from mixlab.errors import DiskError, WeightsError
from mixlab.models.catalog import create_model

SETTINGS = {
    "name": "mixer_pico2",
    "num_classes": 3,
    "image_size": (8, 8),
    "in_channels": 1,
    "stochastic_depth": 0.1,
}


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    model = create_model(**SETTINGS)
    torch.nn.init.normal_(model.head.weight)
    weights = Weights(
        model=model,
        model_settings=SETTINGS,
        preprocess=Preprocess(image_size=(8, 8), channels=1, mean=(0.5,), std=(0.5,)),
        class_names=("a", "b", "ü"),
        provenance={"step": 7},
    )
    save_weights(tmp_path / "w", weights)
    return tmp_path / "w", weights


def test_weights_are_read_back_equal_with_all_that_belongs_to_them(saved):
    path, weights = saved
    loaded = load_weights(path)
    image = torch.randn(2, 1, 8, 8)
    assert torch.equal(loaded.model(image), weights.model.eval()(image))
    assert loaded.preprocess == weights.preprocess
    assert loaded.class_names == weights.class_names
    assert loaded.provenance == {"step": 7}
    assert not loaded.model.training


def test_timm_weights_are_read_back_equal(tmp_path):
    settings = {"name": "timm/resnet10t", "num_classes": 3, "image_size": (32, 32), "in_channels": 3}
    model = create_model(**settings)
    preprocess = Preprocess(image_size=(32, 32))
    save_weights(
        tmp_path,
        Weights(
            model=model,
            model_settings=settings,
            preprocess=preprocess,
            class_names=("a", "b", "c"),
            provenance={},
        ),
    )
    image = torch.randn(2, 3, 32, 32)
    assert torch.equal(load_weights(tmp_path).model(image), model.eval()(image))


def test_weights_of_another_model_are_refused_with_the_keys_that_differ(saved):
    path, _ = saved
    other = create_model("mixer_pico4", num_classes=3, image_size=(8, 8), in_channels=1, num_blocks=2)
    tensors = other.state_dict()
    tensors["extra"] = torch.zeros(1)
    save_file(tensors, path / "weights.safetensors")
    with pytest.raises(WeightsError, match="another model") as error:
        load_weights(path)
    message = str(error.value)
    assert "missing: blocks.2" in message
    assert "not expected: extra" in message
    assert "blocks.0.token_mixing.fc1.weight: has (32, 4), needs (32, 16)" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: (path / "config.json").unlink(), "config.json is missing"),
        (lambda path: (path / "weights.safetensors").unlink(), "weights.safetensors is missing"),
        (lambda path: (path / "config.json").write_text("{"), "cannot be read"),
        (lambda path: (path / "config.json").write_text("[]"), "does not describe"),
        (lambda path: edit(path, "format_version", 99), "format version 99"),
        (lambda path: edit(path, "model", {"name": "mixer_pico2"}), "image_size"),
        (lambda path: edit(path, "model", SETTINGS | {"name": "mixer_xx2"}), "no model called"),
        (lambda path: edit(path, "model", SETTINGS | {"surprise": 1}), "surprise"),
        (lambda path: edit(path, "preprocess", {}), "preprocess"),
        (lambda path: (path / "weights.safetensors").write_bytes(b"\xff" * 100), "damaged"),
        (lambda path: cut(path / "weights.safetensors"), "damaged"),
    ],
)
def test_a_damaged_folder_is_refused_with_the_reason(saved, change, message):
    path, _ = saved
    change(path)
    with pytest.raises(WeightsError, match=message):
        load_weights(path)


def edit(path, key, value):
    config = json.loads((path / "config.json").read_text())
    config[key] = value
    (path / "config.json").write_text(json.dumps(config))


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


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

    monkeypatch.setattr("mixlab.checkpoint.store._save_tensors", full)
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
