"""Weights through every format and back, and through other people's programs; what changes is measured and said."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mixlab.checkpoint.convert import FORMATS, convert
from mixlab.checkpoint.open import open_weights
from mixlab.checkpoint.store import Weights
from mixlab.data.images.preprocess import ImagePreprocess
from mixlab.errors import MixlabError, UsageError, WeightsError
from mixlab.models.catalog import create_model, settings_of


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def random_weights(gelu="tanh", eps=1e-6, **settings) -> Weights:
    torch.manual_seed(0)
    settings = {"name": "mixer_nano4", "num_classes": 5, "image_size": (12, 8), "num_blocks": 2} | settings
    model = create_model(**settings, gelu=gelu, layer_norm_eps=eps).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    config = model.config
    names = tuple(f"class {number}" for number in range(config.num_classes))
    return Weights(
        model=model,
        model_settings=settings_of(config),
        preprocess=ImagePreprocess(image_size=config.image_size, crop_fraction=0.9, interpolation="bilinear"),
        class_names=names,
        provenance={"made": "by a test"},
    )


def timm_sized(**options) -> Weights:
    """The smallest that timm has: S/32, for few and small images, with narrow MLPs unless they are said."""
    narrow = {"token_mlp_dim": 8, "channel_mlp_dim": 64, "image_size": (64, 32)}
    return random_weights(name="mixer_s32", num_blocks=None, **narrow | options)


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(name == other and torch.equal(x, y) for (name, x), (other, y) in pairs)


# timm's own models are large: a few pairs with them here, all of them in benchmarks/formats.py.
PAIRS = [(a, b) for a in FORMATS for b in FORMATS if "timm" not in (a, b)]
PAIRS += [("official", "timm"), ("timm", "official"), ("timm", "mixlab-timm")]


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_from_any_format_to_any_other_every_tensor_stays_the_same(one, other, tmp_path):
    weights = first = timm_sized() if "timm" in (one, other) else random_weights()
    size = weights.model.config.image_size
    numerics = {"gelu": "tanh", "layer_norm_eps": 1e-6}
    for format, name in ((one, "first"), (other, "second")):
        convert(weights, tmp_path / name, format=format, accept_gelu_change=True)
        weights = open_weights(tmp_path / name, image_size=size, **numerics)
    assert weights is not first
    assert same(weights.model, first.model)
    assert weights.model.config.gelu == "tanh"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_timm_folder_is_loaded_by_timm_with_the_same_logits(tmp_path):
    import timm

    weights = timm_sized(gelu="erf", token_mlp_dim=None, channel_mlp_dim=None)
    result = convert(weights, tmp_path / "folder", format="timm")
    assert result["change"] is None
    theirs = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True).eval()
    image = torch.randn(3, 3, 64, 32)
    assert (theirs(image) - weights.model(image)).abs().max() < 2e-5
    assert result["in_timm"]["max_difference"] < 2e-5
    data = timm.data.resolve_data_config(model=theirs)
    assert (tuple(data["mean"]), data["crop_pct"], data["interpolation"]) == (
        (0.5, 0.5, 0.5),
        0.9,
        "bilinear",
    )
    again = open_weights(tmp_path / "folder")
    assert again.preprocess == weights.preprocess
    assert again.class_names == weights.class_names
    assert again.model.config == weights.model.config


def test_a_timm_folder_is_loaded_by_transformers_with_the_same_logits_and_labels(tmp_path):
    transformers = pytest.importorskip("transformers")
    weights = timm_sized(gelu="erf")
    convert(weights, tmp_path / "folder", format="timm")
    theirs = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "folder").eval()
    image = torch.randn(3, 3, 64, 32)
    assert (theirs(image).logits - weights.model(image)).abs().max() < 2e-5
    assert theirs.config.id2label[4] == "class 4"


def test_unusual_widths_reach_timm_unharmed(tmp_path):
    weights = timm_sized(gelu="erf", token_mlp_dim=77, channel_mlp_dim=1001)
    result = convert(weights, tmp_path / "folder", format="timm")
    assert result["in_timm"]["max_difference"] < 2e-5


def test_tanh_weights_are_not_given_to_timm_silently(tmp_path):
    weights = timm_sized()
    with pytest.raises(UsageError, match="tanh -> erf") as error:
        convert(weights, tmp_path / "folder", format="timm")
    assert "--accept-gelu-change" in error.value.hint
    assert "mixlab-timm" in error.value.hint
    assert list(tmp_path.iterdir()) == []
    result = convert(weights, tmp_path / "folder", format="timm", accept_gelu_change=True)
    assert 1e-5 < result["change"]["max_difference"] < 1
    stored = json.loads((tmp_path / "folder" / "config.json").read_text())["mixlab"]
    assert stored["change"] == result["change"]
    assert stored["converted_from"] == {"made": "by a test"}
    assert result["in_timm"]["max_difference"] == pytest.approx(result["change"]["max_difference"], rel=0.05)


@pytest.mark.parametrize(
    ("format", "gelu", "eps", "refused"),
    [
        ("official", "tanh", 1e-6, False),
        ("official", "erf", 1e-6, True),
        ("official", "tanh", 1e-5, True),
        ("lucidrains", "erf", 1e-5, False),
        ("lucidrains", "tanh", 1e-5, True),
        ("mmpretrain", "erf", 1e-6, True),
        ("mixlab", "erf", 1e-5, False),
        ("mixlab-timm", "erf", 1e-5, False),
    ],
)
def test_a_format_whose_code_computes_otherwise_is_refused_unless_accepted(
    format, gelu, eps, refused, tmp_path
):
    weights = random_weights(gelu, eps)
    if refused:
        with pytest.raises(UsageError, match="other numerics"):
            convert(weights, tmp_path / "out", format=format)
        assert not (tmp_path / "out").exists()
    result = convert(weights, tmp_path / "out", format=format, accept_gelu_change=refused)
    assert (result["change"] is not None) == refused


def test_the_official_file_has_the_authors_keys_and_beside_it_what_it_cannot_say(tmp_path):
    weights = random_weights()
    result = convert(weights, tmp_path / "w.npz")
    assert result["format"] == "official"
    with np.load(tmp_path / "w.npz", allow_pickle=False) as arrays:
        assert arrays["stem/kernel"].shape == (4, 4, 3, 128)
        kernel = arrays["MixerBlock_1/token_mixing/Dense_0/kernel"]
    assert np.array_equal(kernel, weights.model.state_dict()["blocks.1.token_mixing.fc1.weight"].numpy().T)
    beside = json.loads((tmp_path / "w.npz.json").read_text())
    assert beside["class_names"][3] == "class 3"
    assert beside["preprocess"]["crop_fraction"] == 0.9


def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path):
    weights = random_weights(gelu="erf")
    (tmp_path / "there").write_text("mine")
    cases = [
        ({"destination": tmp_path / "there"}, "exists"),
        ({"destination": tmp_path / "new", "format": "onnx"}, "no format"),
        ({"destination": tmp_path / "new", "format": "timm"}, "timm has no Mixer of 2 blocks"),
    ]
    for arguments, message in cases:
        with pytest.raises(UsageError, match=message):
            convert(weights, **arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert (tmp_path / "there").read_text() == "mine"


def test_models_that_are_no_plain_mixer_are_kept_by_our_own_format_only(tmp_path):
    settings = {"name": "timm/resnet10t", "num_classes": 5, "image_size": (32, 32)}
    weights = Weights(
        model=create_model(**settings).eval(),
        model_settings=settings,
        preprocess=ImagePreprocess(image_size=(32, 32)),
        class_names=tuple("abcde"),
        provenance={},
    )
    with pytest.raises(UsageError, match="only a plain Mixer"):
        convert(weights, tmp_path / "out", format="official")
    convert(weights, tmp_path / "out")
    assert same(open_weights(tmp_path / "out").model, weights.model)


@pytest.mark.parametrize("format", [f for f in FORMATS if f not in ("timm", "mixlab")])
def test_there_and_back_through_any_format_nothing_is_lost(format, tmp_path):
    weights = random_weights(gelu="erf", eps=1e-4)
    path = tmp_path / "file"
    convert(weights, path, format=format, accept_gelu_change=True)
    again = open_weights(path)  # 12 x 8 pixels are no square: what stands beside the file says so
    assert same(again.model, weights.model)
    assert again.model.config == weights.model.config
    assert again.preprocess == weights.preprocess
    assert again.class_names == weights.class_names
    image = torch.randn(2, 3, 12, 8)
    assert torch.equal(again.model(image), weights.model(image))


def test_timm_weights_keep_the_gelu_they_were_trained_with(tmp_path):
    convert(timm_sized(), tmp_path / "folder", format="timm", accept_gelu_change=True)
    assert open_weights(tmp_path / "folder").model.config.gelu == "tanh"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_names": ["a"]}, "class names are 1"),
        ({"preprocess": None}, "preprocess must be an object"),
        ({"layer_norm_eps": "small"}, "layer_norm_eps must be a number"),
        ({"gelu": "relu"}, "gelu must be tanh or erf"),
        ({"preprocess": {}}, "missing or unknown keys"),
        ({"class_names": None}, "class_names must be a list"),
        ({"gelu": None}, "gelu must be text"),
    ],
)
def test_what_stands_beside_a_file_and_does_not_fit_is_refused(change, message, tmp_path):
    convert(random_weights(), tmp_path / "w.npz")
    beside = tmp_path / "w.npz.json"
    beside.write_text(json.dumps(json.loads(beside.read_text()) | change))
    with pytest.raises(MixlabError, match=message):
        open_weights(tmp_path / "w.npz")
    beside.write_text("{}")  # not ours: then the format decides
    assert open_weights(tmp_path / "w.npz", image_size=(12, 8)).class_names == ("0", "1", "2", "3", "4")


@pytest.mark.parametrize("format", FORMATS)
def test_a_grid_that_is_no_square_though_its_number_of_patches_is(format, tmp_path):
    if format == "timm":
        weights = timm_sized(image_size=(32, 128), gelu="erf")
    else:
        weights = random_weights(image_size=(8, 32), gelu="erf")  # 2 x 8 patches: 16
    convert(weights, tmp_path / "file", format=format, accept_gelu_change=True)
    again = open_weights(tmp_path / "file")
    assert again.model.config == weights.model.config
    assert again.preprocess == weights.preprocess
    if format not in ("mixlab", "timm", "mixlab-timm"):
        (tmp_path / "file.json").unlink()
        assert open_weights(tmp_path / "file").model.config.image_size == (16, 16)
        bare = open_weights(tmp_path / "file", image_size=(8, 32), gelu="erf").model
        assert same(bare, weights.model)
        assert bare.config.image_size == (8, 32)


@pytest.mark.parametrize("format", ["timm", "mixlab-timm"])
def test_timms_folders_keep_the_fit_and_where_the_weights_come_from(format, tmp_path):
    weights = timm_sized(gelu="erf")
    preprocess = replace(weights.preprocess, fit="stretch", crop_fraction=1.0)
    weights = replace(weights, preprocess=preprocess)
    convert(weights, tmp_path / "folder", format=format)
    again = open_weights(tmp_path / "folder")
    assert again.preprocess == weights.preprocess
    assert again.provenance["converted_from"] == {"made": "by a test"}


@pytest.mark.parametrize("fit", ["crop", "stretch", "resize-crop"])
def test_timm_brings_pictures_to_the_input_as_the_converted_weights_do(fit, tmp_path):
    from timm.data import create_transform, resolve_data_config

    weights = timm_sized(image_size=(64, 64), gelu="erf")
    preprocess = replace(weights.preprocess, fit=fit, crop_fraction=0.8)  # 80 pixels cut to 64: no rounding
    convert(replace(weights, preprocess=preprocess), tmp_path / "folder", format="timm")
    config = json.loads((tmp_path / "folder" / "config.json").read_text())["pretrained_cfg"]
    y, x = np.mgrid[0:160, 0:240]
    waves = 128 + 60 * np.sin(x / 29) + 60 * np.cos(y / 23)
    picture = np.repeat(waves[..., None], 3, axis=2).astype(np.uint8)
    theirs = create_transform(**resolve_data_config(config))(Image.fromarray(picture))
    ours = preprocess.to_input(torch.from_numpy(preprocess.keep(picture))[None])[0]
    assert (ours - theirs).abs().max() < 0.02  # of [-1, 1]


def test_timms_squash_crops_and_older_folders_of_ours_do_not(tmp_path):
    weights = timm_sized(gelu="erf")
    convert(weights, tmp_path / "folder", format="timm")
    path = tmp_path / "folder" / "config.json"
    config = json.loads(path.read_text())
    config["pretrained_cfg"] |= {"crop_mode": "squash", "crop_pct": 0.875}
    for own, fit in ((None, "resize-crop"), ({}, "stretch"), ({"fit": "resize-crop"}, "resize-crop")):
        path.write_text(json.dumps(config | {"mixlab": own}))
        assert open_weights(tmp_path / "folder").preprocess.fit == fit
    path.write_text(json.dumps(config | {"mixlab": {"fit": "squeeze"}}))
    with pytest.raises(WeightsError, match="squeeze"):
        open_weights(tmp_path / "folder")


def test_a_destination_without_a_name_is_refused():
    with pytest.raises(UsageError, match="needs a name"):
        convert(random_weights(), Path(""))


@pytest.mark.parametrize("name", ["mixer_nano4", "mixer_pyramid_micro2"])
def test_half_the_size_keeps_every_weight_rounded_and_says_what_that_changes(name, tmp_path):
    size = {"image_size": (16, 16), "num_blocks": None} if "pyramid" in name else {}
    weights = random_weights(name=name, **size)
    result = convert(weights, tmp_path / "half", half=True)
    convert(weights, tmp_path / "whole")
    sizes = [(tmp_path / folder / "weights.safetensors").stat().st_size for folder in ("half", "whole")]
    assert sizes[0] < 0.6 * sizes[1]
    again = open_weights(tmp_path / "half").model
    for before, after in zip(weights.model.parameters(), again.parameters(), strict=True):
        assert after.dtype == torch.float32
        assert torch.equal(before.half().float(), after)
    images = torch.rand(16, 3, *weights.preprocess.image_size)
    change = result["change"]
    assert 0 < change["max_difference"] < 0.01 * change["largest_logit"]
    with torch.inference_mode():
        difference = (again(images) - weights.model(images)).abs().max()
    assert 0 < difference < 10 * change["max_difference"]


def test_half_is_for_our_own_format_and_for_weights_that_fit_into_it(tmp_path):
    weights = random_weights()
    with pytest.raises(UsageError, match="32-bit"):
        convert(weights, tmp_path / "mixer.npz", half=True)
    next(weights.model.parameters()).data[0] = 1e6
    with pytest.raises(WeightsError, match="65,504"):
        convert(weights, tmp_path / "half", half=True)
    assert not list(tmp_path.iterdir())


def test_a_flipped_bit_in_half_weights_is_found(tmp_path):
    convert(random_weights(), tmp_path / "half", half=True)
    path = tmp_path / "half" / "weights.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="damaged"):
        open_weights(tmp_path / "half")
