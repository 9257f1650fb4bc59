"""A few images: what cannot be computed or tested with them is said, before the work where it can be known."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import mixlab
from mixlab.checkpoint.open import open_weights
from mixlab.errors import DataError, TrainingError, UsageError
from mixlab.evaluation.metrics import Predictions, summarize
from mixlab.exports.card import write_card
from mixlab.report.run_log import read_run_log
from mixlab.report.screen import Screen
from mixlab.report.tables import show_evaluation
from mixlab.studies import open_study
from mixlab.studies.harness import Options
from mixlab.training.recipe import Recipe
from mixlab.training.small_sets import needs_two, smallest_part
from tests.training import seams
from tests.training.seams import Listening, before_steps


def folder(root: Path, **classes: int) -> Path:
    for number, (name, count) in enumerate(classes.items()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (16, 16), (70 * number, 90, 10 * i)).save(root / name / f"{i}.png")
    return root


def train(data: Path, run: Path, screen: Screen | None = None, **options):
    options = {"steps": 1, "threads": 1, "image_size": (8, 8), "checkpoint_seconds": 0.0} | options
    return mixlab.train(
        data, "small_data", run=run, screen=screen or Screen(quiet=True), figures=False, **options
    )


# Nothing to test on


def test_one_picture_a_class_is_trained_on_and_it_is_said_that_nothing_is_tested_and_why(tmp_path):
    screen = Listening()
    result = train(folder(tmp_path / "data", a=1, b=1, c=1), tmp_path / "run", screen)
    assert result["test"] is None
    assert "no class has 3 different images" in result["test_reason"]
    reason = result["test_reason"]
    assert screen.said[0] == f"nothing will be tested: {reason}"  # before the work
    assert f"nothing was tested: {reason}" in screen.said
    assert f"on new images: {reason}." in (tmp_path / "run" / "report.html").read_text()
    assert read_run_log(tmp_path / "run" / "metrics.jsonl")[-1]["test_reason"] == reason
    assert f"Nothing was tested: {reason}." in write_card(open_weights(tmp_path / "run"), tmp_path / "run")


def test_a_set_without_a_test_split_of_its_own_says_so(tmp_path):
    folder(tmp_path / "data" / "train", a=4, b=4)
    screen = Listening()
    result = train(tmp_path / "data", tmp_path / "run", screen)
    assert result["test_reason"] == "the data set has no test split"
    assert screen.said[0] == "nothing will be tested: the data set has no test split"


def test_a_test_split_that_cannot_be_read_is_another_reason(tmp_path):
    folder(tmp_path / "data" / "train", a=4, b=4)
    folder(tmp_path / "data" / "test", a=1, b=1)
    for path in (tmp_path / "data" / "test").rglob("*.png"):
        path.write_bytes(b"no image")
    screen = Listening()
    result = train(tmp_path / "data", tmp_path / "run", screen)
    assert result["test"] is None
    assert result["test_reason"] == "no test image could be read"
    assert "nothing was tested: no test image could be read" in screen.said


def test_classes_without_test_pictures_are_named_beside_those_that_have_some(tmp_path):
    screen = Listening()
    result = train(folder(tmp_path / "data", a=6, b=6, few=1, two=2), tmp_path / "run", screen)
    assert result["test_reason"] is None
    words = "2 classes have no test images and are not measured there: few, two"
    assert screen.said.count(words) == 2  # before the work, and beside the accuracy
    assert words in (tmp_path / "run" / "report.html").read_text()
    assert [row["num_images"] for row in result["test"]["per_class"]] == [1, 1, 0, 0]


def test_an_empty_class_of_a_given_split_is_named_and_the_others_measured(tmp_path):
    for split, count in (("train", 4), ("val", 2), ("test", 2)):
        folder(tmp_path / "data" / split, a=count, b=count, c=count if split == "train" else 0)
    screen = Listening()
    result = train(tmp_path / "data", tmp_path / "run", screen)
    assert result["test"]["num_images"] == 4
    html = (tmp_path / "run" / "report.html").read_text()
    for kind in ("validation", "test"):
        words = f"1 class has no {kind} images and is not measured there: c"
        assert words in screen.said
        assert words in html


def test_a_study_of_a_set_too_small_to_test_on_is_refused_before_its_first_training(tmp_path):
    data = folder(tmp_path / "data", a=2, b=2)
    options = Options(
        subject=str(data), smoke=True, out=tmp_path / "out", screen=Screen(quiet=True), threads=1
    )
    with pytest.raises(DataError, match="reports on a test split, and there is none"):
        open_study("shuffle").run(options)
    assert not (tmp_path / "out").exists()


def test_pictures_of_one_class_are_measured_and_the_absent_classes_named():
    index, one = np.arange(3), np.ones(3, dtype=np.int64)
    predictions = Predictions(
        index=index, label=one, predicted=np.array([1, 0, 1]), confidence=np.full(3, 0.6), loss=np.ones(3),
        top5=np.array([[1, 0, 2]] * 3),
    )  # fmt: skip
    evaluation = summarize(predictions, ("a", "b", "c"))
    assert evaluation.balanced_accuracy is None
    assert json.loads(json.dumps(evaluation.to_json()))["top1"] == pytest.approx(2 / 3)
    screen = Listening()
    show_evaluation(evaluation.to_json() | {"bad": []}, screen)
    assert screen.said[-1] == "2 classes have no images here and are not shown: a, c"
    assert not any("top-5" in line for line in screen.said)  # of three classes it is always all


def test_top5_is_shown_from_six_classes_on():
    index = np.arange(6)
    predictions = Predictions(
        index=index, label=index, predicted=index, confidence=np.full(6, 0.6), loss=np.ones(6),
        top5=np.repeat(index[:, None], 5, axis=1),
    )  # fmt: skip
    screen = Listening()
    show_evaluation(summarize(predictions, tuple("abcdef")).to_json() | {"bad": []}, screen)
    assert any(line.startswith("top-5 100.0 %, loss") for line in screen.said)


# Batches of one


@pytest.mark.parametrize(
    ("batch_size", "num_images", "accumulate", "processes", "shards", "smallest"),
    [(1, 9, 1, 1, 0, 1), (8, 9, 1, 1, 0, 8), (8, 3, 1, 1, 0, 3), (8, 99, 4, 1, 0, 2), (8, 99, 8, 1, 0, 1),
     (8, 99, 1, 8, 0, 1), (8, 3, 8, 2, 0, 1), (8, 99, 1, 1, 4, 2)],
)  # fmt: skip
def test_the_smallest_part_of_a_batch_is_known(
    batch_size, num_images, accumulate, processes, shards, smallest
):
    recipe = Recipe(batch_size=batch_size, accumulate=accumulate, virtual_shards=shards)
    assert smallest_part(recipe, num_images, processes) == smallest


def test_only_normalisation_of_a_single_pixel_needs_two_images():
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3))
    spread = nn.Sequential(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1))
    flat = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.BatchNorm1d(4))
    other = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.GroupNorm(3, 3), nn.Conv2d(3, 3, 1))
    for model in (pooled, spread, flat, other):
        model.register_parameter("any", nn.Parameter(torch.ones(())))
    assert [needs_two(model, (8, 8), 3) for model in (pooled, spread, flat, other)] == [
        True,
        False,
        True,
        False,
    ]
    model = pooled.eval()
    needs_two(model, (8, 8), 3)
    assert not model.training


class Unread(Listening):
    def progress(self, label, total, start=0):
        pytest.fail("the images were read")


@pytest.mark.parametrize(
    ("options", "words"),
    [({"batch_size": 1}, "--batch-size 2"), ({"batch_size": 4, "accumulate": 4}, "--batch-size 8 or more, or a sm")],
)  # fmt: skip
def test_a_batch_of_one_is_refused_before_the_pictures_are_read(options, words, tmp_path):
    data, screen = folder(tmp_path / "data", a=8, b=8), Unread()
    with pytest.raises(UsageError, match=r"resnet normalises over the images of a batch") as found:
        train(data, tmp_path / "run", screen, model__name="timm/test_resnet", image_size=(32, 32), **options)
    assert words in str(found.value.hint)
    assert not (tmp_path / "run").exists()


def test_auto_begins_with_two_images_where_one_cannot_be_normalised(tmp_path):
    data = folder(tmp_path / "data", a=4, b=4)
    screen = Listening()
    train(
        data, tmp_path / "run", screen, model__name="timm/test_resnet", image_size=(32, 32), batch_size="auto"
    )
    assert any(line.startswith("batch size ") for line in screen.said)
    options = {"batch_size": "auto", "accumulate": 8}
    with pytest.raises(UsageError, match="normalises over the images"):
        train(data, tmp_path / "none", model__name="timm/test_resnet", image_size=(32, 32), **options)


def test_a_mixer_is_trained_on_one_image_at_a_time(tmp_path):
    result = train(folder(tmp_path / "data", a=2, b=2), tmp_path / "run", batch_size=1)
    assert result["steps"] == 1


def test_a_batch_that_shrinks_to_one_while_training_is_explained(tmp_path):
    def shrink(course):
        course.state.objective.loss = lambda *_: torch.nn.BatchNorm1d(4)(torch.zeros(1, 4))

    data = folder(tmp_path / "data", a=4, b=4)
    options = {
        "steps": 1,
        "threads": 1,
        "image_size": (8, 8),
        "doubles": {"course_type": before_steps(shrink)},
    }
    with pytest.raises(TrainingError, match=r"one at a time.*--batch-size"):
        seams.train(data, "small_data", tmp_path / "run", **options)
