"""Weights on disk: read back equal, and refused by name when anything does not fit."""

import json

import pytest
import torch
from safetensors.torch import save_file

from mixlab.checkpoint.store import Weights, load_weights, save_weights
from mixlab.data.images.preprocess import ImagePreprocess
from mixlab.errors import WeightsError
from mixlab.models.catalog import create_model
from tests.untied import untie

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
        preprocess=ImagePreprocess(image_size=(8, 8), channels=1, mean=(0.5,), std=(0.5,)),
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


def test_others_may_read_weights_as_they_may_other_files(saved, tmp_path):
    folder, _ = saved
    (tmp_path / "plain").write_text("")
    usual = (tmp_path / "plain").stat().st_mode
    assert [file.name for file in folder.iterdir() if file.is_file() and file.stat().st_mode != usual] == []


def test_timm_weights_are_read_back_equal(tmp_path):
    settings = {"name": "timm/resnet10t", "num_classes": 3, "image_size": (32, 32), "in_channels": 3}
    model = create_model(**settings)
    preprocess = ImagePreprocess(image_size=(32, 32))
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
        (lambda path: (path / "config.json").write_text("[]"), "no JSON object"),
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
    untie(path)
    config = json.loads((path / "config.json").read_text())
    config[key] = value
    (path / "config.json").write_text(json.dumps(config))


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])
