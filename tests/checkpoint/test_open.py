"""One door to all weights: what is taken from a file, what is assumed and said, and what is refused."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import mixlab
from mixlab.checkpoint import open as door
from mixlab.checkpoint.convert import convert
from mixlab.checkpoint.foreign import usual_class_names
from mixlab.checkpoint.layouts import LAYOUTS
from mixlab.checkpoint.open import open_weights
from mixlab.checkpoint.store import Weights, save_weights
from mixlab.data.images.preprocess import ImagePreprocess
from mixlab.errors import UsageError, WeightsError
from mixlab.models.catalog import create_model, settings_of


def random_model(num_classes=5, image_size=(16, 16), **settings):
    torch.manual_seed(0)
    model = create_model("mixer_pico4", num_classes=num_classes, image_size=image_size, **settings).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def write_npz(path, model):
    layout = LAYOUTS["official"]
    keys = layout.keys(model.config.num_blocks)
    np.savez(path, **{keys[n]: layout.to_theirs(n, t).numpy() for n, t in model.state_dict().items()})


def write_timm(path, model):
    keys = LAYOUTS["timm"].keys(model.config.num_blocks)
    save_file({keys[name]: tensor for name, tensor in model.state_dict().items()}, path)


def test_a_bare_npz_becomes_a_classifier_that_says_what_it_assumed(tmp_path):
    model = random_model()
    write_npz(tmp_path / "w.npz", model)
    classifier = mixlab.load(tmp_path / "w.npz", device="cpu")
    image = torch.randn(2, 3, 16, 16)
    assert torch.equal(classifier.model(image), model(image))
    assert classifier.model.features(image).shape == (2, 64)
    assert classifier.preprocess == ImagePreprocess(image_size=(16, 16), crop_fraction=0.875)
    assert classifier.class_names == ("0", "1", "2", "3", "4")
    assert classifier.provenance["assumed"]["gelu"] == "tanh"
    assert classifier.provenance["assumed"]["layer_norm_eps"] == 1e-6
    assert "image_size" in classifier.provenance["assumed"]
    rows = classifier.predict([np.zeros((20, 30, 3), np.uint8)])
    assert len(rows[0]["predictions"]) == 5


def test_a_bare_timm_file_is_run_with_erf_unless_told_otherwise(tmp_path):
    model = random_model(gelu="erf")
    write_timm(tmp_path / "w.safetensors", model)
    image = torch.randn(2, 3, 16, 16)
    weights = open_weights(tmp_path / "w.safetensors")
    assert torch.equal(weights.model(image), model(image))
    assert weights.provenance["assumed"]["gelu"] == "erf"
    other = open_weights(tmp_path / "w.safetensors", gelu="tanh", layer_norm_eps=1e-5)
    assert (other.model.config.gelu, other.model.config.layer_norm_eps) == ("tanh", 1e-5)
    assert "gelu" not in other.provenance["assumed"]
    assert not torch.equal(other.model(image), model(image))
    assert create_model(**other.model_settings).config == other.model.config


def test_a_pth_file_may_wrap_its_tensors_and_carry_more(tmp_path):
    model = random_model(gelu="erf")
    keys = LAYOUTS["timm"].keys(model.config.num_blocks)
    tensors = {f"module.{keys[name]}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": tensors}, tmp_path / "w.pth")
    assert torch.equal(open_weights(tmp_path / "w.pth").model.stem.weight, model.stem.weight)


def test_patches_that_make_no_square_need_the_shape(tmp_path):
    write_npz(tmp_path / "w.npz", random_model(image_size=(8, 16)))
    with pytest.raises(UsageError, match="4x32, 8x16, 16x8, 32x4"):
        mixlab.load(tmp_path / "w.npz")
    weights = open_weights(tmp_path / "w.npz", image_size=(8, 16))
    assert weights.model.config.grid == (2, 4)
    assert weights.preprocess.image_size == (8, 16)


def test_another_image_size_resamples_the_weights_and_the_preprocessing(tmp_path):
    write_npz(tmp_path / "w.npz", random_model())
    classifier = mixlab.load(tmp_path / "w.npz", image_size=(24, 32), device="cpu")
    assert classifier.model.config.image_size == classifier.preprocess.image_size == (24, 32)
    assert classifier.provenance["resampled_from"] == "16x16"
    assert classifier.model(torch.zeros(1, 3, 24, 32)).shape == (1, 5)
    with pytest.raises(UsageError, match="multiple"):
        mixlab.load(tmp_path / "w.npz", image_size=18)


def test_the_file_of_a_folder_is_opened_with_what_stands_beside_it(tmp_path):
    model = random_model()
    preprocess = ImagePreprocess(image_size=(16, 16), mean=(0.1, 0.2, 0.3))
    weights = Weights(
        model=model,
        model_settings=settings_of(model.config),
        preprocess=preprocess,
        class_names=tuple("abcde"),
        provenance={"seed": 1},
    )
    save_weights(tmp_path / "run", weights)
    again = open_weights(tmp_path / "run" / "weights.safetensors")
    assert again.preprocess == preprocess
    assert again.class_names == tuple("abcde")
    moved = tmp_path / "alone.safetensors"
    moved.write_bytes((tmp_path / "run" / "weights.safetensors").read_bytes())
    assert "gelu" in open_weights(moved).provenance["assumed"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label_names": ["a"]}, "label_names"),
        ({"pretrained_cfg": {"mean": "x"}}, "missing or wrong"),
        ({"model_args": {"img_size": [16, 32]}}, "does not fit"),
        ({"model_args": 5}, "missing or wrong"),
        ({"pretrained_cfg": {"std": [0, 0, 0]}}, "std"),
        ({"model_args": {"gelu": "relu"}}, "gelu"),
    ],
)
def test_a_timm_folder_with_a_description_that_does_not_fit_is_refused(change, message, tmp_path):
    model = random_model(gelu="erf")
    folder = tmp_path / "folder"
    folder.mkdir()
    write_timm(folder / "model.safetensors", model)
    good = {"architecture": "mixer_s16_224", "pretrained_cfg": {"input_size": [3, 16, 16]}}
    (folder / "config.json").write_text(json.dumps(good))
    assert open_weights(folder).model.config.image_size == (16, 16)
    (folder / "config.json").write_text(json.dumps(good | change))
    with pytest.raises((WeightsError, UsageError), match=message):
        open_weights(folder)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "\x00", '{"format": "mixlab"}'])
def test_a_description_that_is_none_is_refused(text, tmp_path):
    for name in ("model.safetensors", "weights.safetensors"):
        folder = tmp_path / name
        folder.mkdir()
        write_timm(folder / name, random_model())
        (folder / "config.json").write_text(text)
        with pytest.raises(WeightsError):
            open_weights(folder)


def test_nothing_of_that_name_is_said_with_the_nearest_published_one():
    with pytest.raises(WeightsError, match="no such run, weights file or published name"):
        mixlab.load("nothing/here")
    with pytest.raises(UsageError, match="imagenet1k"):
        mixlab.load("mixer_b16:imagnet1k")


def test_a_published_name_comes_with_its_preprocessing_and_names(tmp_path, monkeypatch):
    model = create_model("mixer_pico4", num_classes=1000, image_size=16).eval()
    write_npz(tmp_path / "cached.npz", model)
    monkeypatch.setattr(door, "fetch_published", lambda published, progress=None: tmp_path / "cached.npz")
    classifier = mixlab.load("mixer_b16:imagenet1k", device="cpu")
    assert classifier.class_names[0] == "tench, Tinca tinca"
    assert len(set(classifier.class_names)) == 1000
    assert classifier.preprocess.mean == (0.5, 0.5, 0.5)
    assert classifier.provenance["source"] == "mixer_b16:imagenet1k"
    assert "ImageNet" in classifier.provenance["published"]


def test_class_names_are_imagenets_where_the_number_is_imagenets():
    assert usual_class_names(3) == ("0", "1", "2")
    for number in (1000, 11221, 21843):
        names = usual_class_names(number)
        assert len(names) == len(set(names)) == number


def test_weights_converted_and_opened_keep_their_class_names(tmp_path):
    write_npz(tmp_path / "w.npz", random_model())
    convert(open_weights(tmp_path / "w.npz"), tmp_path / "out")
    again = open_weights(tmp_path / "out")
    assert again.class_names == ("0", "1", "2", "3", "4")
    assert again.provenance["format"] == "the authors' .npz"
