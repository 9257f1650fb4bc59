"""Training as a whole: it learns, repeats itself exactly, resumes exactly, and leaves a complete run."""

import csv
import json
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import mixlab
from mixlab.data.csv_files import write_split_csv
from mixlab.data.dataset import Source, Split
from mixlab.data.images.modality import IMAGES
from mixlab.errors import TrainingError, UsageError
from mixlab.report.run_log import read_run_log
from mixlab.training.evaluate import evaluate
from mixlab.training.recipe import Recipe
from mixlab.training.signals import Interrupted
from mixlab.training.splits import reopen_splits, split_source
from tests.training.seams import QUIET, TINY, StopAfter

# Everything that draws random numbers or keeps state, at once.
FULL = {
    "augment__crop": "pad",
    "augment__flip": True,
    "augment__erase_prob": 0.3,
    "augment__mixup_alpha": 0.4,
    "augment__cutmix_alpha": 1.0,
    "augment__policy": "trivialaugment",
    "model__stochastic_depth": 0.2,
    "ema_decay": 0.9,
    "accumulate": 2,
    "batch_size": 32,
    "threads": 1,
}


def colour_folder(
    root: Path, per_class: int = 24, size: tuple[int, int] = (9, 11), classes=("blue", "green", "red")
):
    """Images whose colour says the class, with noise."""
    rng = np.random.default_rng(0)
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            pixels = rng.integers(0, 120, (*size, 3))
            pixels[..., 2 - number % 3] += 100
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{i:03}.png")
    return root


@pytest.fixture
def colours(tmp_path) -> Path:
    return colour_folder(tmp_path / "colours")


def digits(run: Path, **options):
    return mixlab.train("digits", "digits", run=run, **({"screen": QUIET, "figures": False} | options))


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "weights.safetensors")


def assert_equal_weights(a: Path, b: Path) -> None:
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_folder_of_pictures_becomes_a_classifier_with_a_complete_run(colours, tmp_path):
    result = mixlab.train(
        str(colours),
        "small_data",
        run=tmp_path / "run",
        epochs=25,
        screen=QUIET,
        threads=1,
        model__name="mixer_pico",
    )
    assert set(result) >= {"run", "num_parameters", "epochs", "steps", "seconds", "images_per_second", "test"}
    assert result["test"]["top1"] >= 0.8
    run = tmp_path / "run"
    expected = (
        "recipe.toml environment.json metrics.jsonl checkpoints weights.safetensors config.json report.html"
    )
    assert {path.name for path in run.iterdir()} >= {
        *expected.split(),
        "figures",
        "predictions.csv",
        "bad_files.csv",
    }
    with open(run / "split.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 72
    assert {row["split"] for row in rows} == {"train", "val", "test"}
    with open(run / "predictions.csv") as file:
        predictions = list(csv.DictReader(file))
    assert len(predictions) == result["test"]["num_images"]
    right = sum(row["label"] == row["prediction"] for row in predictions)
    assert right == result["test"]["num_correct"]
    environment = json.loads((run / "environment.json").read_text())
    assert environment["threads"] == 1
    events = [row["event"] for row in read_run_log(run / "metrics.jsonl")]
    assert events[-1] == "end"
    assert {"train", "validation"} <= set(events)
    predicted = mixlab.load(run).predict(sorted(str(path) for path in (colours / "red").iterdir())[:5], top=2)
    assert all(len(row["predictions"]) == 2 for row in predicted)
    assert sum(row["predictions"][0]["label"] == "red" for row in predicted) >= 4


def test_one_batch_can_be_learnt_by_heart(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(16):
        folder = tmp_path / "data" / "train" / f"class{i % 4}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    options = {
        "augment__crop": "none",
        "augment__flip": False,
        "augment__policy": "none",
        "augment__cutmix_alpha": 0.0,
        "optimizer__weight_decay": 0.0,
        "val_fraction": 0,
    }
    mixlab.train(
        str(tmp_path / "data"), "small_data", run=tmp_path / "run", steps=150, epochs=None, batch_size=16,
        loss__label_smoothing=0.0, ema_decay=0.0, threads=1, model__name="mixer_pico", screen=QUIET,
        figures=False, **options,
    )  # fmt: skip
    rows = [row for row in read_run_log(tmp_path / "run" / "metrics.jsonl") if row["event"] == "train"]
    assert rows[0]["loss"] == pytest.approx(np.log(4), abs=0.02)  # a zero head says nothing at first
    assert rows[-1]["loss"] < 0.02
    assert rows[-1]["accuracy"] == 1.0


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        digits(tmp_path / name, steps=12, epochs=None, seed=seed, **(FULL | TINY))
    assert_equal_weights(tmp_path / "a", tmp_path / "b")
    assert not torch.equal(weights(tmp_path / "a")["head.weight"], weights(tmp_path / "c")["head.weight"])


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGINT, signal.SIGUSR1))],
)
def test_a_run_stopped_by_a_signal_resumes_to_the_same_bits(tmp_path, number):
    options = FULL | TINY | {"steps": 50, "epochs": None, "keep_weights": "last"}
    digits(tmp_path / "whole", **options)
    with pytest.raises(Interrupted) as stopped:
        digits(tmp_path / "cut", screen=StopAfter(41, number), **options)  # in the middle of the second epoch
    assert stopped.value.exit_status == (130 if number == signal.SIGINT else 143)
    assert (tmp_path / "cut" / "checkpoints" / "step_00000041").is_dir()
    mixlab.resume(tmp_path / "cut", screen=QUIET, figures=False)
    assert_equal_weights(tmp_path / "whole", tmp_path / "cut")

    def rows(name):
        log = read_run_log(tmp_path / name / "metrics.jsonl")
        return [(row["step"], row["loss"]) for row in log if row["event"] in ("train", "validation")]

    assert rows("whole") == rows("cut")


def test_the_best_weights_are_kept_and_remembered_over_a_resume(tmp_path):
    options = TINY | {"steps": 160, "epochs": None, "threads": 1, "batch_size": 32}
    options |= {"optimizer__lr": 0.02, "schedule__decay": "constant"}
    digits(tmp_path / "whole", **options)
    with pytest.raises(Interrupted):
        digits(tmp_path / "cut", screen=StopAfter(130, signal.SIGINT), **options)
    mixlab.resume(tmp_path / "cut", screen=QUIET, figures=False)
    assert_equal_weights(tmp_path / "whole", tmp_path / "cut")
    log = read_run_log(tmp_path / "whole" / "metrics.jsonl")
    best = max((row["top1"], -row["loss"], row["step"]) for row in log if row["event"] == "validation")
    assert mixlab.load(tmp_path / "whole").provenance["step"] == best[2]


def test_accumulation_changes_the_sums_order_only(tmp_path):
    for name, parts in (("one", 1), ("four", 4)):
        digits(tmp_path / name, steps=5, epochs=None, accumulate=parts, batch_size=32, threads=1)
    first, second = weights(tmp_path / "one"), weights(tmp_path / "four")
    # Adam's first steps turn a gradient's sign into a step of lr, rounding noise included; hence medians. The
    # second token-mixing bias has a gradient of nothing but noise: it never reaches the logits.
    for name in first:
        if not name.endswith("token_mixing.fc2.bias"):
            assert (first[name] - second[name]).abs().median() < 1e-5, name


def test_early_stopping_ends_a_run_that_no_longer_gains(tmp_path):
    result = digits(tmp_path / "run", epochs=50, early_stop=2, optimizer__lr=1e-7, threads=1, batch_size=256)
    assert result["epochs"] < 10
    assert "Stopped early" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.slow
def test_a_budget_ends_the_run_in_time_and_is_written_down(tmp_path):
    began = time.monotonic()
    result = digits(tmp_path / "run", epochs=None, threads=1, budget="20s")
    assert (
        time.monotonic() - began < 30
    )  # generous: the machine may be busy; the figure is in docs/results.md
    recipe = (tmp_path / "run" / "recipe.toml").read_text()
    assert "budget_seconds = 20.0" in recipe
    assert result["steps"] > 20


def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path):
    with pytest.raises(TrainingError, match="loss became") as error:
        digits(
            tmp_path / "run", steps=60, epochs=None, threads=1, optimizer__lr=1e30, schedule__warmup_steps=3
        )
    assert "nonfinite.csv" in str(error.value)
    with open(tmp_path / "run" / "nonfinite.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 64
    assert {(row["step"], row["what"]) for row in rows} == {("2", "loss")}


def test_balanced_class_weights_and_accuracy_for_uneven_classes(tmp_path):
    root = colour_folder(tmp_path / "data", per_class=10)
    for i in range(40):
        Image.fromarray(np.full((9, 11, 3), (0, 0, 150 + i), dtype=np.uint8)).save(
            root / "blue" / f"more{i}.png"
        )
    result = mixlab.train(
        str(root),
        "small_data",
        run=tmp_path / "run",
        epochs=3,
        class_weights="balanced",
        screen=QUIET,
        figures=False,
        threads=1,
    )
    assert "balanced_accuracy" in result["test"]


def test_unreadable_files_are_left_out_listed_and_counted(colours, tmp_path):
    for name in ("blue/000.png", "green/007.png"):
        (colours / name).write_bytes(b"not an image")
    result = mixlab.train(
        str(colours),
        "small_data",
        run=tmp_path / "run",
        epochs=1,
        max_bad_share=0.5,
        screen=QUIET,
        figures=False,
        threads=1,
    )
    assert result["num_bad_files"] == 2
    with open(tmp_path / "run" / "bad_files.csv") as file:
        rows = list(csv.DictReader(file))
    assert sorted(Path(row["path"]).parent.name for row in rows) == ["blue", "green"]
    assert all(row["reason"] for row in rows)


def test_timm_models_train_under_the_same_recipe(colours, tmp_path):
    result = mixlab.train(
        str(colours), "small_data", run=tmp_path / "run", steps=3, epochs=None, image_size=32,
        model__name="timm/test_resnet", screen=QUIET, figures=False, threads=1,
    )  # fmt: skip
    assert result["num_parameters"] > 300_000
    assert len(mixlab.load(tmp_path / "run").predict(str(colours / "red" / "000.png"))) == 1


def test_training_outside_the_main_thread_needs_no_signals(tmp_path):
    outcome = []
    thread = threading.Thread(
        target=lambda: outcome.append(digits(tmp_path / "run", steps=3, epochs=None, threads=1))
    )
    thread.start()
    thread.join(120)
    assert outcome[0]["steps"] == 3


def test_a_run_folder_that_exists_is_left_alone(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("keep")
    with pytest.raises(UsageError, match="exists already"):
        digits(tmp_path / "run", steps=1, epochs=None)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine.txt"]


def test_without_pictures_a_report_holds_none_of_the_data(tmp_path):
    digits(tmp_path / "run", steps=3, epochs=None, threads=1, with_pictures=False, figures=True)
    names = {path.stem for path in (tmp_path / "run" / "figures").iterdir()}
    assert names == {"curves", "confusion", "reliability", "coverage"}
    html = (tmp_path / "run" / "report.html").read_text()
    assert "Worst mistakes" not in html
    assert "image/jpeg;" not in html


def test_a_set_of_pixels_with_two_parts_is_split_again_as_it_was(tmp_path):
    rng = np.random.default_rng(0)
    splits = {
        part: Split(
            names=tuple(f"{part} index {i}" for i in range(number)),
            labels=np.arange(number) % 2,
            arrays=rng.integers(0, 256, (number, 8, 8, 3), dtype=np.uint8),
        )
        for part, number in (("train", 40), ("test", 10))
    }
    source = Source(name="pixels", class_names=("a", "b"), splits=splits, modality=IMAGES)
    drawn = split_source(source, Recipe())
    write_split_csv(drawn, source.class_names, tmp_path / "split.csv")
    again = reopen_splits(source, tmp_path / "split.csv")
    assert {name: split.names for name, split in again.items()} == {
        name: s.names for name, s in drawn.items()
    }
    assert all(np.array_equal(again[name].arrays, drawn[name].arrays) for name in drawn)


def test_a_run_on_a_path_with_dots_can_be_evaluated_from_elsewhere(colours, tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    trained = mixlab.train(
        "../colours", "small_data", run="../run", epochs=1, screen=QUIET, figures=False, threads=1
    )
    monkeypatch.chdir(tmp_path / "colours")
    evaluation, bad = evaluate(tmp_path / "run", screen=QUIET)
    assert bad == []
    assert evaluation.num_images == trained["test"]["num_images"]


def test_one_bad_file_in_a_small_test_split_does_not_lose_the_run(colours, tmp_path):
    rows = [(path, path.parent.name) for path in sorted(colours.rglob("*.png"))]
    lines = [
        f"{path},{label},{('test', 'val', 'train', 'train', 'train')[i % 5]}"
        for i, (path, label) in enumerate(rows)
    ]
    (tmp_path / "table.csv").write_text("path,label,split\n" + "\n".join(lines) + "\n")
    rows[0][0].write_bytes(b"broken")  # a test image: 1 of 15
    rows[1][0].write_bytes(b"broken")  # a validation image
    result = mixlab.train(
        str(tmp_path / "table.csv"), "small_data", run=tmp_path / "run", epochs=1, screen=QUIET, figures=False
    )
    assert result["num_bad_files"] == 2
    assert result["test"]["num_images"] == 14


def test_streamed_training_equals_training_from_memory_and_resumes_to_the_same_bits(colours, tmp_path):
    options = {
        "steps": 12,
        "epochs": None,
        "threads": 1,
        "screen": QUIET,
        "augment__crop": "pad",
        "batch_size": 16,
        "model__name": "mixer_pico",
    }
    data = str(colours)
    mixlab.train(data, "small_data", run=tmp_path / "memory", in_memory=True, figures=False, **options)
    mixlab.train(
        data, "small_data", run=tmp_path / "stream", in_memory=False, num_workers=2, figures=False, **options
    )
    assert_equal_weights(tmp_path / "memory", tmp_path / "stream")
    cut = options | {"in_memory": False, "num_workers": 2, "screen": StopAfter(5)}
    with pytest.raises(Interrupted):
        mixlab.train(data, "small_data", run=tmp_path / "cut", figures=False, **cut)
    mixlab.resume(tmp_path / "cut", screen=QUIET, figures=False)
    assert_equal_weights(tmp_path / "memory", tmp_path / "cut")


def test_a_run_killed_before_its_first_checkpoint_starts_again(tmp_path):
    digits(tmp_path / "whole", steps=6, epochs=None, threads=1)
    for name in ("weights.safetensors", "config.json"):
        (tmp_path / "whole" / name).rename(tmp_path / name)
    shutil.rmtree(tmp_path / "whole" / "checkpoints")
    log = tmp_path / "whole" / "metrics.jsonl"
    kept = [line for line in log.read_text().splitlines(keepends=True) if '"event": "train"' in line]
    log.write_text("".join(kept))  # that is all it had, when it was killed
    mixlab.resume(tmp_path / "whole", screen=QUIET, figures=False)
    assert (tmp_path / "weights.safetensors").read_bytes() == (
        tmp_path / "whole/weights.safetensors"
    ).read_bytes()
