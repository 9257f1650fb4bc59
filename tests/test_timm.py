"""The Mixer family inside timm: timm's own functions find, build, load, change and group it."""

import json

import pytest
import timm
import timm.optim
import torch
from safetensors.torch import save_file

import mixlab.timm
from mixlab.models.catalog import MODELS, create_model
from mixlab.models.mixer import Mixer

SMALL = {"num_classes": 7, "img_size": (16, 24), "num_blocks": 3}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def randomised(model):
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def test_every_size_is_registered_with_the_papers_counts():
    flat = {f"mixlab_{name}" for name in MODELS if "pyramid" not in name}
    assert set(timm.list_models("mixlab_*")) == flat
    with torch.device("meta"):
        model = timm.create_model("mixlab_mixer_h14")
    assert sum(parameter.numel() for parameter in model.parameters()) == 432_350_952


def test_it_is_the_same_model_with_the_authors_gelu():
    theirs = randomised(timm.create_model("mixlab_mixer_nano4", **SMALL))
    ours = create_model("mixer_nano4", num_classes=7, image_size=(16, 24), num_blocks=3).eval()
    ours.load_state_dict(theirs.state_dict())
    image = torch.randn(2, 3, 16, 24)
    assert torch.equal(theirs(image), ours(image))
    assert theirs.config.gelu == "tanh"
    assert timm.create_model("mixlab_mixer_nano4", gelu="erf").config.gelu == "erf"
    assert timm.create_model("mixlab_mixer_nano4", drop_path_rate=0.2).config.stochastic_depth == 0.2


def test_timms_interface_is_there():
    model = randomised(timm.create_model("mixlab_mixer_nano4", **SMALL))
    image = torch.randn(2, 3, 16, 24)
    features = model.forward_features(image)
    assert features.shape == (2, 24, 128)
    assert torch.equal(model.forward_head(features), model(image))
    assert torch.equal(model.forward_head(features, pre_logits=True), Mixer.features(model, image))
    assert model.get_classifier() is model.head
    assert (model.num_features, model.head_hidden_size, model.num_classes) == (128, 128, 7)
    model.reset_classifier(0)
    assert model(image).shape == (2, 128)
    model.reset_classifier(3)
    assert model(image).shape == (2, 3)
    assert timm.create_model("mixlab_mixer_nano4", num_classes=0)(torch.zeros(1, 3, 32, 32)).shape == (1, 128)
    model.set_grad_checkpointing()
    assert model.checkpoint_blocks
    with pytest.raises(ValueError, match="mean"):
        timm.create_model("mixlab_mixer_nano4", global_pool="max")


def test_timm_knows_how_to_preprocess_for_it_and_in_which_order_its_layers_stand():
    model = timm.create_model("mixlab_mixer_s32")
    facts = timm.data.resolve_data_config(model=model)
    assert (facts["mean"], facts["crop_pct"], facts["interpolation"]) == ((0.5, 0.5, 0.5), 0.875, "bicubic")
    assert facts["input_size"] == (3, 224, 224)
    groups = timm.optim.param_groups_layer_decay(model, layer_decay=0.5)
    scales = {group["lr_scale"] for group in groups}
    assert scales == {0.5**n for n in range(10)}  # the stem, eight blocks, the head


@pytest.mark.parametrize("reader", ["timm", "transformers"])
def test_a_local_folder_is_loaded_exactly(reader, tmp_path):
    model = randomised(timm.create_model("mixlab_mixer_nano4", **SMALL))
    config = {
        "architecture": "mixlab_mixer_nano4",
        "num_classes": 7,
        "num_features": 128,
        "model_args": {"img_size": [16, 24], "num_blocks": 3, "gelu": "tanh"},
        "pretrained_cfg": {
            "input_size": [3, 16, 24],
            "num_classes": 7,
            "first_conv": "stem",
            "classifier": "head",
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    image = torch.randn(2, 3, 16, 24)
    if reader == "timm":
        again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        assert isinstance(again, mixlab.timm.TimmMixer)
        assert torch.equal(again(image), model(image))
        return
    transformers = pytest.importorskip("transformers")
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(again(image).logits, model(image))


@pytest.mark.parametrize("options", [{"token_mixing": "untied"}, {"drop_rate": 0.1}])
def test_what_it_would_not_do_is_refused(options):
    with pytest.raises(ValueError, match=r"token mixing|drop_rate"):
        timm.create_model("mixlab_mixer_s32", **options)
    assert timm.create_model("mixlab_mixer_s32", drop_rate=0.0, num_classes=3, img_size=32).num_classes == 3
