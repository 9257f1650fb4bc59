"""`mixlab evaluate` in the paper's ways: other fits, ImageNet's classes by name, ReaL's labels."""

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo, RealLabelsImagenet

from mixlab.checkpoint.open import open_weights
from mixlab.checkpoint.store import Weights, save_weights
from mixlab.data.images.imagenet import usual_class_names
from mixlab.data.images.preprocess import ImagePreprocess
from mixlab.errors import DataError, UsageError
from mixlab.evaluation.metrics import Predictions, accuracy_of_any, summarize
from mixlab.models.catalog import create_model, settings_of
from mixlab.report.screen import Screen
from mixlab.serving.predict import load
from mixlab.training.evaluate import FITS, evaluate

QUIET = Screen(quiet=True)
SYNSETS = ("n02102040", "n03000684", "n01440764")  # classes 217, 491 and 0, in no order


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A small Mixer with ImageNet's 1,000 classes, every tensor drawn."""
    torch.manual_seed(0)
    model = create_model("mixer_nano4", image_size=(16, 16), num_classes=1000, num_blocks=1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    folder = tmp_path_factory.mktemp("weights") / "w"
    save_weights(
        folder,
        Weights(
            model=model,
            model_settings=settings_of(model.config),
            preprocess=ImagePreprocess(image_size=(16, 16)),
            class_names=usual_class_names(1000),
            provenance={},
        ),
    )
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Nine images of three classes by synset, named as ImageNet's validation images."""
    root, rng = tmp_path_factory.mktemp("data") / "imagenette", np.random.default_rng(1)
    for number in range(9):
        path = root / SYNSETS[number % 3] / f"ILSVRC2012_val_{number + 1:08d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.repeat(np.repeat(rng.integers(0, 256, (4, 6, 3), dtype=np.uint8), 8, axis=0), 8, axis=1)
        Image.fromarray(pixels).save(path)
    return root


def top_classes(weights: Path, pictures: Path, top: int = 1) -> dict[int, list[int]]:
    """Number of the validation image -> its first classes, by way of `predict`."""
    rows = load(weights).predict(sorted(pictures.rglob("*.png")), top=top)
    numbers = {name: number for number, name in enumerate(usual_class_names(1000))}
    return {
        int(Path(row["path"]).stem[-8:]): [numbers[guess["label"]] for guess in row["predictions"]]
        for row in rows
    }


def test_a_folder_by_synset_is_measured_with_a_head_of_words(weights, pictures):
    evaluation, bad = evaluate(weights, str(pictures), screen=QUIET)
    assert bad == []
    rows = {row["label"]: row["num_images"] for row in evaluation.per_class() if row["num_images"]}
    info = ImageNetInfo()
    expected = {info.label_name_to_description(synset): 3 for synset in SYNSETS}
    assert rows == expected
    found = top_classes(weights, pictures)
    index = [info.label_names().index(synset) for synset in SYNSETS]
    hits = sum(found[number][0] == index[(number - 1) % 3] for number in found)
    assert evaluation.num_correct == hits


def test_classes_that_the_model_does_not_have_are_named(weights, pictures, tmp_path):
    for name in ("n01440764", "n00000001", "unicorn"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "data" / name / "a.png")
    with pytest.raises(DataError, match="2 of the classes: n00000001, unicorn"):
        evaluate(weights, str(tmp_path / "data"), screen=QUIET)


def test_real_accuracy_is_timms(weights, pictures, tmp_path):
    first = top_classes(weights, pictures, top=5)
    # Right at once, not at all, among five, one of two, no label.
    labels = [[first[1][0]], [999 if 999 not in first[2] else 998], [first[3][4]], [3, first[4][0]], []]
    labels += [[first[number][0]] for number in range(6, 10)]
    (tmp_path / "real.json").write_text(json.dumps(labels))
    evaluation, _ = evaluate(weights, str(pictures), labels=str(tmp_path / "real.json"), screen=QUIET)
    names = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, 10)]
    timms = RealLabelsImagenet(names, real_json=str(tmp_path / "real.json"))
    logits = torch.full((9, 1000), -9.0)
    for number, classes in first.items():
        logits[number - 1, classes] = torch.arange(5.0, 0.0, -1.0)
    timms.add_result(logits)
    assert evaluation.real == {
        "num_images": 8,
        "num_correct": 6,
        "top1": pytest.approx(timms.get_accuracy(1) / 100),
        "top5": pytest.approx(timms.get_accuracy(5) / 100),
        "num_left_out": 1,
    }
    assert evaluation.to_json()["real"] == evaluation.real
    assert evaluation.num_images == 9  # the folder's own labels are measured as ever
    (tmp_path / "real.json").write_text(json.dumps(labels[:7]))
    with pytest.raises(DataError, match="2 images are none of the 7"):
        evaluate(weights, str(pictures), labels=str(tmp_path / "real.json"), screen=QUIET)


def test_images_without_any_label_cannot_be_measured():
    predictions = Predictions(
        index=np.arange(1), label=np.zeros(1, np.int64), predicted=np.zeros(1, np.int64),
        confidence=np.ones(1), loss=np.ones(1), top5=np.zeros((1, 5), np.int64),
    )  # fmt: skip
    with pytest.raises(DataError, match="none of these images has a label"):
        accuracy_of_any(predictions, [frozenset()])


@pytest.mark.parametrize("fit", FITS)
def test_another_fit_replaces_the_weights_own_and_nothing_else(fit, weights, pictures, tmp_path):
    evaluation, _ = evaluate(weights, str(pictures), fit=fit, screen=QUIET)
    own, _ = evaluate(weights, str(pictures), screen=QUIET)
    assert evaluation.loss != own.loss
    opened = open_weights(weights)
    kind = {"resmall-crop": "crop"}.get(fit, fit)
    fraction = 1.0 if fit == "stretch" else 0.875
    preprocess = replace(opened.preprocess, fit=kind, crop_fraction=fraction)
    save_weights(tmp_path / "w", replace(opened, preprocess=preprocess))
    expected, _ = evaluate(tmp_path / "w", str(pictures), screen=QUIET)
    assert evaluation.loss == expected.loss
    with pytest.raises(UsageError, match="resize-crop, resmall-crop, stretch"):
        evaluate(weights, str(pictures), fit="squash", screen=QUIET)


def test_measuring_imagenet_21k_takes_no_table_of_all_pairs_of_classes():
    n, num_classes = 100, 21843
    rng = np.random.default_rng(0)
    predicted = rng.integers(0, num_classes, n)
    label = np.where(np.arange(n) < 40, predicted, rng.integers(0, num_classes, n))
    predictions = Predictions(
        index=np.arange(n), label=label, predicted=predicted, confidence=rng.random(n), loss=rng.random(n),
        top5=np.repeat(predicted[:, None], 5, axis=1),
    )  # fmt: skip
    names = tuple(str(number) for number in range(num_classes))
    tracemalloc.start()
    values = summarize(predictions, names).to_json()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6  # all pairs would be 3.8 GB
    assert values["num_correct"] == (label == predicted).sum()
    assert sum(row["num_correct"] for row in values["per_class"]) == values["num_correct"]
