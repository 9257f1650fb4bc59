"""Layouts of other projects: told apart by keys and shapes, mapped to ours exactly, refused with what is wrong."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mixlab.checkpoint.layouts import LAYOUTS, LUCIDRAINS, MMPRETRAIN, OFFICIAL, OFFICIAL_OLD, TIMM
from mixlab.checkpoint.recognise import recognise
from mixlab.errors import UsageError, WeightsError
from mixlab.models.mixer import Mixer, MixerConfig

REFERENCE = Path(__file__).resolve().parents[3] / "shared" / "reference"
CONFIG = MixerConfig(
    image_size=(8, 12),
    patch_size=4,
    hidden_dim=10,
    token_mlp_dim=7,
    channel_mlp_dim=18,
    num_blocks=3,
    num_classes=5,
)


def reference(name: str) -> dict[str, np.ndarray]:
    path = REFERENCE / f"{name}.npz"
    if not path.exists():
        pytest.skip("the reference arrays ../shared/reference are not here")
    return dict(np.load(path))


def shapes_of(tensors) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in tensors.items()}


def as_ours(tensors) -> dict[str, torch.Tensor]:
    found = recognise(shapes_of(tensors), where="a file")
    return {
        name: found.layout.to_ours(name, torch.as_tensor(tensors[key]), found.shapes[name])
        for name, key in found.keys.items()
    }


def random_mixer(config: MixerConfig = CONFIG) -> Mixer:
    torch.manual_seed(0)
    model = Mixer(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


def in_layout(layout, model: Mixer) -> dict[str, torch.Tensor]:
    keys = layout.keys(model.config.num_blocks)
    return {keys[name]: layout.to_theirs(name, t).contiguous() for name, t in model.state_dict().items()}


def logits_of(tensors, image, *, gelu, eps) -> torch.Tensor:
    found = recognise(shapes_of(tensors), where="a file")
    assert (found.layout.gelu, found.layout.layer_norm_eps) == (gelu, eps)
    model = Mixer(found.config(tuple(image.shape[2:]), where="a file")).to(image.dtype).eval()
    model.load_state_dict(as_ours(tensors))
    return model(image)


@pytest.mark.parametrize("size", ["square16", "square32", "rect16x32"])
@pytest.mark.parametrize("old", ["weights_old", "weights_old_nested"])
def test_the_older_layouts_give_exactly_the_arrays_of_the_newer(size, old):
    if old == "weights_old_nested" and size != "square16":
        old = "weights_old"  # the nested file exists for one size
    new, old_arrays = reference(f"{size}/weights"), reference(f"{size}/{old}")
    assert recognise(shapes_of(new), where="").layout is OFFICIAL
    found = recognise(shapes_of(old_arrays), where="")
    assert found.layout is OFFICIAL_OLD
    assert found.ignored == (("opt/state/step",) if "nested" in old else ())
    expected, ours = as_ours(new), as_ours(old_arrays)
    assert set(expected) == set(ours)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_dimensions_follow_from_the_shapes_and_a_square_number_of_patches_means_a_square():
    sizes = json.loads((REFERENCE / "configs.json").read_text()) if REFERENCE.exists() else None
    config = recognise(shapes_of(reference("square32/weights")), where="").config(None, where="")
    for ours, theirs in {
        "hidden_dim": "hidden_dim",
        "token_mlp_dim": "tokens_mlp_dim",
        "channel_mlp_dim": "channels_mlp_dim",
        "num_blocks": "num_blocks",
        "num_classes": "num_classes",
        "patch_size": "patch_size",
    }.items():
        assert getattr(config, ours) == sizes["square32"][theirs]
    assert config.image_size == (32, 32)
    assert (config.gelu, config.layer_norm_eps) == ("tanh", 1e-6)


def test_another_number_of_patches_needs_the_shape_and_the_error_lists_the_possible_ones():
    found = recognise(shapes_of(in_layout(OFFICIAL, random_mixer())), where="x.npz")
    with pytest.raises(UsageError, match=r"4x24, 8x12, 12x8, 24x4"):
        found.config(None, where="x.npz")
    with pytest.raises(UsageError, match=r"8x12"):
        found.config((16, 16), where="x.npz")
    assert found.config((8, 12), where="x.npz") == CONFIG


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
def test_every_layout_maps_there_and_back_to_the_same_tensors(layout):
    model = random_mixer()
    tensors = in_layout(layout, model)
    assert len(tensors) == len(model.state_dict())
    found = recognise(shapes_of(tensors), where="")
    assert found.layout is layout
    ours = as_ours(tensors)
    assert all(torch.equal(ours[name], tensor) for name, tensor in model.state_dict().items())


def test_timms_own_model_computes_the_same():
    from timm.models.mlp_mixer import MlpMixer

    torch.manual_seed(0)
    theirs = MlpMixer(num_classes=5, img_size=(8, 12), patch_size=4, num_blocks=3, embed_dim=10).double()
    theirs.eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    image = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    assert set(theirs.state_dict()) == set(TIMM.keys(3).values())
    ours = logits_of(theirs.state_dict(), image, gelu="erf", eps=1e-6)
    assert (ours - theirs(image)).abs().max() < 1e-12


@pytest.mark.parametrize("expansions", [{}, {"expansion_factor": 0.5, "expansion_factor_token": 4}])
def test_lucidrains_own_model_computes_the_same_and_its_swapped_expansions_are_named(expansions):
    package = pytest.importorskip("mlp_mixer_pytorch")
    torch.manual_seed(0)
    theirs = package.MLPMixer(
        image_size=(8, 12), channels=3, patch_size=4, dim=10, depth=3, num_classes=5, **expansions
    )
    theirs.double().eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    image = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    assert set(theirs.state_dict()) == set(LUCIDRAINS.keys(3).values())
    ours = logits_of(theirs.state_dict(), image, gelu="erf", eps=1e-5)
    assert (ours - theirs(image)).abs().max() < 1e-12
    notes = " ".join(recognise(shapes_of(theirs.state_dict()), where="").notes)
    assert ("swapped" in notes) == (not expansions)
    assert "D_S is 40 and D_C 5" in notes or expansions


def test_mmpretrain_names_are_those_of_its_own_converter_from_timm():
    # The renaming of tools/model_converters/mlpmixer_to_mmpretrain.py, as its facts are recorded.
    renames = {
        "stem.proj": "backbone.patch_embed.projection",
        "norm.": "backbone.ln1.",
        "head.": "head.fc.",
    }
    inner = {
        "mlp_tokens.fc1": "token_mix.layers.0.0",
        "mlp_tokens.fc2": "token_mix.layers.1",
        "mlp_channels.fc1": "channel_mix.layers.0.0",
        "mlp_channels.fc2": "channel_mix.layers.1",
        "norm1": "ln1",
        "norm2": "ln2",
    }
    timm_keys, mm_keys = TIMM.keys(2), MMPRETRAIN.keys(2)
    for name, key in timm_keys.items():
        if key.startswith("blocks."):
            _, block, rest = key.split(".", 2)
            for old, new in inner.items():
                rest = rest.replace(old, new)
            assert mm_keys[name] == f"backbone.layers.{block}.{rest}"
        else:
            start = next(start for start in renames if key.startswith(start))
            assert mm_keys[name] == key.replace(start, renames[start], 1)


def test_missing_extra_and_misshapen_keys_are_named_with_the_shapes_that_are_expected():
    tensors = shapes_of(in_layout(OFFICIAL, random_mixer()))
    del tensors["MixerBlock_1/channel_mixing/Dense_1/kernel"]
    tensors["MixerBlock_2/LayerNorm_0/scale"] = (11,)
    tensors["MixerBlock_2/extra"] = (3,)
    with pytest.raises(WeightsError) as error:
        recognise(tensors, where="x.npz")
    text = str(error.value)
    assert "missing: MixerBlock_1/channel_mixing/Dense_1/kernel (18, 10)" in text
    assert "not expected: MixerBlock_2/extra (3,)" in text
    assert "MixerBlock_2/LayerNorm_0/scale: has (11,), needs (10,)" in text
    assert "3 blocks" in text
    assert "x.npz" in text


@pytest.mark.parametrize("key", ["stem.weight", "stem.bias", "head.bias", "blocks.0.token_mixing.fc1.bias"])
def test_a_missing_tensor_that_gives_the_dimensions_is_named(key):
    tensors = shapes_of(random_mixer().state_dict())
    del tensors[key]
    with pytest.raises(WeightsError, match=f"{key} is missing"):
        recognise(tensors, where="")


@pytest.mark.parametrize(
    "shape", [(10, 3, 4, 5), (10, 48), (10,), (), (0, 3, 4, 4), (10, 3, 0, 0), (10, 3, 4, 4, 1)]
)
def test_a_stem_that_is_none_is_refused(shape):
    tensors = shapes_of(random_mixer().state_dict())
    tensors["stem.weight"] = shape
    with pytest.raises(WeightsError, match=r"stem\.weight"):
        recognise(tensors, where="")


def test_other_models_are_told_from_mixers():
    import timm

    for name, word in {
        "resmlp_12_224": "ResMLP",
        "gmixer_12_224": "gMixer",
        "resnet10t": "known are",
    }.items():
        with torch.device("meta"):
            tensors = shapes_of(timm.create_model(name).state_dict())
        with pytest.raises(WeightsError, match=word):
            recognise(tensors, where="")
    with pytest.raises(WeightsError, match="0 in all"):
        recognise({}, where="")
