"""`mixlab finetune`: the recipe fitted to what there is, and learning rates tried before the training begins."""

import json
import os
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import mixlab
from mixlab.data.reading import Examples
from mixlab.errors import TrainingError, UsageError
from mixlab.planning import budget
from mixlab.planning.draft import Request
from mixlab.planning.lr_grid import LrGrid, parse_lr_grid
from mixlab.planning.make_plan import DECISIONS, make_plan
from mixlab.planning.train import train
from mixlab.recipes import FEW, compose
from mixlab.recipes.finetune import finetune
from mixlab.report.run_log import read_run_log
from mixlab.training.keys import from_toml, override
from mixlab.training.recipe import Recipe
from mixlab.training.session import Session
from mixlab.training.tried import describe_tried
from tests import forked
from tests.training.seams import QUIET, before_steps, steps_of, with_decisions

SMALL = {"steps": 8, "batch_size": 8, "threads": 1, "screen": QUIET}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """`data`: images of three colours; `start`: a run that has seen a few of them in black and white."""
    root, rng = tmp_path_factory.mktemp("place"), np.random.default_rng(0)
    for number, name in enumerate(("blue", "green", "red")):
        (root / "data" / name).mkdir(parents=True)
        for i in range(20):
            pixels = rng.integers(0, 120, (8, 8, 3))
            pixels[..., 2 - number] += 100
            Image.fromarray(pixels.astype(np.uint8)).save(root / "data" / name / f"{i:02}.png")
    for name, level in (("dark", 40), ("light", 200)):
        (root / "grey" / name).mkdir(parents=True)
        for i in range(10):
            Image.new("RGB", (8, 8), (level + i,) * 3).save(root / "grey" / name / f"{i}.png")
    mixlab.train(str(root / "grey"), "small_data", run=root / "start", model__name="mixer_pico4", figures=False,
                 **SMALL | {"steps": 2})  # fmt: skip
    return root


def tune(place: Path, run: Path, **options) -> dict:
    return mixlab.finetune(str(place / "data"), place / "start", run=run, figures=False, **SMALL | options)


def test_weights_go_on_to_other_classes_and_another_size_under_the_recipe_of_the_authors(place, tmp_path):
    result = tune(place, tmp_path / "run", image_size=(16, 16))
    assert "grid" not in result
    assert result["test"]["num_images"] == 6
    recipe = override(Recipe(), from_toml(tmp_path / "run" / "recipe.toml"))
    assert (recipe.name, recipe.optimizer.name, recipe.optimizer.momentum) == ("finetune", "sgd", 0.9)
    assert recipe.init_from == str(place / "start")
    assert recipe.data.image_size == (16, 16)
    assert load_file(tmp_path / "run" / "weights.safetensors")["head.weight"].shape[0] == 3


def validations(run: Path) -> list[dict]:
    return [row for row in read_run_log(run / "metrics.jsonl") if row["event"] == "validation"]


def test_the_best_rate_of_a_grid_trains_to_the_bits_of_a_training_with_it_alone(place, tmp_path):
    result = tune(place, tmp_path / "grid", lr_grid=(1e-6, 0.03), lr_share=0.5, schedule__warmup_steps=2)
    grid = result["grid"]
    assert (grid["share"], grid["steps"], [row["lr"] for row in grid["tried"]]) == (0.5, 4, [1e-6, 0.03])
    best = max(grid["tried"], key=lambda row: (row["top1"], -row["loss"]))
    assert grid["lr"] == best["lr"]
    assert grid["tried"][0]["loss"] != grid["tried"][1]["loss"]
    tune(place, tmp_path / "alone", optimizer__lr=grid["lr"], schedule__warmup_steps=2)
    one, other = (load_file(tmp_path / name / "weights.safetensors") for name in ("grid", "alone"))
    assert all(torch.equal(one[name], other[name]) for name in other)
    recipe = override(Recipe(), from_toml(tmp_path / "grid" / "recipe.toml"))
    assert (recipe.optimizer.lr, recipe.steps) == (grid["lr"], 8)
    # A trial is a training of half the steps, the warm-up in proportion.
    tune(place, tmp_path / "half", optimizer__lr=0.03, steps=4, schedule__warmup_steps=1)
    assert validations(tmp_path / "half")[-1]["loss"] == grid["tried"][1]["loss"]


def test_a_trial_of_all_steps_finds_what_the_training_finds(tmp_path):
    result = mixlab.train("digits", "digits", run=tmp_path / "run", steps=6, threads=1, screen=QUIET, figures=False,
                          lr_grid=LrGrid(lrs=(0.003,), share=1.0))  # fmt: skip
    rows = validations(tmp_path / "run")
    (tried,) = result["grid"]["tried"]
    assert (tried["top1"], tried["loss"]) == (rows[-1]["top1"], rows[-1]["loss"])


def test_muons_own_rate_moves_with_the_rate(place, tmp_path):
    result = mixlab.train(str(place / "data"), "small_images_flat", run=tmp_path / "run", epochs=None,
                          lr_grid=LrGrid(lrs=(0.006,)), figures=False, **SMALL)  # fmt: skip
    recipe = from_toml(tmp_path / "run" / "recipe.toml")
    assert result["grid"]["lr"] == recipe["optimizer.lr"] == 0.006
    assert recipe["optimizer.muon_lr"] == pytest.approx(0.012)  # 0.02 at the recipe's 0.01


def test_what_was_tried_stands_in_the_run_its_log_and_its_report_and_nothing_else_of_it(place, tmp_path):
    result = tune(place, tmp_path / "run", lr_grid=(0.003, 0.03))
    assert json.loads((tmp_path / "run" / "lr_grid.json").read_text()) == result["grid"]
    assert read_run_log(tmp_path / "run" / "metrics.jsonl")[-1]["grid"] == result["grid"]
    report = (tmp_path / "run" / "report.html").read_text()
    assert f"0.003 ({100 * result['grid']['tried'][0]['top1']:.2f} %)" in report
    tune(place, tmp_path / "plain")
    files = [{path.name for path in (tmp_path / run).iterdir()} for run in ("run", "plain")]
    assert files[0] - files[1] == {"lr_grid.json"}
    resumed = mixlab.resume(tmp_path / "run", screen=QUIET, figures=False)
    assert resumed["grid"] == result["grid"]


def test_the_test_split_is_not_read_before_the_training_has_ended(place, tmp_path):
    order = []

    class WithoutTest(LrGrid):
        def decide(self, draft, num_steps):
            order.append("trials")
            splits = {name: split for name, split in draft.data.splits.items() if name != "test"}
            decided = super().decide(replace(draft, data=replace(draft.data, splits=splits)), num_steps)
            return replace(decided, data=draft.data)

    @dataclass(frozen=True)
    class Watched(Examples):  # how many there are is said before the first step
        def at(self, indices):
            order.append("test")
            return super().at(indices)

    def watch(draft):
        seen = {field.name: getattr(draft.data.test, field.name) for field in fields(Examples)}
        return replace(draft, data=replace(draft.data, test=Watched(**seen)))

    options = {"init_from": str(place / "start"), "steps": 8, "batch_size": 8, "threads": 1}
    recipe = compose(str(place / "data"), recipe="finetune", overrides=options)
    request = Request(recipe=recipe, run=tmp_path / "run", trials=WithoutTest(lrs=(0.003,)))
    session = Session(screen=QUIET, figures=False)
    course = before_steps(lambda course: order.append("step"))
    train(request, session, decisions=(*DECISIONS, watch), course_type=course)
    assert order[:9] == ["trials"] + 8 * ["step"]
    assert set(order[9:]) == {"test"}


def test_a_rate_that_diverges_is_written_down_and_not_taken(place, tmp_path):
    result = tune(place, tmp_path / "run", lr_grid=(0.01, 1e38), grad_clip_norm=0.0, lr_share=1.0)
    failed = result["grid"]["tried"][1]
    assert (failed["lr"], failed["top1"], failed["loss"]) == (1e38, None, None)
    assert "became inf" in failed["failed"] or "became nan" in failed["failed"]
    assert result["grid"]["lr"] == 0.01
    assert "1e+38 (" in describe_tried(result["grid"])
    with pytest.raises(TrainingError, match="no learning rate of the grid"):
        tune(place, tmp_path / "none", lr_grid=(1e37, 1e38), grad_clip_norm=0.0, lr_share=1.0)
    assert not (tmp_path / "none").exists()


def test_a_grid_needs_pictures_to_judge_on(place, tmp_path):
    with pytest.raises(UsageError, match="nothing is held out"):
        tune(place, tmp_path / "run", lr_grid=(0.01,), data__val_fraction=0.0)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["", "0.1,", "fast", "0.1,0.1", "0,0.1", "-1", "nan", "inf"])
def test_what_is_no_grid_is_refused(text):
    with pytest.raises(UsageError, match="numbers"):
        parse_lr_grid(text, 0.1)


def test_the_share_of_a_trial_is_within_a_run():
    assert LrGrid(lrs=(0.1,), share=0.1).num_steps(4) == 1
    assert LrGrid(lrs=(0.1,), share=1.0).num_steps(7) == 7
    for share in (0.0, 1.1):
        with pytest.raises(UsageError, match="lr_share"):
            LrGrid(lrs=(0.1,), share=share)


def test_small_data_get_small_batches_and_the_authors_short_length(place):
    few = compose(str(place / "data"), recipe="finetune", overrides={"init_from": "x"})
    assert (few.batch_size, few.accumulate, few.steps) == (15, 1, 500)
    assert (few.schedule.warmup_steps, few.data.val_fraction) == (100, 0.1)
    fewer = compose(
        str(place / "data"), recipe="finetune", overrides={"train_fraction": 0.5, "init_from": "x"}
    )
    assert fewer.batch_size == 8
    own = {"batch_size": 4, "steps": 20_000, "val_fraction": 0.2, "warmup_steps": 7, "init_from": "x"}
    given = compose(str(place / "data"), recipe="finetune", overrides=own)
    assert (given.batch_size, given.steps, given.schedule.warmup_steps) == (4, 20_000, 7)
    assert given.data.val_fraction == 0.2


@pytest.fixture(scope="module")
def many(place) -> str:
    """As many images as the authors' protocol is for, of which most are the same ones."""
    folder = place / "many"
    for path in sorted((place / "data").rglob("*.png")):
        (folder / path.parent.name).mkdir(parents=True, exist_ok=True)
        for i in range(FEW // 60 + 1):
            os.link(path, folder / path.parent.name / f"{path.stem}-{i}.png")
    return str(folder)


def test_many_images_get_the_authors_protocol(many):
    assert compose(many, recipe="finetune") == override(finetune(), {"data.source": many})


def test_a_shorter_run_keeps_the_share_of_the_warm_up_and_a_longer_one_its_steps(many):
    def warmup(has_budget=False, **overrides) -> tuple[int | None, float]:
        schedule = compose(many, recipe="finetune", overrides=overrides, has_budget=has_budget).schedule
        return schedule.warmup_steps, schedule.warmup_fraction

    assert warmup(steps=100) == (None, 0.05)  # 500 of 10,000 steps
    assert warmup(epochs=3) == (None, 0.05)
    assert warmup(has_budget=True) == (None, 0.05)
    assert warmup(steps=20_000)[0] == 500
    assert warmup(steps=100, warmup_steps=40)[0] == 40


def test_a_budget_leaves_time_for_the_trials(place):
    planned = []

    def watched(draft):
        # Twice with the same clock: once as it is, once without the grid.
        for trials in (draft.request.trials, None):
            other = replace(draft, request=replace(draft.request, trials=trials))
            planned.append(budget.decide_steps(other).num_steps)
        return steps_of(4, deadline=draft.end)(draft)

    options = {"init_from": str(place / "start"), "batch_size": 8, "threads": 1}
    recipe = compose(str(place / "data"), recipe="finetune", overrides=options, has_budget=True)
    trials = LrGrid(lrs=(0.003, 0.01, 0.03, 0.1), share=1.0)
    request = Request(recipe=recipe, budget_seconds=60.0, trials=trials)
    plan = make_plan(request, Session(screen=QUIET), with_decisions(decide_steps=watched))
    with_grid, without = planned
    assert 0 < with_grid < 0.6 * without  # a fifth, but for what the clock says on a busy machine
    assert plan.tried["steps"] == 4


def test_the_command_takes_weights_a_grid_and_any_key_of_the_recipe(place, tmp_path):
    options = (
        "--lr-grid",
        "0.003,0.01",
        "--image-size",
        "16",
        "--steps",
        "3",
        "--threads",
        "1",
        "--without-figures",
        "--run",
        "run",
    )
    weights = ("--weights", place / "start")
    done = forked.mixlab("finetune", place / "data", *weights, *options, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    values = json.loads(line)
    assert [row["lr"] for row in values["grid"]["tried"]] == [0.003, 0.01]
    assert {"run", "test", "steps", "num_parameters"} <= set(values)
    assert "lr 0.003: validation" in done.stderr
    recipe = from_toml(tmp_path / "runs" / "run" / "recipe.toml")
    assert (recipe["data.image_size"], recipe["optimizer.lr"]) == ([16, 16], values["grid"]["lr"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "requires an argument"),
        (["--weights", "w", "--init-from", "v"], "--weights sets init_from"),
        (["--weights", "w", "--lr-grid", "0.1,0.2", "--lr", "1"], "--lr-grid sets lr"),
        (["--weights", "w", "--lr-grid", "a"], "no list of numbers"),
        (["--weights", "w", "--wieghts", "v"], "did you mean 'weights'"),
    ],
)
def test_a_wrong_use_is_answered_before_anything_is_opened(arguments, words, capsys):
    from mixlab.cli import main

    with pytest.raises(SystemExit) as stop:
        main(["finetune", "nowhere", *arguments])
    assert stop.value.code == 2
    assert words in capsys.readouterr().err
