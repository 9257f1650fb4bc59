"""The scripts of examples/ do what they say, on a few small images."""

import re
import runpy
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from PIL import Image
from sklearn.datasets import load_digits

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    digits = load_digits()
    for number in range(120):
        path = folder / ("even", "odd")[digits.target[number] % 2] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.kron(digits.images[number] * 15, np.ones((4, 4))).astype("uint8")).save(path)
    return folder


@pytest.fixture
def example(tmp_path, monkeypatch, capsys):
    """A function that runs a script of examples/ in `tmp_path`, and returns what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_a_folder_is_trained_on_and_its_images_are_named(photos, example):
    image = photos / "odd" / "1.png"
    told = example("train_and_predict.py", photos, image, "--steps", 2)
    assert "test accuracy" in told
    assert any(told.splitlines()[-1].startswith(f"{image}: {label} (") for label in ("even", "odd"))


@pytest.mark.slow  # an export
def test_weights_are_fine_tuned_and_the_export_runs_without_mixlab(photos, tmp_path, example):
    told = example("finetune_and_export.py", photos, "model.onnx", "--steps", 2)
    assert "model.onnx: " in told
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"pixels": np.zeros((1, 32, 32, 3), dtype=np.uint8)})
    assert logits.shape == (1, 2)


def test_models_are_compared_over_seeds(tmp_path, example):
    told = example("compare_models.py", "digits", "--models", "mixer_pico2", "--seeds", 2, "--steps", 2)
    assert re.fullmatch(r"mixer_pico2: [\d.]+ \+- [\d.]+ % \(n=2\), 72,714 parameters\n", told)
    assert len(list((tmp_path / "runs").iterdir())) == 2
