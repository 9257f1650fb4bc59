"""Another modality, of sequences of numbers: registered here, and trained, resumed, measured, used and exported."""

import csv
import os
import signal
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
import torch

import mixlab
from mixlab.checkpoint.open import open_weights
from mixlab.data.check import check
from mixlab.data.images.modality import IMAGES
from mixlab.data.modality import MODALITIES, Modality, Preprocess, register
from mixlab.data.random import Purpose, uniform
from mixlab.data.sources import open_source
from mixlab.errors import ExampleError, UsageError, WeightsError
from mixlab.exports.export import export, open_exported
from mixlab.records import take
from mixlab.report.screen import Screen
from mixlab.training.evaluate import evaluate
from mixlab.training.signals import Interrupted

LENGTH, CLASSES = 16, ("falling", "rising", "wave")
OPTIONS = {
    "steps": 12,
    "epochs": None,
    "batch_size": 16,
    "screen": Screen(quiet=True),
    "keep_weights": "last",
}
OPTIONS |= {"model__name": "mixer_pico1", "device": "cpu"}


@dataclass(frozen=True, kw_only=True)
class NumbersPreprocess(Preprocess):
    length: int

    modality_name: ClassVar[str] = "numbers"
    kept_dtype: ClassVar[type] = np.int16
    channels: ClassVar[int] = 1

    @property
    def input_size(self):
        return (1, self.length)

    @property
    def kept_shape(self):
        return (self.length,)

    def keep(self, example):
        places = np.linspace(0, len(example) - 1, self.length)
        return np.interp(places, np.arange(len(example)), example).astype(np.int16)

    def to_input(self, kept):
        return kept[:, None, None].float() / 100

    def to_json(self):
        return {"modality": "numbers", "length": self.length}

    @classmethod
    def from_json(cls, values, where="config.json"):
        return cls(length=take(values, "length", int, where, low=1, high=4096))


class Numbers(Modality):
    name, one, many = "numbers", "sequence", "sequences"
    suffixes = frozenset((".numbers",))
    preprocess_type = NumbersPreprocess

    def decode(self, content, preprocess=None):
        try:
            return np.array([int(word) for word in content.split()], dtype=np.int16)
        except ValueError as error:
            raise ExampleError(f"no sequence: {error}") from None

    def resolve(self, data, settings, train, needs):
        return replace(data, image_size=data.image_size or (1, LENGTH), channels=1), settings

    def preprocess(self, data, settings):
        return NumbersPreprocess(length=data.image_size[1])

    def augment(self, kept, settings, *, seed, epoch, index):
        louder = 1 + (uniform(seed, epoch, index, Purpose.CROP, 1) - 0.5) / 2
        return (kept * torch.from_numpy(louder)).to(torch.int16)

    def describe(self, content, look):
        return {"length": len(look.example)}

    def summarize(self, facts):
        return {"longest": max(fact["length"] for fact in facts)}


class StoppingNumbers(Numbers):
    """Sends this process a signal while it makes a batch, in the middle of a training."""

    num_batches = 0

    def augment(self, kept, settings, *, seed, epoch, index):
        self.num_batches += 1
        if self.num_batches == 10:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().augment(kept, settings, seed=seed, epoch=epoch, index=index)


@pytest.fixture(autouse=True)
def registered():
    register(Numbers())
    yield
    del MODALITIES["numbers"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("sequences")
    draw = np.random.default_rng(0)
    shapes = {
        "falling": 1 - np.linspace(0, 1, 20),
        "rising": np.linspace(0, 1, 20),
        "wave": np.arange(20) % 2,
    }
    for name, shape in shapes.items():
        (root / name).mkdir()
        for number in range(30):
            values = 100 * shape + draw.normal(0, 10, 20)
            (root / name / f"{number}.numbers").write_text(" ".join(str(int(value)) for value in values))
    (root / "rising" / "broken.numbers").write_text("one two")
    (root / "rising" / "cover.jpg").write_bytes(b"an image among sequences is left out")
    return root


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    register(Numbers())
    path = tmp_path_factory.mktemp("runs") / "run"
    return path, mixlab.train(folder, "auto", run=path, **OPTIONS)


def test_a_folder_is_known_by_what_most_of_its_files_are(folder):
    source = open_source(folder)
    assert (source.modality.name, source.class_names, len(source)) == ("numbers", CLASSES, 91)
    assert [(one.reason, one.examples[0].endswith("cover.jpg")) for one in source.skipped] == [("text", True)]


def test_it_is_checked(folder):
    found = check(open_source(folder)).to_json()
    assert (found["num_ok"], found["longest"]) == (90, 20)
    assert found["bad"][0]["reason"].startswith("no sequence: ")


def test_it_trains_and_reports(run):
    path, result = run
    assert result["test"]["top1"] > 0.8
    (bad,) = csv.DictReader((path / "bad_files.csv").read_text().splitlines())
    assert bad["path"].endswith("broken.numbers")
    assert "training sequences" in (path / "report.html").read_text()


def test_its_report_shows_what_the_model_saw(folder, tmp_path):
    mixlab.train(folder, "auto", run=tmp_path / "run", **OPTIONS | {"steps": 2, "figures": True})
    assert (tmp_path / "run" / "figures" / "samples.png").is_file()


def test_stopped_and_resumed_it_has_the_same_bits(run, folder, tmp_path):
    register(StoppingNumbers())
    with pytest.raises(Interrupted):
        mixlab.train(folder, "auto", run=tmp_path / "run", **OPTIONS)
    register(Numbers())
    mixlab.resume(tmp_path / "run", screen=OPTIONS["screen"], figures=False)
    whole, cut = (open_weights(path).model.state_dict() for path in (run[0], tmp_path / "run"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_it_is_measured_as_when_it_was_trained(run):
    path, result = run
    evaluation, bad = evaluate(path, screen=OPTIONS["screen"])
    assert (evaluation.top1, bad) == (result["test"]["top1"], [])


def test_it_predicts_files_bytes_and_folders(run, folder, tmp_path):
    classifier = mixlab.load(run[0])
    paths = [folder / name / "3.numbers" for name in CLASSES]
    rows = classifier.predict([*paths, (folder / "wave" / "4.numbers").read_bytes()], top=1)
    assert [row["predictions"][0]["label"] for row in rows] == [*CLASSES, "wave"]
    assert len(classifier.predict(folder / "rising")) == 31
    assert "no sequence" in classifier.predict(folder / "rising" / "broken.numbers")[0]["error"]
    with pytest.raises(UsageError, match="the bytes of a file, a binary file object, or"):
        classifier.predict(3.5)


def test_an_exported_model_takes_kept_sequences_and_has_the_same_logits(run, folder, tmp_path):
    pytest.importorskip("onnxscript")
    weights = open_weights(run[0])
    decoded = [Numbers().decode((folder / name / "5.numbers").read_bytes()) for name in CLASSES]
    result = export(weights, tmp_path / "model.onnx", to="onnx", examples=decoded)
    assert (result["input"], result["same_top1"]) == ("examples", result["num_compared"])
    kept = np.stack([weights.preprocess.keep(one) for one in decoded])
    logits = open_exported(tmp_path / "model.onnx", "onnx")(kept)
    assert [CLASSES[i] for i in logits.argmax(axis=1)] == list(CLASSES)


def test_the_server_says_at_the_door_what_it_is_not_made_for(run):
    pytest.importorskip("starlette")
    from mixlab.serving.service import Limits, Service

    with pytest.raises(UsageError, match="the server is not made for weights that take sequences"):
        Service(mixlab.load(run[0]), "numbers", Limits())


def test_weights_of_an_unknown_modality_are_refused_by_name(run):
    del MODALITIES["numbers"]
    with pytest.raises(WeightsError, match="these weights take 'numbers', which this mixlab does not know"):
        mixlab.load(run[0])
    register(Numbers())


def test_weights_and_data_of_two_modalities_do_not_go_together(run):
    with pytest.raises(UsageError, match="the data has images, and these weights take sequences"):
        evaluate(run[0], "digits", screen=OPTIONS["screen"])
    with pytest.raises(UsageError, match="these weights take sequences, and the data has images"):
        mixlab.finetune("digits", run[0], screen=OPTIONS["screen"])
    assert IMAGES.name == "images"
