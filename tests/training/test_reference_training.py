"""Schedules and whole optimizer trajectories through the real training step, against the authors' own."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mixlab.checkpoint.open import open_weights
from mixlab.data.loader import Batch
from mixlab.training import step as step_module
from mixlab.training.clock import Clock
from mixlab.training.losses import LossConfig
from mixlab.training.objectives.labels import Labels
from mixlab.training.optimizer import OptimizerConfig
from mixlab.training.recipe import Recipe
from mixlab.training.schedule import ScheduleConfig, lr_factor
from mixlab.training.step import TrainState, train_step

REFERENCE = Path(__file__).resolve().parents[3] / "shared" / "reference"
NOISE = "token_mixing.fc2.bias"  # its true gradient is zero: Adam makes steps of rounding noise
NORM = torch.nn.utils.get_total_norm


@pytest.fixture(autouse=True)
def _needs_reference():
    if not REFERENCE.exists():
        pytest.skip("the reference arrays ../shared/reference are not here")


def test_fine_tuning_rates_are_vision_transformers_at_every_published_step():
    cases = json.loads((REFERENCE / "training" / "schedules.json").read_text())["schedules"]
    assert cases["vision_transformer"]
    for case in cases["vision_transformer"]:
        config = ScheduleConfig(
            decay=case["decay_type"],
            warmup_steps=case["warmup_steps"],
            # There the end is a rate, here a factor of the base rate.
            end_factor=case.get("linear_end", 0.0) / case["base"],
        )
        ours = [lr_factor(step, case["total_steps"], config) for step in case["step"]]
        assert ours == pytest.approx([lr / case["base"] for lr in case["lr"]], abs=1e-6)


def follow(
    name: str,
    dtype: torch.dtype,
    optimizer: OptimizerConfig,
    schedule: ScheduleConfig,
    loss: str,
    monkeypatch,
):
    """Run our step on the authors' weights and batch; what we saw, and what they did."""
    expected = np.load(REFERENCE / "training" / f"{name}.npz")
    settings = json.loads(str(expected["settings"]))
    batch = np.load(REFERENCE / "square16" / "batch.npz")
    model = open_weights(REFERENCE / "square16" / "weights.npz").model.to(dtype).train()
    recipe = Recipe(
        optimizer=optimizer,
        schedule=schedule,
        loss=LossConfig(name=loss),
        steps=settings["total_steps"],
        batch_size=len(batch["labels"]),
    )
    image = torch.from_numpy(batch["images"].transpose(0, 3, 1, 2).copy()).to(dtype)
    images = Batch(image, torch.from_numpy(batch["labels"]), np.arange(len(image)))
    norms = []

    def note_norm(gradients):
        norm = NORM(gradients)
        norms.append(float(norm))
        return norm

    monkeypatch.setattr(step_module.nn.utils, "get_total_norm", note_norm)
    state = TrainState(model, recipe, Labels(recipe.loss, batch["labels"], 10), torch.device("cpu"))
    losses, sizes = [], []
    for number in range(settings["steps"]):
        losses.append(train_step(state, images, Clock(state.recipe.steps, step=number)).loss)
        sizes.append(float(torch.sqrt(sum(p.detach().double().square().sum() for p in model.parameters()))))
    return model, {"loss": losses, "grad_norm": norms, "param_norm": sizes}, expected


def assert_parameters(model, expected, tolerance, *, skip=()):
    from mixlab.checkpoint.layouts import OFFICIAL

    compared = 0
    for name, key in OFFICIAL.keys(3).items():
        if name.endswith(skip) if skip else False:
            continue
        ours = model.state_dict()[name].double()
        theirs = OFFICIAL.to_ours(
            name, torch.from_numpy(expected[f"param/{key}"]), tuple(ours.shape)
        ).double()
        assert (ours - theirs).abs().max() <= tolerance, name
        compared += 1
    assert compared >= 30


@pytest.mark.parametrize(
    ("dtype", "param_tolerance", "loss_tolerance"), [(torch.float32, 5e-6, 1e-5), (torch.float64, 1e-6, 1e-6)]
)
def test_pretraining_follows_the_authors_adam(dtype, param_tolerance, loss_tolerance, monkeypatch):
    # Their weight decay of 0.01 is not multiplied by the learning rate of 1e-3; ours is, so it is 10 here.
    model, ours, theirs = follow(
        "adam_pretrain",
        dtype,
        OptimizerConfig(name="adamw", lr=1e-3, weight_decay=10.0, grad_clip_norm=1.0),
        ScheduleConfig(decay="linear", warmup_steps=4, end_factor=1e-5),
        "sigmoid",
        monkeypatch,
    )
    assert ours["loss"] == pytest.approx(theirs["loss"].tolist(), abs=loss_tolerance)
    assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"].tolist(), rel=1e-5)
    assert ours["param_norm"] == pytest.approx(theirs["param_norm"].tolist(), rel=1e-6)
    assert_parameters(model, theirs, param_tolerance, skip=(NOISE,))


@pytest.mark.parametrize(
    ("dtype", "param_tolerance", "loss_tolerance"), [(torch.float32, 5e-6, 1e-5), (torch.float64, 1e-6, 1e-6)]
)
def test_fine_tuning_follows_the_authors_sgd(dtype, param_tolerance, loss_tolerance, monkeypatch):
    model, ours, theirs = follow(
        "sgd_finetune",
        dtype,
        OptimizerConfig(name="sgd", lr=0.03, weight_decay=0.0, momentum=0.9, grad_clip_norm=1.0),
        ScheduleConfig(decay="cosine", warmup_steps=4),
        "softmax",
        monkeypatch,
    )
    assert ours["loss"] == pytest.approx(theirs["loss"].tolist(), abs=loss_tolerance)
    assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"].tolist(), rel=1e-5)
    assert_parameters(model, theirs, param_tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fine_tuning_as_published_keeps_its_momentum_in_bfloat16(dtype, monkeypatch):
    schedule = ScheduleConfig(decay="cosine", warmup_steps=4)
    differences = {}
    for kept in ("bf16", "fp32"):
        config = OptimizerConfig(
            name="sgd", lr=0.03, weight_decay=0.0, grad_clip_norm=1.0, momentum_dtype=kept
        )
        _, ours, theirs = follow(
            "sgd_finetune_bf16_momentum", dtype, config, schedule, "softmax", monkeypatch
        )
        differences[kept] = np.abs(np.array(ours["loss"]) - theirs["loss"]).max()
    assert differences["bf16"] <= 1e-5  # the reference asks for 1e-3
    assert differences["fp32"] > 1e-3


def test_bfloat16_momentum_survives_a_checkpoint_to_the_bit():
    def steps(state, numbers):
        for number in numbers:
            torch.manual_seed(number)
            images = Batch(torch.randn(4, 3, 16, 16), torch.arange(4), np.arange(4))
            train_step(state, images, Clock(state.recipe.steps, step=number))

    config = OptimizerConfig(name="sgd", lr=0.03, momentum_dtype="bf16")
    recipe = Recipe(optimizer=config, steps=8, batch_size=4)
    weights = [open_weights(REFERENCE / "square16" / "weights.npz").model.train() for _ in range(2)]
    whole, cut = (
        TrainState(m, recipe, Labels(recipe.loss, np.arange(4), 10), torch.device("cpu")) for m in weights
    )
    steps(whole, range(6))
    steps(cut, range(3))
    tensors = {file: {k: v.clone() for k, v in found.items()} for file, found in cut.tensors().items()}
    fresh = TrainState(
        open_weights(REFERENCE / "square16" / "weights.npz").model.train(),
        recipe, Labels(recipe.loss, np.arange(4), 10), torch.device("cpu"),
    )  # fmt: skip
    fresh.load(tensors, {})
    steps(fresh, range(3, 6))
    pairs = zip(whole.model.parameters(), fresh.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
