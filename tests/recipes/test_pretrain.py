"""The big recipes: every number against the authors', and twenty real steps of each on tiny images.

The numbers are written down from google-research/big_vision 0127fb6 (configs/mlp_mixer_i1k.py, vit_i21k.py,
proj/gsam/vit_i1k_gsam_no_aug.py; utils.py; optax.py; models/mlp_mixer.py), google-research/vision_transformer c6de1e5
(configs/common.py) and the paper's Table 4.
"""

import inspect
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import mixlab
from mixlab.checkpoint.layouts import OFFICIAL
from mixlab.data import mixing
from mixlab.data.images.modality import IMAGES
from mixlab.data.images.policy_tf import argument
from mixlab.data.mixing import mix
from mixlab.models.catalog import create_model
from mixlab.recipes import RECIPES, find_recipe
from mixlab.report.run_log import read_run_log
from mixlab.report.screen import Screen
from mixlab.training.keys import from_toml, override
from mixlab.training.losses import loss_per_batch
from mixlab.training.optimizer import build_optimizer, decays
from mixlab.training.recipe import Recipe
from mixlab.training.schedule import lr_factor
from mixlab.training.setup import build_preprocess, model_settings

SCHEDULES = Path(__file__).resolve().parents[3] / "shared" / "reference" / "training" / "schedules.json"
QUIET = Screen(quiet=True)
PRETRAINING = [
    "pretrain_imagenet1k",
    "pretrain_imagenet21k",
    "pretrain_imagenet1k_sam",
    "pretrain_imagenet1k_gsam",
]


def settings(recipe: Recipe) -> dict:
    """Every key of a recipe, dotted."""
    flat = {}
    for key, value in vars(recipe).items():
        inner = vars(value) if hasattr(value, "__dataclass_fields__") else None
        flat |= {key: value} if inner is None else {f"{key}.{name}": v for name, v in inner.items()}
    return flat


# What all pre-training of the authors has in common.
COMMON = {
    "model.name": "mixer_b16",  # config.model.variant
    "data.image_size": (224, 224),
    "data.crop_fraction": 224 / 256,  # resize_small(256)|central_crop(224)
    "data.interpolation": "bilinear",
    "augment.crop": "inception",  # decode_jpeg_and_inception_crop(224), whose area_min is 5
    "augment.min_area": 0.05,
    "augment.flip": True,  # flip_lr
    "loss.name": "sigmoid",  # config.loss
    "loss.label_smoothing": 0.0,
    "optimizer.name": "adamw",  # scale_by_adam, of which the betas and epsilon are optax's defaults
    "optimizer.beta1": 0.9,
    "optimizer.beta2": 0.999,
    "optimizer.eps": 1e-8,
    "optimizer.grad_clip_norm": 1.0,
    "optimizer.layer_decay": 1.0,
    "schedule.decay": "linear",
    "schedule.warmup_steps": 10_000,
    "batch_size": 4096,
    "keep_weights": "last",
    "ema_decay": 0.0,
    "augment.cutmix_alpha": 0.0,
    "augment.erase_prob": 0.0,
}
TABLE_4 = {
    "augment.policy": "randaugment_tf",  # randaug(2, 15)
    "augment.policy_layers": 2,
    "augment.policy_magnitude": 15.0,
    "augment.mixup_alpha": 0.5,
    "model.stochastic_depth": 0.1,
    "model.head_bias": -6.9,
    "optimizer.lr": 1e-3,
    "optimizer.weight_decay": 0.1,
    "schedule.end_factor": 1e-5,
    "optimizer.sam_rho": 0.0,
    "steps": 92_897,
}
GSAM = {
    "augment.policy": "none",
    "augment.mixup_alpha": 0.0,
    "model.stochastic_depth": 0.0,
    "model.head_bias": -10.0,
    "optimizer.lr": 3e-3,
    "optimizer.weight_decay": 0.3,
    "schedule.end_factor": 0.01,
    "optimizer.sam_rho": 0.5,
    "optimizer.sam_rho_end": 0.2,
    "optimizer.gsam_alpha": 0.01,
    "steps": 92_897,
}
EXPECTED = {
    "pretrain_imagenet1k": COMMON | TABLE_4,
    "pretrain_imagenet21k": COMMON
    | TABLE_4
    | {"augment.policy_magnitude": 10.0, "augment.mixup_alpha": 0.2, "model.head_bias": -10.0}
    | {"steps": None, "epochs": 300},
    "pretrain_imagenet1k_gsam": COMMON | GSAM,
    "pretrain_imagenet1k_sam": COMMON | GSAM | {"optimizer.sam_rho_end": None, "optimizer.gsam_alpha": 0.0},
    "finetune": {
        "optimizer.name": "sgd",
        "optimizer.lr": 0.03,  # base_lr
        "optimizer.momentum": 0.9,
        "optimizer.momentum_dtype": "bf16",  # optim_dtype
        "optimizer.weight_decay": 0.0,
        "optimizer.grad_clip_norm": 1.0,
        "schedule.decay": "cosine",
        "schedule.warmup_steps": 500,
        "loss.name": "softmax",
        "augment.crop": "inception",  # area_range=(0.05, 1.0)
        "augment.min_area": 0.05,
        "augment.flip": True,
        "augment.policy": "none",
        "augment.mixup_alpha": 0.0,
        "data.val_fraction": pytest.approx(0.02),  # train[:98%]
        "data.image_size": None,
        "model.stochastic_depth": 0.0,
        "model.head_bias": 0.0,
        "batch_size": 512,
        "accumulate": 8,
        "steps": 10_000,
    },
}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_recipe_has_the_authors_settings(name):
    recipe = find_recipe(name)
    assert recipe.name == name
    found = settings(recipe)
    assert {key: found[key] for key in EXPECTED[name]} == EXPECTED[name]


def comment_above(function) -> str:
    """One line of text."""
    return " ".join(line.removeprefix("#").strip() for line in inspect.getcomments(function).splitlines())


def told(name: str) -> list[dict[str, str]]:
    """The options that the comment above a recipe gives for other models and sets."""
    found = []
    for text in re.findall(r"`(--[^`]+)`", comment_above(RECIPES[name].build)):
        words = text.split()
        found.append({k[2:].replace("-", "_"): v for k, v in zip(words[::2], words[1::2], strict=True)})
    return found


def test_the_options_in_comments_are_keys_and_give_the_other_rows_of_the_authors_tables():
    made = {name: [override(find_recipe(name), options) for options in told(name)] for name in EXPECTED}
    large = made["pretrain_imagenet21k"][0]
    assert (large.model.name, large.augment.policy_magnitude, large.augment.mixup_alpha) == (
        "mixer_l16", 20.0, 0.5,
    )  # fmt: skip
    small = made["pretrain_imagenet1k_gsam"][0]
    assert (small.model.name, small.optimizer.sam_rho_end, small.optimizer.gsam_alpha) == (
        "mixer_s16", 0.0, 0.6,
    )  # fmt: skip
    assert [(r.steps, r.schedule.warmup_steps, r.data.val_fraction) for r in made["finetune"]] == [
        (10_000, 500, 0.0), (20_000, 500, 0.01), (500, 100, 0.1),
    ]  # fmt: skip
    assert made["pretrain_imagenet1k_sam"][0].virtual_shards == 64


def authors_factor(step: int, total: int, warmup: int, decay: str, end: float) -> float:
    """create_learning_rate_schedule of their utils.py, for a base of 1."""
    progress = min(max((step - warmup) / (total - warmup), 0.0), 1.0)
    rate = (
        end + (1.0 - end) * (1.0 - progress)
        if decay == "linear"
        else 0.5 * (1 + math.cos(math.pi * progress))
    )
    return rate * min(1.0, step / warmup)


@pytest.mark.parametrize(("name", "end"), [("pretrain_imagenet1k", 1e-5), ("pretrain_imagenet1k_gsam", 0.01)])
def test_the_learning_rate_of_pre_training_is_theirs_at_every_step(name, end):
    recipe = find_recipe(name)
    ours = [lr_factor(step, recipe.steps, recipe.schedule) for step in range(recipe.steps + 1)]
    theirs = [authors_factor(step, 92_897, 10_000, "linear", end) for step in range(recipe.steps + 1)]
    assert np.abs(np.array(ours) - theirs).max() < 1e-12
    assert ours[0] == 0
    assert ours[10_000] == 1
    assert ours[-1] == pytest.approx(end)


def test_the_learning_rate_of_fine_tuning_is_theirs_at_every_step():
    recipe = find_recipe("finetune")
    ours = [lr_factor(step, recipe.steps, recipe.schedule) for step in range(recipe.steps + 1)]
    theirs = [authors_factor(step, 10_000, 500, "cosine", 0.0) for step in range(recipe.steps + 1)]
    assert np.abs(np.array(ours) - theirs).max() < 1e-12


def test_the_learning_rates_are_those_that_the_authors_code_computed():
    if not SCHEDULES.exists():
        pytest.skip("the reference arrays ../shared/reference are not here")
    reference = json.loads(SCHEDULES.read_text())["schedules"]
    pretraining, tuning = reference["big_vision"][0], reference["vision_transformer"][0]
    assert pretraining["note"].startswith("Mixer ImageNet-1k recipe")
    for case, name, rates in (
        (pretraining, "pretrain_imagenet1k", "effective_lr"),
        (tuning, "finetune", "lr"),
    ):
        recipe = find_recipe(name)
        assert case["total_steps"] == recipe.steps
        ours = [recipe.optimizer.lr * lr_factor(step, recipe.steps, recipe.schedule) for step in case["step"]]
        assert ours == pytest.approx(case[rates], abs=1e-6 * recipe.optimizer.lr)


def test_depths_are_dropped_as_often_as_by_the_authors():
    if not SCHEDULES.exists():
        pytest.skip("the reference arrays ../shared/reference are not here")
    cases = json.loads(SCHEDULES.read_text())["stochastic_depth"]
    theirs = next(
        case["drop_prob"] for case in cases if (case["num_blocks"], case["stoch_depth"]) == (12, 0.1)
    )
    with torch.device("meta"):
        model = create_model(**model_settings(in_colour(find_recipe("pretrain_imagenet1k")), 1000))
    assert [block.drop.drop_prob for block in model.blocks] == pytest.approx(theirs, abs=1e-12)


def in_colour(recipe: Recipe) -> Recipe:
    return replace(recipe, data=replace(recipe.data, channels=3))


def test_weight_decay_is_theirs_for_the_kernels_and_none_for_the_rest():
    recipe = find_recipe("pretrain_imagenet1k")
    with torch.device("meta"):
        model = create_model(**model_settings(in_colour(recipe), 1000))
    keys = OFFICIAL.keys(12)
    for name, parameter in model.named_parameters():
        assert decays(name, parameter) == keys[name].endswith("/kernel"), name  # their wd_mults
    # Theirs takes 1e-4 of a weight away at the full rate, ours the learning rate times the decay.
    groups = build_optimizer(model, recipe.optimizer).param_groups
    assert [group["base_lr"] * group["weight_decay"] for group in groups] == pytest.approx([1e-4, 0.0])
    gsam = find_recipe("pretrain_imagenet1k_gsam").optimizer
    assert gsam.lr * gsam.weight_decay == pytest.approx(0.3 * 0.003)  # "paper used 0.3, effective wd=0.3*lr"


def test_a_fresh_model_says_one_class_in_a_thousand():
    recipe = in_colour(find_recipe("pretrain_imagenet1k"))
    model = create_model(**model_settings(replace(recipe, model=replace(recipe.model, num_blocks=1)), 1000))
    logits = model(torch.zeros(2, 3, 224, 224))
    assert torch.equal(logits, torch.full((2, 1000), -6.9))
    target = torch.nn.functional.one_hot(torch.tensor([3, 7]), 1000).float()
    # Their sigmoid_xent: summed over classes, mean over images.
    theirs = -(math.log(1 / (1 + math.exp(6.9))) + 999 * math.log(1 / (1 + math.exp(-6.9))))
    assert loss_per_batch(logits, target, recipe.loss).item() == pytest.approx(theirs, rel=1e-4)


def test_pixels_are_evaluated_on_the_authors_crop_and_scale():
    preprocess = build_preprocess(in_colour(find_recipe("pretrain_imagenet1k")), IMAGES)
    # Shorter side 256, centre 224: of 512 x 1024 the middle 448 x 448.
    assert preprocess.box(512, 1024) == (288.0, 32.0, 736.0, 480.0)
    scaled = preprocess.to_input(
        torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2).expand(1, 3, 1, 2)
    )
    assert scaled[0, 0, 0].tolist() == pytest.approx([-1.0, 1.0])  # value_range(-1, 1)


def test_randaugments_strengths_are_theirs_for_the_recipes_magnitude():
    magnitude = find_recipe("pretrain_imagenet1k").augment.policy_magnitude
    # Their level_to_arg at 15: the threshold of 384 is compared with bytes, as 128.
    theirs = {
        "rotate": 45.0, "shear_x": 0.45, "shear_y": 0.45, "translate_x": 150.0, "translate_y": 150.0, "cutout": 60,
        "posterize": 6, "solarize": 384 % 256, "solarize_add": 165, "color": 2.8, "contrast": 2.8,
        "brightness": 2.8, "sharpness": 2.8,
    }  # fmt: skip
    assert {name: argument(name, magnitude) for name in theirs} == pytest.approx(theirs)


def test_mixup_draws_as_the_authors_do(monkeypatch):
    # get_mixup(rng, p): a ~ Beta(p, p), a = max(a, 1 - a), a * x + (1 - a) * roll(x, 1), for images and labels.
    config = find_recipe("pretrain_imagenet1k").augment
    image, label = torch.randn(5, 3, 4, 4), torch.tensor([2, 0, 1, 1, 2])
    one_hot = np.eye(3)[label.numpy()]
    given = torch.from_numpy(one_hot).float()
    asked = []

    def beta(alpha, seed):
        asked.append(alpha)
        return 0.3

    with monkeypatch.context() as patch:
        patch.setattr(mixing, "_beta", beta)
        mixed, target = mix(image, given, config, seed=0, step=0, shard=0)
    assert asked == [0.5]
    theirs = 0.7 * image.numpy() + (1 - 0.7) * np.roll(image.numpy(), 1, axis=0)
    assert mixed.numpy() == pytest.approx(theirs, abs=1e-6)
    assert target.numpy() == pytest.approx(0.7 * one_hot + (1 - 0.7) * np.roll(one_hot, 1, axis=0), abs=1e-6)
    shares = [float(mix(image, given, config, seed=0, step=step, shard=0)[1][1, 0]) for step in range(3000)]
    # The mean of max(a, 1 - a) for Beta(1/2, 1/2) is 1/2 + 1/pi.
    assert np.mean(shares) == pytest.approx(0.5 + 1 / math.pi, abs=0.01)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Sixty images of three colours, 20 x 26 pixels."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number, name in enumerate(("blue", "green", "red")):
        (root / name).mkdir()
        for i in range(20):
            pixels = rng.integers(0, 120, (20, 26, 3))
            pixels[..., 2 - number] += 100
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{i:03}.png")
    return root


TINY = {"hidden_dim": 16, "token_mlp_dim": 8, "channel_mlp_dim": 32, "num_blocks": 2, "patch_size": 4}


@pytest.mark.parametrize(
    "name", [PRETRAINING[0], *(pytest.param(name, marks=pytest.mark.slow) for name in PRETRAINING[1:])]
)
def test_twenty_steps_of_pre_training_on_tiny_pictures(name, pictures, tmp_path):
    whole = find_recipe(name)
    tiny = replace(
        whole,
        data=replace(whole.data, image_size=(16, 16)),
        model=replace(whole.model, **TINY),
        batch_size=16,
        steps=20,
        epochs=None,
    )
    mixlab.train(str(pictures), tiny, run=tmp_path / "run", screen=QUIET, figures=False, with_pictures=False)
    rows = [row for row in read_run_log(tmp_path / "run" / "metrics.jsonl") if row["event"] == "train"]
    assert [row["step"] for row in rows] == list(range(1, 21))
    bias, target_sum, num_classes = tiny.model.head_bias, 1.0, 3
    first = num_classes * math.log1p(math.exp(bias)) - bias * target_sum
    assert rows[0]["loss"] == pytest.approx(first, rel=1e-5)  # before anything is learnt, mixed or not
    assert all(math.isfinite(row["loss"]) for row in rows)
    assert [row["lr"] for row in rows] == pytest.approx(
        [tiny.optimizer.lr * step / 10_000 for step in range(20)], abs=1e-12
    )
    assert rows[-1]["loss"] < rows[0]["loss"]  # even at two thousandths of the rate
    resolved = override(Recipe(), from_toml(tmp_path / "run" / "recipe.toml"))
    changed = {key for key, value in settings(resolved).items() if settings(whole)[key] != value}
    assert changed == {
        "data.source", "data.image_size", "data.channels", "data.in_memory", "data.num_workers", "batch_size",
        "threads", "steps", *(f"model.{key}" for key in TINY),
    } | ({"epochs"} if whole.epochs else set())  # fmt: skip


def test_twenty_steps_of_fine_tuning_at_another_resolution(pictures, tmp_path):
    first = replace(
        find_recipe("small_data"), data=replace(find_recipe("small_data").data, image_size=(16, 16)), steps=3
    )
    first = replace(
        first, epochs=None, batch_size=16, model=replace(first.model, name="mixer_micro4", **TINY)
    )
    mixlab.train(
        str(pictures), first, run=tmp_path / "first", screen=QUIET, figures=False, with_pictures=False
    )
    whole = find_recipe("finetune")
    tiny = replace(whole, batch_size=16, steps=20, init_from=str(tmp_path / "first"))
    tiny = replace(tiny, data=replace(tiny.data, image_size=(24, 16), val_fraction=0.1))
    mixlab.train(str(pictures), tiny, run=tmp_path / "run", screen=QUIET, figures=False, with_pictures=False)
    rows = [row for row in read_run_log(tmp_path / "run" / "metrics.jsonl") if row["event"] == "train"]
    assert len(rows) == 20
    assert [row["lr"] for row in rows] == pytest.approx([0.03 * step / 500 for step in range(20)], abs=1e-12)
    assert all(math.isfinite(row["loss"]) for row in rows)
    weights = load_file(tmp_path / "run" / "weights.safetensors")
    assert weights["blocks.0.token_mixing.fc1.weight"].shape == (8, 24)  # 6 x 4 patches instead of 4 x 4
