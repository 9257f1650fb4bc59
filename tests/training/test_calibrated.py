"""The temperature from the validation split to everything that gives probabilities."""

import csv
import json
import subprocess
import sys
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import mixlab
from mixlab.checkpoint.convert import convert
from mixlab.checkpoint.open import open_weights
from mixlab.checkpoint.store import load_weights, save_weights
from mixlab.cli import main
from mixlab.data.images.samples import sample_images
from mixlab.errors import WeightsError
from mixlab.evaluation.calibration import fit_temperature
from mixlab.evaluation.metrics import Predictions
from mixlab.exports.package import write_package
from mixlab.report.screen import Screen
from mixlab.serving.service import Limits, Service
from mixlab.training.calibrated import calibrated
from mixlab.training.choose_split import choose_split
from mixlab.training.evaluate import evaluate

QUIET = Screen(quiet=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    mixlab.train("digits", "digits", run=folder, epochs=6, threads=1, screen=QUIET, figures=False)
    return folder


def command(arguments):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return ended.value.code or 0


@pytest.fixture
def photo(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)).save(
        tmp_path / "a.png"
    )
    return str(tmp_path / "a.png")


def test_what_validation_says_travels_with_the_weights(run):
    weights = load_weights(run)
    config = json.loads((run / "config.json").read_text())
    assert config["temperature"] == weights.temperature != 1
    assert config["thresholds"] == list(weights.thresholds)
    raw, _ = evaluate(run, split="val", calibrated=False, screen=QUIET)
    cooked, _ = evaluate(run, split="val", screen=QUIET)
    assert (raw.top1, raw.loss) == (cooked.top1, cooked.loss)
    assert cooked.ece_raw == raw.ece == raw.ece_raw
    assert cooked.ece < raw.ece
    for row in cooked.coverage:  # on the split that chose them, all is as promised
        assert row["coverage"] == pytest.approx(row["coverage_promised"], abs=1e-3)
        assert row["accuracy"] >= row["target"]
    assert raw.coverage == []


def test_the_test_split_changes_nothing(run):
    """Fitted again from the logits of the validation split alone, it is the same."""
    weights = load_weights(run)
    classifier = mixlab.load(run, device="cpu")
    _, split = choose_split(run, None, "val", None, QUIET, moved_to=None)
    kept = np.stack([weights.preprocess.keep(image) for image in split.arrays])
    with torch.inference_mode():
        logits = classifier.model(weights.preprocess.to_input(torch.from_numpy(kept)))
    assert fit_temperature(logits, torch.from_numpy(split.labels)) == pytest.approx(
        weights.temperature, rel=1e-3
    )


def test_no_temperature_makes_a_hardly_trained_model_surer_than_it_is(run):
    """Its first guess is always the same class, its second is the right one: the likelihood wants both much surer."""
    label = np.arange(200) % 10
    logits = np.zeros((200, 10), dtype=np.float32)
    logits[np.arange(200), label] = 0.25
    logits[:, 0] += 0.3
    predicted = logits.argmax(1)
    wanted = fit_temperature(torch.from_numpy(logits), torch.from_numpy(label))
    assert wanted < 0.3
    found = calibrated(
        load_weights(run),
        Predictions(
            index=np.arange(200),
            label=label,
            predicted=predicted,
            confidence=np.zeros(200),
            loss=np.zeros(200),
            top5=np.zeros(200),
            logits=logits,
        ),
    )
    assert found.temperature == 1.0


def test_a_prediction_divides_the_logits_and_keeps_the_order(run, photo):
    classifier = mixlab.load(run, device="cpu")
    (row,), (raw,) = classifier.predict(photo, top=10), classifier.predict(photo, top=10, calibrated=False)
    labels = [guess["label"] for guess in row["predictions"]]
    assert labels == [guess["label"] for guess in raw["predictions"]]
    logits = torch.tensor([guess["probability"] for guess in raw["predictions"]]).log()
    expected = (logits / classifier.temperature).softmax(dim=0).tolist()
    assert [guess["probability"] for guess in row["predictions"]] == pytest.approx(expected, abs=1e-5)
    service = Service(classifier, "a-model", Limits(decoders=1))
    pixels = classifier.preprocess.read(photo)[None].copy()
    assert service.classify(pixels)[0].max() == pytest.approx(row["predictions"][0]["probability"], abs=1e-6)


@pytest.mark.slow  # an export, and a process
def test_a_package_gives_the_same_probabilities(run, photo, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    weights = load_weights(run)
    write_package(weights, tmp_path / "model.zip", "# Card\n", sample_images(8, (8, 8)))
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        archive.extractall(tmp_path / "out")
    done = subprocess.run(
        [sys.executable, tmp_path / "out" / "predict.py", photo], capture_output=True, text=True, check=True
    )
    best = mixlab.load(run, device="cpu").predict(photo)[0]["predictions"][0]
    assert f"{best['label']} {100 * best['probability']:.1f} %" in done.stdout


def test_weights_keep_it_through_another_format_and_back(run, tmp_path):
    weights = load_weights(run)
    convert(weights, tmp_path / "weights.npz", format="official", accept_gelu_change=True)
    assert open_weights(str(tmp_path / "weights.npz")).temperature == weights.temperature
    save_weights(tmp_path / "again", weights)
    again = load_weights(tmp_path / "again")
    assert (again.temperature, again.thresholds) == (weights.temperature, weights.thresholds)


def test_weights_without_it_say_nothing_of_it(run, tmp_path):
    save_weights(tmp_path / "old", replace(load_weights(run), temperature=1.0, thresholds=()))
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    assert not {"temperature", "thresholds"} & config.keys()
    assert mixlab.load(tmp_path / "old").temperature == 1


@pytest.mark.parametrize("changes", [{"temperature": 0.0}, {"temperature": "hot"}, {"thresholds": [0.9]}])
def test_a_temperature_that_cannot_be_is_refused(run, tmp_path, changes):
    # Weights whose metadata name what is in config.json: only what it says is wrong.
    folder = tmp_path / "w"
    weights = load_weights(run)
    values = {"temperature": weights.temperature, "thresholds": weights.thresholds} | changes
    save_weights(folder, replace(weights, **values))
    with pytest.raises(WeightsError, match=next(iter(changes))):
        load_weights(folder)


def test_without_validation_there_is_no_temperature_and_the_report_says_so(tmp_path):
    result = mixlab.train(
        "digits", "digits", run=tmp_path / "run", steps=3, val_fraction=0, screen=QUIET, figures=False
    )
    assert result["test"]["temperature"] == 1
    assert result["test"]["coverage"] == []
    assert result["test"]["ece"] == result["test"]["ece_raw"]
    html = (tmp_path / "run" / "report.html").read_text()
    assert "no validation split to fit a temperature on" in html


def test_predict_marks_what_is_below_the_confidence(run, photo, tmp_path, capsys):
    path = tmp_path / "out.csv"
    for least, unsure in (("1", True), ("0", False)):
        assert (
            command(["predict", str(run), photo, "--csv", str(path), "--min-confidence", least, "--json"])
            == 0
        )
        result = json.loads(capsys.readouterr().out)
        assert (result["images"][0]["unsure"], result["num_unsure"]) == (unsure, int(unsure))
        with open(path) as file:
            assert {row["unsure"] for row in csv.DictReader(file)} == {str(unsure).lower()}
    assert command(["predict", str(run), photo, "--min-confidence", "0"]) == 0
    assert "0 of 1 images are unsure" in capsys.readouterr().out
    assert command(["predict", str(run), photo, "--min-confidence", "81"]) == 2
    assert "between 0 and 1" in capsys.readouterr().err


def test_evaluate_says_what_was_promised_and_what_is_found(run, capsys):
    assert command(["evaluate", str(run)]) == 0
    said = capsys.readouterr().out
    assert "probabilities are calibrated" in said
    assert "need no second look" in said
    assert command(["evaluate", str(run), "--raw-probabilities", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["temperature"], result["coverage"]) == (1, [])
    assert result["top1_interval"][0] < result["top1"] < result["top1_interval"][1]
