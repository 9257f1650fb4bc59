"""SAM and GSAM against plain references: a quadratic on paper, and a tiny Mixer with autograd by hand."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

import mixlab
from mixlab.data.loader import Batch
from mixlab.data.random import torch_seed
from mixlab.errors import UsageError
from mixlab.models.catalog import create_model
from mixlab.report.screen import Screen
from mixlab.training.choose import exchange_of
from mixlab.training.clock import Clock
from mixlab.training.distributed import World
from mixlab.training.engines.by_cpu import CpuEngine
from mixlab.training.losses import LossConfig, loss_per_batch
from mixlab.training.objectives.labels import Labels
from mixlab.training.optimizer import OptimizerConfig
from mixlab.training.recipe import Recipe
from mixlab.training.sam import check_sam, sam_radius, sharp_backward
from mixlab.training.schedule import ScheduleConfig, lr_factor
from mixlab.training.signals import Interrupted
from mixlab.training.step import TrainState, train_step
from tests.training.seams import StopAfter

CPU = torch.device("cpu")
QUIET = Screen(quiet=True)


class Quadratic(nn.Module):
    """w' A w / 2, whose gradient at w is A w."""

    def __init__(self) -> None:
        super().__init__()
        self.a = torch.tensor([[3.0, 1.0, 0.0], [1.0, 2.0, 0.5], [0.0, 0.5, 7.0]], dtype=torch.float64)
        self.first = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
        self.second = nn.Parameter(torch.tensor([0.25], dtype=torch.float64))
        self.frozen = nn.Parameter(torch.tensor(5.0, dtype=torch.float64), requires_grad=False)
        self.register_buffer("calls", torch.zeros(()))

    def backward(self):
        w = torch.cat([self.first, self.second])
        self.calls += 1
        loss = w @ self.a @ w / 2
        loss.backward()
        return loss.detach()


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_on_a_quadratic_the_gradient_is_the_one_on_paper(alpha):
    model = Quadratic()
    a, w, rho = model.a.numpy(), np.array([1.0, -2.0, 0.25]), 0.4
    here = a @ w
    there = a @ (w + rho * here / np.linalg.norm(here))
    across = here - there * (here @ there) / (there @ there)
    expected = there - alpha * across
    loss = sharp_backward(model, model.backward, rho, alpha)
    ours = torch.cat([model.first.grad, model.second.grad]).numpy()
    assert ours == pytest.approx(expected, rel=1e-11)
    assert loss.item() == pytest.approx(w @ a @ w / 2)  # of the weights, not of the neighbour
    assert torch.cat([model.first, model.second]).tolist() == w.tolist()
    assert model.frozen.grad is None
    assert model.calls == 1  # a buffer is as after one pass


def test_weights_come_back_even_where_the_second_pass_fails():
    model = Quadratic()

    def backward():
        if model.first[0] != 1.0:
            raise RuntimeError("out of memory")
        return model.backward()

    with pytest.raises(RuntimeError):
        sharp_backward(model, backward, 0.4, 0.0)
    assert model.first.tolist() == [1.0, -2.0]


def test_without_a_gradient_nothing_moves():
    model = Quadratic()
    with torch.no_grad():
        model.first.zero_()
        model.second.zero_()
    sharp_backward(model, model.backward, 0.4, 0.3)
    assert model.first.grad.tolist() == [0.0, 0.0]


def tiny_state(optimizer: OptimizerConfig, *, dtype=torch.float64, depth=0.5, **options) -> TrainState:
    torch.manual_seed(0)
    model = create_model("mixer_pico2", num_classes=4, image_size=8, num_blocks=3, stochastic_depth=depth)
    nn.init.normal_(model.head.weight, std=0.3)
    recipe = Recipe(optimizer=optimizer, loss=LossConfig(name="sigmoid"), steps=4, batch_size=8, **options)
    return TrainState(model.to(dtype).train(), recipe, Labels(recipe.loss, None, 4), CPU)


def pictures(dtype=torch.float64, sizes=()) -> Batch:
    image = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    return Batch(image, torch.arange(8) % 4, np.arange(8), sizes)


def by_hand(state, batch, step, rho, alpha, *, shards=1, parts=1):
    """The gradient of each shard climbs by itself; the parts of a shard climb together."""
    start = {name: p.detach().clone() for name, p in state.model.named_parameters()}

    def gradient(values, shard, images, labels):
        values = {name: value.clone().requires_grad_() for name, value in values.items()}
        total = 0
        pieces = zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True)
        for part, (image, label) in enumerate(pieces):
            torch.manual_seed(torch_seed(state.recipe.seed, step, shard * parts + part))
            target = nn.functional.one_hot(label, 4).to(image.dtype)
            logits = functional_call(state.model, values, (image,))
            total = total + len(image) / 8 * loss_per_batch(logits, target, state.recipe.loss)
        return dict(zip(values, torch.autograd.grad(total, list(values.values())), strict=True))

    def dot(a, b):
        return sum((a[name] * b[name]).sum() for name in a)

    whole = {name: torch.zeros_like(value) for name, value in start.items()}
    shares = zip(batch.inputs.tensor_split(shards), batch.label.tensor_split(shards), strict=True)
    for shard, (images, labels) in enumerate(shares):
        here = gradient(start, shard, images, labels)
        length = dot(here, here).sqrt()
        climbed = {name: start[name] + rho * here[name] / length for name in start}
        there = gradient(climbed, shard, images, labels)
        along = dot(here, there) / dot(there, there)
        for name in whole:
            whole[name] += there[name] - alpha * (here[name] - along * there[name])
    return {name: start[name] - state.recipe.optimizer.lr * whole[name] for name in start}


@pytest.mark.parametrize("alpha", [0.0, 0.6])
@pytest.mark.parametrize("options", [{}, {"accumulate": 2}, {"virtual_shards": 2}])
def test_a_step_of_a_mixer_is_the_one_by_hand_with_the_same_depths_drawn_twice(alpha, options):
    optimizer = OptimizerConfig(
        name="sgd", lr=0.1, momentum=0.0, weight_decay=0.0, grad_clip_norm=0.0, sam_rho=0.2, gsam_alpha=alpha
    )
    state = tiny_state(optimizer, schedule=ScheduleConfig(decay="constant", warmup_steps=0), **options)
    batch = pictures(sizes=(4, 4) if options.get("virtual_shards") else ())
    expected = by_hand(
        state,
        batch,
        1,
        0.2,
        alpha,
        shards=options.get("virtual_shards", 1),
        parts=options.get("accumulate", 1),
    )
    before = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    train_step(state, batch, Clock(state.recipe.steps, step=1))
    for name, parameter in state.model.named_parameters():
        assert torch.allclose(parameter, expected[name], rtol=0, atol=1e-12), name
    plain = tiny_state(
        OptimizerConfig(name="sgd", lr=0.1, momentum=0.0, weight_decay=0.0, grad_clip_norm=0.0)
    )
    train_step(plain, pictures(), Clock(plain.recipe.steps, step=1))
    moved = [torch.equal(before[name], p) for name, p in state.model.named_parameters()]
    assert not all(moved)
    assert not torch.allclose(plain.model.head.weight, state.model.head.weight, atol=1e-4)


@pytest.mark.parametrize("alpha", [0.0, 0.6])
def test_our_own_passes_take_the_same_step_as_torchs(alpha):
    optimizer = OptimizerConfig(name="sgd", lr=0.1, weight_decay=0.0, sam_rho=0.2, gsam_alpha=alpha)
    schedule = ScheduleConfig(decay="constant", warmup_steps=0)
    states = [
        tiny_state(optimizer, dtype=torch.float32, schedule=schedule, fast=fast) for fast in (True, False)
    ]
    assert isinstance(states[0].engine, CpuEngine)
    for state in states:
        for step in range(3):
            train_step(state, pictures(torch.float32), Clock(state.recipe.steps, step=step))
    for a, b in zip(*(state.model.parameters() for state in states), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=2e-6)


def test_running_statistics_see_a_batch_once():
    schedule = ScheduleConfig(decay="constant", warmup_steps=0)
    counts = []
    for rho in (0.0, 0.1):
        optimizer = OptimizerConfig(lr=1e-3, sam_rho=rho)
        recipe = Recipe(optimizer=optimizer, schedule=schedule, steps=4, batch_size=8)
        torch.manual_seed(0)
        model = create_model("timm/test_byobnet", num_classes=4, image_size=32).train()
        state = TrainState(model, recipe, Labels(recipe.loss, None, 4), CPU)
        image = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        train_step(state, Batch(image, torch.arange(8) % 4, np.arange(8)), Clock(recipe.steps))
        counts.append({name: b.clone() for name, b in model.named_buffers()})
    assert counts[0]
    for name, plain in counts[0].items():
        assert torch.equal(plain, counts[1][name]), name


def test_the_radius_falls_with_the_learning_rate_as_the_authors_do():
    lr_max, lr_min, total = 3e-3, 3e-5, 1000
    schedule = ScheduleConfig(decay="linear", warmup_steps=100, end_factor=0.01)
    optimizer = OptimizerConfig(lr=lr_max, sam_rho=0.5, sam_rho_end=0.2, gsam_alpha=0.01)
    recipe = Recipe(optimizer=optimizer, schedule=schedule, steps=total)
    for step in range(total):
        factor = lr_factor(step, total, schedule)
        lr = lr_max * factor
        # big_vision trainers/proj/gsam/gsam.py, in its words: rho_max, rho_min
        theirs = 0.2 + (0.5 - 0.2) * (lr - lr_min) / (lr_max - lr_min)
        assert sam_radius(recipe, factor) == pytest.approx(theirs, abs=1e-12)
    assert sam_radius(recipe, 1.0) == pytest.approx(0.5)


def test_the_radius_stays_where_nothing_says_that_it_falls():
    recipe = Recipe(optimizer=OptimizerConfig(sam_rho=0.5), steps=40)
    assert [sam_radius(recipe, factor) for factor in (0.1, 1.0)] == [0.5, 0.5]
    assert sam_radius(Recipe(), 0.1) is None


def test_a_run_stopped_in_its_middle_resumes_to_the_same_bits(tmp_path):
    options = {
        "steps": 12, "epochs": None, "batch_size": 32, "threads": 1, "keep_weights": "last", "screen": QUIET,
        "optimizer__sam_rho": 0.1, "optimizer__sam_rho_end": 0.05, "optimizer__gsam_alpha": 0.2,
        "model__stochastic_depth": 0.3, "with_pictures": False,
    }  # fmt: skip
    whole = mixlab.train("digits", run=tmp_path / "whole", figures=False, **options)
    with pytest.raises(Interrupted):
        mixlab.train("digits", run=tmp_path / "cut", figures=False, **(options | {"screen": StopAfter(7)}))
    cut = mixlab.resume(tmp_path / "cut", screen=QUIET, figures=False, with_pictures=False)
    name = "weights.safetensors"
    assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()
    assert whole["test"] == cut["test"]


def test_several_processes_need_shards():
    recipe = Recipe(optimizer=OptimizerConfig(sam_rho=0.1))
    exact = Recipe(optimizer=OptimizerConfig(sam_rho=0.1), virtual_shards=4)
    check_sam(recipe, exchange_of(recipe, World(0, 1)))
    check_sam(exact, exchange_of(exact, World(0, 2)))
    for parallel in ("ddp", "fsdp"):
        spread = Recipe(optimizer=OptimizerConfig(sam_rho=0.1), parallel=parallel)
        with pytest.raises(UsageError, match="shard by shard"):
            check_sam(spread, exchange_of(spread, World(0, 2)))


@pytest.mark.parametrize("setting", [{"gsam_alpha": 0.1}, {"sam_rho_end": 0.1}])
def test_settings_without_a_radius_are_refused(setting):
    with pytest.raises(UsageError, match="sam_rho"):
        OptimizerConfig(**setting)


@pytest.mark.parametrize("setting", [{"sam_rho": -0.1}, {"sam_rho": 0.1, "sam_rho_end": -0.1}])
def test_impossible_settings_are_refused(setting):
    with pytest.raises(UsageError, match=next(reversed(setting))):
        OptimizerConfig(**setting)
