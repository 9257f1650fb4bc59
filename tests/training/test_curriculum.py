"""Coarse patches first: the change is a resampling and nothing else, at the same step however a run is cut."""

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import mixlab
from benchmarks.reliability import kills, ranks
from mixlab.checkpoint.store import load_weights
from mixlab.data.loader import Batch
from mixlab.errors import UsageError
from mixlab.models.catalog import ModelConfig, create_model
from mixlab.models.resolution import resample
from mixlab.planning import budget
from mixlab.report.run_log import read_run_log
from mixlab.report.screen import Screen
from mixlab.training import course, curriculum, fit
from mixlab.training.clock import Clock
from mixlab.training.curriculum import check_curriculum, num_coarse_steps, refine
from mixlab.training.engines.by_cpu import CpuEngine
from mixlab.training.optimizer import OptimizerConfig, freeze_layers
from mixlab.training.recipe import DataConfig, Recipe
from mixlab.training.schedule import ScheduleConfig
from mixlab.training.signals import Interrupted
from mixlab.training.step import TrainState, train_step
from tests.training.decisions import replace_decision

QUIET = Screen(quiet=True)
# 6 of 12 steps, with everything that draws or keeps a state. Digits have 8 pixels, the model patches of 2.
SHORT = {"steps": 12, "epochs": None, "threads": 1, "batch_size": 32, "coarse_share": 0.5, "seed": 3}
FULL = SHORT | {
    "keep_weights": "last",
    "ema_decay": 0.9,
    "accumulate": 2,
    "augment__mixup_alpha": 0.4,
    "model__stochastic_depth": 0.2,
}


def train(run: Path, **options):
    return mixlab.train("digits", "digits", run=run, screen=QUIET, **options)


def cut(monkeypatch, step: int, job) -> None:
    """Do `job`, and send it SIGTERM in the step before `step`."""
    real = fit.train_step

    def step_and_stop(state, batch, clock):
        if clock.step + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(state, batch, clock)

    with monkeypatch.context() as patch:
        patch.setattr(fit, "train_step", step_and_stop)
        with pytest.raises(Interrupted):
            job()


def stem(run: Path, step: int) -> tuple[int, ...]:
    return load_file(run / "checkpoints" / f"step_{step:08d}" / "model.safetensors")["stem.weight"].shape[2:]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict:
    """What a run that nobody stops ends with, and its log."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train(run, **FULL)
    return {"run": run, "bits": kills.fingerprint(run), "losses": losses(run)}


def losses(run: Path) -> list[tuple]:
    rows = read_run_log(run / "metrics.jsonl")
    return [(row["step"], row["loss"]) for row in rows if row["event"] in ("train", "validation")]


# The change


STATES = {
    "adamw": {"optimizer": OptimizerConfig(lr=1e-3), "ema_decay": 0.9},
    "muon": {"optimizer": OptimizerConfig(name="muon", lr=1e-3)},
    "sgd": {"optimizer": OptimizerConfig(name="sgd", lr=1e-3)},
    "sgd in bfloat16": {"optimizer": OptimizerConfig(name="sgd", lr=1e-3, momentum_dtype="bf16")},
    "torch's own passes": {"fast": False, "ema_decay": 0.9},
    "exact mode": {"virtual_shards": 2},
    "frozen layers": {"freeze": 2, "checkpoint_blocks": True},
}


@pytest.mark.parametrize("case", STATES)
def test_the_model_after_the_change_is_the_one_before_resampled_and_known_moments_stay(case):
    recipe = Recipe(
        model=ModelConfig(name="mixer_pico2"), data=DataConfig(image_size=(8, 8), channels=1), batch_size=8,
        steps=8, coarse_share=0.5, schedule=ScheduleConfig(decay="constant", warmup_steps=0), **STATES[case],
    )  # fmt: skip
    torch.manual_seed(0)
    model = create_model("mixer_pico4", num_classes=4, image_size=8, in_channels=1)
    torch.nn.init.normal_(model.head.weight, std=0.3)
    freeze_layers(model, recipe.freeze)
    model.checkpoint_blocks = recipe.checkpoint_blocks
    state = TrainState(model.train(), recipe, None, 4, torch.device("cpu"))
    image = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    batch = Batch(image, torch.arange(8) % 4, np.arange(8), (4, 4) if recipe.virtual_shards else ())
    for step in range(4):
        train_step(state, batch, Clock(state.recipe.steps, step=step))
    old_model, old_ema, old_optimizer = state.model, state.ema, state.optimizer
    refine(state)

    def assert_resampled(new, old):
        expected = resample(old, (8, 8), patch_size=2)
        assert new.config == expected.config
        assert new.config.patch_size == 2
        for name, tensor in expected.state_dict().items():
            assert torch.equal(new.state_dict()[name], tensor), name

    assert_resampled(state.model, old_model)
    if old_ema is not None:
        assert_resampled(state.ema.module, old_ema.module)
        assert int(state.ema.n_averaged) == int(old_ema.n_averaged) == 4
    assert state.model.training
    assert state.model.checkpoint_blocks == recipe.checkpoint_blocks
    assert isinstance(state.engine, CpuEngine) == recipe.fast

    before, kept, fresh = dict(old_model.named_parameters()), 0, 0
    for name, parameter in state.model.named_parameters():
        assert parameter.requires_grad == before[name].requires_grad
        if not parameter.requires_grad:
            assert parameter not in state.optimizer.state
            continue
        old, new = old_optimizer.state[before[name]], state.optimizer.state[parameter]
        assert old.keys() == new.keys()
        if parameter.shape == before[name].shape:
            assert all(torch.equal(old[key], new[key]) for key in old)
            kept += 1
        else:
            assert not any(value.any() for value in new.values())
            assert all(value.shape in ((), parameter.shape) for value in new.values())
            fresh += 1
    assert kept
    assert fresh
    values = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    train_step(state, batch, Clock(state.recipe.steps, step=4))
    assert all(torch.isfinite(p).all() for p in state.model.parameters())
    assert all(torch.equal(p, values[name]) != p.requires_grad for name, p in state.model.named_parameters())


def test_zeroed_moments_take_the_step_of_an_optimizer_that_begins():
    recipe = Recipe(
        model=ModelConfig(name="mixer_pico2"), data=DataConfig(image_size=(8, 8), channels=1), batch_size=8,
        steps=8, coarse_share=0.5, schedule=ScheduleConfig(decay="constant", warmup_steps=0),
    )  # fmt: skip
    batch = Batch(torch.randn(8, 1, 8, 8), torch.arange(8) % 4, np.arange(8), ())
    for name in ("adamw", "muon", "sgd"):
        own = replace(recipe, optimizer=OptimizerConfig(name=name))
        model = create_model("mixer_pico4", num_classes=4, image_size=8, in_channels=1)
        torch.nn.init.normal_(model.head.weight, std=0.3)
        state = TrainState(model.train(), own, None, 4, torch.device("cpu"))
        train_step(state, batch, Clock(state.recipe.steps, step=0))
        refine(state)
        fresh = TrainState(resample(state.model, (8, 8), patch_size=2), own, None, 4, torch.device("cpu"))
        for of in (state, fresh):
            train_step(of, batch, Clock(of.recipe.steps, step=1))
        for key, parameter in state.model.named_parameters():
            changed = key.startswith("stem.weight") or (".token_mixing." in key and ".fc1.bias" not in key)
            if changed:
                assert torch.equal(parameter, dict(fresh.model.named_parameters())[key]), (name, key)


def test_the_share_is_rounded_and_never_all_of_a_run():
    steps = {(0.5, 12): 6, (0.29, 100): 29, (0.99, 10): 9, (0.9, 1): 0, (0.0, 5): 0}
    for (share, number), expected in steps.items():
        assert num_coarse_steps(Recipe(coarse_share=share), number) == expected


# A run


@pytest.mark.parametrize("model", ["mixer_pico2", "mixer_pyramid_micro1"])
def test_a_run_validates_in_both_phases_keeps_epochs_and_says_when_it_changed(model, tmp_path, monkeypatch):
    seen = []
    real = fit.train_step

    def look(state, batch, clock):
        seen.append(state.model.config.patch_size)
        return real(state, batch, clock)

    monkeypatch.setattr(fit, "train_step", look)
    options = {"model__name": model, "epochs": 2, "steps": None, "batch_size": 256, "keep_weights": "last"}
    train(tmp_path / "run", **(SHORT | options))
    own = int(model[-1])
    assert seen == [2 * own] * 4 + [own] * 4
    rows = read_run_log(tmp_path / "run" / "metrics.jsonl")
    assert [(row["step"], row["epoch"]) for row in rows if row["event"] == "validation"] == [(4, 1), (8, 2)]
    text = (tmp_path / "run" / "report.html").read_text()
    assert f"Patches had {2 * own} pixels a side up to step 4 of 8, and {own} from then on." in text
    assert load_weights(tmp_path / "run").model_settings["name"] == model


def test_without_a_share_nothing_changes(tmp_path, monkeypatch):
    plain = SHORT | {"coarse_share": 0.0, "steps": 3}
    train(tmp_path / "plain", **{key: value for key, value in plain.items() if key != "coarse_share"})
    monkeypatch.setattr(curriculum, "refine", None)
    train(tmp_path / "run", coarse_factor=3, **plain)
    assert kills.fingerprint(tmp_path / "plain") == kills.fingerprint(tmp_path / "run")
    assert "pixels a side up to" not in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize("step", [1, 5, 6, 7])
def test_a_run_stopped_before_at_or_after_the_change_resumes_to_the_same_bits(
    step, whole, tmp_path, monkeypatch
):
    run = tmp_path / "run"
    cut(monkeypatch, step, lambda: train(run, **FULL))
    assert stem(run, step) == ((4, 4) if step <= 6 else (2, 2))
    mixlab.resume(run, screen=QUIET)
    assert kills.fingerprint(run) == whole["bits"]
    assert losses(run) == whole["losses"]


def test_a_damaged_checkpoint_after_the_change_gives_way_to_a_coarse_one(whole, tmp_path, monkeypatch):
    run = tmp_path / "run"
    cut(monkeypatch, 4, lambda: train(run, **FULL))
    cut(monkeypatch, 9, lambda: mixlab.resume(run, screen=QUIET))
    assert (stem(run, 4), stem(run, 9)) == ((4, 4), (2, 2))
    newest = run / "checkpoints" / "step_00000009" / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"!")
    mixlab.resume(run, screen=QUIET)
    assert kills.fingerprint(run) == whole["bits"]


def test_a_kill_between_new_weights_and_their_description_is_survived(whole, tmp_path, monkeypatch):
    run = tmp_path / "run"
    cut(monkeypatch, 6, lambda: train(run, **FULL))
    assert json.loads((run / "config.json").read_text())["model"]["name"] == "mixer_pico4"
    shutil.copy(whole["run"] / "weights.safetensors", run)  # of patches of 2
    mixlab.resume(run, screen=QUIET)
    assert kills.fingerprint(run) == whole["bits"]
    assert load_weights(run).model_settings["name"] == "mixer_pico2"


def test_weights_of_the_coarse_steps_are_whole_weights_and_can_be_the_best(tmp_path, monkeypatch):
    accuracies = iter([0.9, 0.2])
    real = course.TrainingCourse._evaluate

    def worse_later(self, *arguments):
        return replace_top1(real(self, *arguments), next(accuracies))

    options = {"epochs": 2, "steps": None, "batch_size": 256, "ema_decay": 0.9}
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(course.TrainingCourse, "_evaluate", worse_later)
        result = train(run, **(SHORT | options))
    config = json.loads((run / "config.json").read_text())
    assert config["model"]["name"] == "mixer_pico4"
    assert config["provenance"]["step"] == 4
    weights = mixlab.load(run)
    assert weights.model.config.patch_size == 4
    assert result["num_parameters"] == sum(p.numel() for p in weights.model.parameters())
    text = (run / "report.html").read_text()
    assert "are from before: their patches have 4." in text
    assert "Mixer-Pico/4" in text
    # What remains of the run afterwards can be started from, at the patches that it was meant to have.
    mixlab.train(
        "digits", "digits", run=tmp_path / "next", init_from=str(run), model__patch_size=2, steps=1, epochs=None,
        threads=1, screen=QUIET,
    )  # fmt: skip
    assert mixlab.load(tmp_path / "next").model.config.patch_size == 2


def replace_top1(evaluation, top1: float):
    values = {key: getattr(evaluation, key) for key in ("loss", "ece", "balanced_accuracy")}
    return SimpleNamespace(top1=top1, **values)


def test_an_early_stop_may_come_before_the_change(tmp_path):
    options = {"epochs": 50, "steps": None, "early_stop": 2, "optimizer__lr": 1e-7, "batch_size": 256}
    assert train(tmp_path / "run", **(SHORT | options))["steps"] < 100
    text = (tmp_path / "run" / "report.html").read_text()
    assert "Stopped early" in text
    assert "Training ended before patches of 4 pixels became patches of 2, after step 100." in text


def test_a_budget_counts_each_phase_at_its_own_speed(tmp_path, monkeypatch):
    asked = []

    def seconds(plan, trial, measure_seconds, end):
        asked.append(trial.model.config.patch_size)
        return {4: 0.01, 2: 0.04}[asked[-1]]

    class PlannedError(Exception):
        pass

    def plan(draft):
        raise PlannedError(budget.decide_steps(draft).num_steps)

    monkeypatch.setattr(budget, "measure_steps", seconds)
    monkeypatch.setattr(budget, "_evaluation_speed", lambda prepared, trial: 0.0)
    replace_decision(monkeypatch, "decide_steps", plan)

    def steps(**options) -> int:
        with pytest.raises(PlannedError) as found:
            train(tmp_path / "run", **({"epochs": None, "threads": 1, "budget": "1h"} | options))
        return found.value.args[0]

    plain = steps()
    assert steps(coarse_share=0.5) / plain == pytest.approx(0.04 / 0.025, rel=0.01)
    assert steps(coarse_share=0.8) / plain == pytest.approx(0.04 / 0.016, rel=0.01)
    assert asked == [2, 4, 2, 4, 2]
    # One pass in the first half, two in the second, of which what was measured are two.
    sharp = {"optimizer__sam_rho": 0.1, "optimizer__sam_from": 0.5}
    assert steps(**sharp) / plain == pytest.approx(0.04 / 0.03, rel=0.01)
    assert steps(coarse_share=0.25, **sharp) / plain == pytest.approx(0.04 / 0.02625, rel=0.01)


# Several processes


def test_several_ranks_change_together_and_a_run_may_go_on_with_another_number(tmp_path):
    torch.set_num_threads(1)

    def start(run, size, step=None, **options):
        def job():
            real = fit.train_step

            def step_and_stop(state, batch, clock):
                if clock.step + 1 == step and state.world.rank == size - 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                return real(state, batch, clock)

            fit.train_step = step_and_stop
            if (run / "recipe.toml").exists():
                mixlab.resume(run, screen=QUIET)
            else:
                train(run, **(FULL | options))

        return ranks.wait(ranks.start(job, size=size), 100)

    exact = {"virtual_shards": 2, "accumulate": 1}
    for name, first, second in (("one", 1, 1), ("two", 2, 1), ("more", 1, 2)):
        step = {"one": None, "two": 5, "more": 8}[name]
        assert start(tmp_path / name, first, step, **exact) == [143 if step else 0] * first
        if step:
            assert start(tmp_path / name, second) == [0] * second
        assert kills.fingerprint(tmp_path / name) == kills.fingerprint(tmp_path / "one")
    assert start(tmp_path / "ddp", 2) == [0, 0]
    assert start(tmp_path / "ddp cut", 2, 6) == [143, 143]
    assert start(tmp_path / "ddp cut", 2) == [0, 0]
    assert kills.fingerprint(tmp_path / "ddp") == kills.fingerprint(tmp_path / "ddp cut")
    values = [load_file(tmp_path / name / "weights.safetensors")["head.weight"] for name in ("one", "ddp")]
    assert torch.allclose(*values, rtol=0, atol=0.02)


# What is refused


@pytest.mark.parametrize(
    ("options", "where", "words"),
    [
        ({"coarse_share": 1.0}, "coarse_share", "must be in"),
        ({"coarse_share": -0.1}, "coarse_share", "must be in"),
        ({"coarse_factor": 1}, "coarse_factor", "at least 2"),
        ({"coarse_factor": 3}, "coarse_factor", "patches of 6 pixels, 3 times 2: image_size 8x8 is not a multiple"),
        ({"coarse_factor": 8}, "coarse_factor", "patches of 16 pixels, 8 times 2: image_size 8x8 is smaller"),
        ({"model__name": "mixer_pyramid_micro1", "coarse_factor": 4}, "coarse_factor", "3 stages need a grid"),
        ({"model__token_mixing": "untied"}, "coarse_share", "neither a plain Mixer nor a pyramid"),
        ({"model__name": "timm/resnet10t", "image_size": 32}, "coarse_share", "timm/resnet10t cannot be changed"),
        ({"parallel": "fsdp"}, "parallel", "cannot change its patches"),
        ({"init_from": "mixer_b16"}, "coarse_share", "start from its weights"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said_before_a_run_is_made(options, where, words, tmp_path):
    with pytest.raises(UsageError) as found:
        train(tmp_path / "run", **(SHORT | options))
    assert found.value.where == where
    assert words in found.value.message + (found.value.hint or "")
    assert not (tmp_path / "run").exists()


def test_every_model_of_ours_with_a_plain_grid_is_accepted():
    for name, size in (("mixer_micro4", 32), ("mixer_b16", 224), ("mixer_pyramid_micro2", 32)):
        recipe = Recipe(
            model=ModelConfig(name=name),
            data=DataConfig(image_size=(size, size), channels=3),
            coarse_share=0.5,
        )
        check_curriculum(recipe)
        settings = {"name": name, "num_classes": 5, "image_size": (size, size), "patch_size": 1}
        coarse = curriculum.first_settings(settings, recipe)
        assert create_model(**coarse).config.patch_size == curriculum.coarse_patch_size(recipe)
