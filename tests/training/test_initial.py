"""Trainings that start from weights: every fit that `init_from` can ask for, seen before the first step."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import mixlab
from mixlab.checkpoint.convert import convert
from mixlab.checkpoint.open import open_weights
from mixlab.checkpoint.permute import permute_weights
from mixlab.checkpoint.store import Weights, save_weights
from mixlab.cpu.describe import describe_settings
from mixlab.data.images.preprocess import ImagePreprocess
from mixlab.errors import UsageError
from mixlab.models.catalog import create_model, settings_of
from mixlab.models.mixer import Mixer
from mixlab.models.resolution import extend, resample
from mixlab.training.initial import load_initial
from mixlab.training.optimizer import OptimizerConfig, build_optimizer, freeze_layers, layer_numbers
from mixlab.training.recipe import DataConfig, Recipe
from tests.training.seams import QUIET, TINY

COLOURS = ("blue", "green", "red")
# The first step of a warm-up has rate 0: after one step a run's weights are the ones that it started from.
ONE_STEP = {"steps": 1, "schedule__warmup_steps": 10, "ema_decay": 0.0, "threads": 1, "batch_size": 8}


@pytest.fixture(scope="module")
def colours(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data") / "colours"
    rng = np.random.default_rng(0)
    for number, name in enumerate(COLOURS):
        (root / name).mkdir(parents=True)
        for i in range(12):
            pixels = rng.integers(0, 120, (8, 12, 3))
            pixels[..., 2 - number] += 100
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{i:02}.png")
    return root


@pytest.fixture
def start(tmp_path) -> Path:
    """Weights of a small Mixer for 8 x 12 pixels of the three colours, every tensor drawn."""
    return write_weights(tmp_path / "start", COLOURS)


def write_weights(folder: Path, class_names: tuple[str, ...], *, channels: int = 3) -> Path:
    torch.manual_seed(5)
    model = create_model(
        "mixer_custom4", image_size=(8, 12), num_classes=len(class_names), in_channels=channels,
        num_blocks=2, hidden_dim=8, token_mlp_dim=5, channel_mlp_dim=7,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    preprocess = ImagePreprocess(
        image_size=(8, 12), channels=channels, mean=(0.4,) * channels, std=(0.3,) * channels
    )
    save_weights(
        folder,
        Weights(
            model=model,
            model_settings=settings_of(model.config),
            preprocess=preprocess,
            class_names=class_names,
            provenance={"source": "drawn"},
        ),
    )
    return folder


def train(data: Path, run: Path, start: Path, **options) -> dict:
    options = ONE_STEP | options
    return mixlab.train(
        str(data), "small_data", run=run, screen=QUIET, figures=False, init_from=str(start), **options
    )


def state(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "weights.safetensors")


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], but: str = "nothing"):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor) != name.startswith(but), name


def test_a_run_starts_from_exactly_the_weights_with_their_head_and_preprocessing(colours, start, tmp_path):
    train(colours, tmp_path / "run", start)
    assert_same(state(tmp_path / "run"), state(start))
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["preprocess"]["mean"] == [0.4] * 3
    assert config["preprocess"]["std"] == [0.3] * 3
    assert config["model"]["hidden_dim"] == 8


def test_other_classes_get_a_new_head_of_zeros(colours, tmp_path):
    start = write_weights(tmp_path / "start", ("a", "b", "c"))
    train(colours, tmp_path / "run", start)
    found = state(tmp_path / "run")
    assert_same(found, state(start), but="head")
    assert not found["head.weight"].any()


def test_another_image_size_and_patch_resample_the_weights(colours, start, tmp_path):
    model = open_weights(start).model
    train(colours, tmp_path / "run", start, image_size=(16, 20))
    assert_same(state(tmp_path / "run"), resample(model, (16, 20)).state_dict())
    train(colours, tmp_path / "patch", start, model__patch_size=2)
    assert_same(state(tmp_path / "patch"), resample(model, (8, 12), patch_size=2).state_dict())


@pytest.mark.parametrize("grid", ["dense", "blocks"])
def test_appendix_c_starts_as_the_mean_over_sub_images(grid, colours, start, tmp_path):
    train(colours, tmp_path / "run", start, image_size=(16, 24), init_grid=grid)
    found = open_weights(tmp_path / "run").model
    small = open_weights(start).model
    assert_same(found.state_dict(), extend(small, 2, sparse=grid == "blocks").state_dict())
    image = torch.randn(2, 3, 16, 24)
    parts = [small(image[:, :, y : y + 8, x : x + 12]) for y in (0, 8) for x in (0, 12)]
    assert (found(image) - torch.stack(parts).mean(dim=0)).abs().max() < 1e-5


def test_both_costs_of_an_extended_grid_are_said_whichever_is_taken(start):
    weights = open_weights(start)
    expected = {}
    for grid in ("dense", "blocks"):
        model = extend(weights.model, 2, sparse=grid == "blocks")
        expected[grid] = describe_settings(settings_of(model.config), batch_size=1)["macs"] / 1e9
    data = DataConfig(image_size=(16, 24))
    for grid in expected:
        recipe = Recipe(init_from="w", init_grid=grid, data=data)
        fitted = replace(weights, model=extend(weights.model, 2, sparse=grid == "blocks"))
        said = load_initial(fitted.model, fitted, recipe, COLOURS)
        assert f"{expected['dense']:.3g} GMACs as a dense matrix, {expected['blocks']:.3g} as blocks" in said
    assert expected["dense"] > expected["blocks"]


def test_colour_weights_read_grey_pictures_as_colour_with_equal_channels(tmp_path):
    start = write_weights(tmp_path / "start", ("dark", "light"))
    for name, level in (("dark", 50), ("light", 200)):
        (tmp_path / "grey" / name).mkdir(parents=True)
        for i in range(10):
            Image.new("L", (12, 8), level + i).save(tmp_path / "grey" / name / f"{i}.png")
    train(tmp_path / "grey", tmp_path / "run", start, data__channels=1)
    found, colour = open_weights(tmp_path / "run").model, open_weights(start).model
    image = torch.randn(2, 1, 8, 12)
    assert (found(image) - colour(image.expand(-1, 3, -1, -1))).abs().max() < 1e-5


def test_a_training_starts_from_foreign_files_and_from_a_timm_model(colours, start, tmp_path):
    convert(open_weights(start), tmp_path / "a.npz")
    train(colours, tmp_path / "run", tmp_path / "a.npz")
    assert_same(state(tmp_path / "run"), state(start))
    (tmp_path / "a.npz.json").unlink()  # now the file says neither its shape nor its classes
    train(colours, tmp_path / "bare", tmp_path / "a.npz", image_size=(8, 12))
    assert_same(state(tmp_path / "bare"), state(start), but="head")
    run = mixlab.train(str(colours), "small_data", run=tmp_path / "vit", screen=QUIET, figures=False,
                       model__name="timm/test_resnet", image_size=(32, 32), **ONE_STEP)["run"]  # fmt: skip
    train(colours, tmp_path / "vit2", Path(run), image_size=(32, 32))
    first, second = open_weights(run).model, open_weights(tmp_path / "vit2").model
    assert torch.equal(first.fc.weight, second.fc.weight)


def test_a_resumed_run_needs_the_weights_it_started_from_only_before_its_first_checkpoint(
    colours, start, tmp_path
):
    train(colours, tmp_path / "run", start, steps=4)
    before = state(tmp_path / "run")
    for file in start.iterdir():
        file.unlink()
    from mixlab import resume

    resume(tmp_path / "run", screen=QUIET, figures=False)
    assert_same(state(tmp_path / "run"), before)


def test_frozen_layers_keep_their_weights_and_the_others_do_not(colours, start, tmp_path):
    options = {"steps": 6, "schedule__warmup_steps": 0, "keep_weights": "last"}
    train(colours, tmp_path / "run", start, freeze=2, **options)
    found, first = state(tmp_path / "run"), state(start)
    for name in first:
        frozen = name.startswith(("stem", "blocks.0"))
        assert torch.equal(found[name], first[name]) == frozen, name
    train(colours, tmp_path / "probe", start, freeze=-1, **options)
    found = state(tmp_path / "probe")
    assert {n for n in first if not torch.equal(found[n], first[n])} == {"head.weight", "head.bias"}
    with pytest.raises(UsageError, match="3 layers below the head"):
        train(colours, tmp_path / "wrong", start, freeze=4)
    assert not (tmp_path / "wrong").exists()


def test_learning_rates_fall_by_layer_from_the_head(start):
    model = open_weights(start).model
    assert isinstance(model, Mixer)
    layers = layer_numbers(model)
    assert {layers["stem.weight"], layers["blocks.0.token_norm.bias"]} == {0, 1}
    assert layers["pre_head_norm.weight"] == layers["blocks.1.channel_mixing.fc2.bias"] == 2
    assert layers["head.bias"] == 3
    optimizer = build_optimizer(model, OptimizerConfig(lr=0.1, layer_decay=0.5))
    rates = {id(p): group["base_lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        assert rates[id(parameter)] == pytest.approx(0.1 * 0.5 ** (3 - layers[name]))
    freeze_layers(model, 1)
    optimizer = build_optimizer(model, OptimizerConfig(lr=0.1, layer_decay=0.5))
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(rates) - 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_grid": "dense", "image_size": (16, 20)}, "whole multiple of 8x12"),
        ({"init_grid": "blocks", "image_size": (16, 24), "model__patch_size": 2}, "whole multiple"),
        ({"model__name": "mixer_b16"}, "the weights are of mixer_custom4"),
        ({"model__hidden_dim": 16}, "hidden_dim 16 does not fit"),
        ({"image_size": (9, 12)}, "not a multiple of patch_size"),
    ],
)
def test_what_does_not_fit_is_said_before_a_run_is_made(options, message, colours, start, tmp_path):
    with pytest.raises(UsageError, match=message):
        train(colours, tmp_path / "run", start, **options)
    assert not (tmp_path / "run").exists()


def test_weights_that_are_not_there_or_named_without_need_are_said(colours, tmp_path):
    from mixlab.errors import WeightsError

    with pytest.raises(WeightsError, match="no such run"):
        train(colours, tmp_path / "run", tmp_path / "nothing")
    with pytest.raises(UsageError, match="none are named"):
        mixlab.train(
            str(colours), "small_data", run=tmp_path / "run", screen=QUIET, figures=False, init_grid="dense"
        )
    save_file({"x": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match="no known layout"):
        train(colours, tmp_path / "run", tmp_path / "x.safetensors")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("token_mixing", ["untied", "grouped", "blocks"])
def test_a_training_goes_on_from_any_variant_at_its_own_size(token_mixing, colours, tmp_path):
    groups = 1 if token_mixing == "untied" else 2
    options = ONE_STEP | TINY | {"image_size": (16, 16), "model__name": "mixer_pico4"}
    options |= {"model__token_groups": groups}
    run = mixlab.train(str(colours), "small_data", run=tmp_path / "one", screen=QUIET, figures=False,
                       model__token_mixing=token_mixing, **options)["run"]  # fmt: skip
    train(colours, tmp_path / "two", Path(run))
    assert_same(state(tmp_path / "two"), state(tmp_path / "one"))
    with pytest.raises(UsageError, match="plain Mixer"):
        train(colours, tmp_path / "three", Path(run), image_size=(32, 32))


def test_permuted_weights_neither_start_a_training_nor_change_their_size(colours, start, tmp_path):
    permuted, _ = permute_weights(open_weights(start), seed=1)
    save_weights(tmp_path / "permuted", permuted)
    with pytest.raises(UsageError, match="permuted images"):
        train(colours, tmp_path / "run", tmp_path / "permuted")
    with pytest.raises(UsageError, match="another size has other patches"):
        open_weights(tmp_path / "permuted", image_size=(16, 24))


def test_a_model_that_only_the_recipe_named_gives_way_to_the_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ONE_STEP | {"image_size": (8, 8), "data__channels": 1, "batch_size": 64}
    mixlab.train(
        "digits", "digits", run="first", screen=QUIET, figures=False, model__patch_size=4, **(options | TINY)
    )
    for name, more in (("same", {}), ("patch", {"model__patch_size": 2}), ("dense", {"init_grid": "dense"})):
        size = {"image_size": (16, 16)} if name == "dense" else {}
        result = mixlab.train("digits", "digits", run=name, screen=QUIET, figures=False, init_from="first",
                              **options | size | more)  # fmt: skip
        assert result["steps"] == 1  # the name of a run under ./runs is enough
    assert (
        open_weights("dense").model.config.token_mlp_dim
        == 4 * open_weights("first").model.config.token_mlp_dim
    )
    with pytest.raises(UsageError, match="the recipe's model is mixer_nano4"):
        mixlab.train("digits", "digits", run="x", screen=QUIET, figures=False, init_from="first",
                     model__name="mixer_nano4", **options)  # fmt: skip


def test_gelu_and_epsilon_can_be_set_back_to_the_authors(colours, start, tmp_path):
    weights = open_weights(start, gelu="erf", layer_norm_eps=1e-5)
    convert(weights, tmp_path / "a.pth", format="mmpretrain")
    train(colours, tmp_path / "kept", tmp_path / "a.pth")
    train(colours, tmp_path / "set", tmp_path / "a.pth", model__gelu="tanh", model__layer_norm_eps=1e-6)
    for name, expected in (("kept", ("erf", 1e-5)), ("set", ("tanh", 1e-6))):
        config = open_weights(tmp_path / name).model.config
        assert (config.gelu, config.layer_norm_eps) == expected


def test_timms_classifiers_get_a_new_head_whatever_they_are_called(colours, tmp_path):
    options = ONE_STEP | {"image_size": (32, 32)}
    renamed = tmp_path / "renamed"
    for name, other in zip(COLOURS, ("x", "y", "z"), strict=True):
        shutil.copytree(colours / name, renamed / other)
    run = mixlab.train(str(colours), "small_data", run=tmp_path / "one", screen=QUIET, figures=False,
                       model__name="timm/test_convnext", **options | {"steps": 3})["run"]  # fmt: skip
    train(renamed, tmp_path / "two", Path(run), image_size=(32, 32))
    first, second = open_weights(run).model, open_weights(tmp_path / "two").model
    assert torch.equal(first.stem[0].weight, second.stem[0].weight)
    assert not torch.equal(first.head.fc.weight, second.head.fc.weight)


def test_frozen_running_statistics_stay(colours, tmp_path):
    options = ONE_STEP | {"image_size": (32, 32)}
    run = mixlab.train(str(colours), "small_data", run=tmp_path / "one", screen=QUIET, figures=False,
                       model__name="timm/test_resnet", **options)["run"]  # fmt: skip
    train(colours, tmp_path / "two", Path(run), image_size=(32, 32), freeze=1, steps=4, keep_weights="last")
    first, second = state(tmp_path / "one"), state(tmp_path / "two")
    stem = [name for name in first if name.startswith(("conv1", "bn1"))]
    assert any("running_mean" in name for name in stem)
    assert all(torch.equal(first[name], second[name]) for name in stem)
    assert not torch.equal(first["layer1.0.bn1.running_mean"], second["layer1.0.bn1.running_mean"])


def test_muon_takes_matrices_and_never_biases():
    model = create_model("mixer_pico4", image_size=16, num_classes=3, token_mixing="untied")
    optimizer = build_optimizer(model, OptimizerConfig(name="muon"))
    kind = {id(p): g.get("orthogonal", False) for g in optimizer.param_groups for p in g["params"]}
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    for name, parameter in model.named_parameters():
        if "bias" in name:
            assert not kind[id(parameter)]
            assert decay[id(parameter)] == 0
    assert kind[id(model.blocks[0].channel_mixing.fc1.weight)]
