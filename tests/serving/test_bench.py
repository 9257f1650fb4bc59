"""Speed measured beside others: that all compute the same, and that the table says what was measured."""

import json

import pytest
import torch

from mixlab.cli import run_command
from mixlab.commands.context import Context
from mixlab.errors import UsageError
from mixlab.models.catalog import create_model
from mixlab.models.fast import FastMixer
from mixlab.serving import bench as module
from mixlab.serving.bench import _model, _timm_twin, bench, prepare

SMALL = {"image_size": (8, 8), "batch_size": 4, "threads": 1, "rounds": 2}


@pytest.mark.parametrize("backend", ["mixlab", "eager", "timm", "onnxruntime", "openvino"])
@pytest.mark.parametrize("gelu", ["tanh", "erf"])
def test_every_backend_computes_the_models_logits(backend, gelu):
    torch.manual_seed(0)
    model = create_model("mixer_pico2", num_classes=5, image_size=(8, 12), gelu=gelu).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    image = torch.randn(6, 3, 8, 12)
    with torch.no_grad():
        call = prepare(backend, model, image[:2], threads=1)
        for part in (image, image[:1]):  # the batch axis is free
            assert (call(part) - model(part)).abs().max() < 1e-4


def test_the_models_of_all_processes_are_the_same_and_do_not_answer_zero():
    first, second = _model("mixer_pico2", (8, 8)), _model("mixer_pico2", (8, 8))
    image = torch.randn(2, 3, 8, 8)
    assert torch.equal(first(image), second(image))
    assert first(image).abs().max() > 0.01
    assert _timm_twin(first).__class__.__module__ == "timm.models.mlp_mixer"
    assert isinstance(prepare("mixlab", first, image, 1), FastMixer)


@pytest.mark.slow  # several interpreters
def test_a_row_for_each_backend_with_ratios_of_rounds():
    rows = bench(("mixer_pico2",), ("eager", "timm"), **SMALL)
    assert [row["backend"] for row in rows] == ["mixlab", "eager", "timm"]
    assert rows[0]["ratio"].keys() == {"eager", "timm"}
    for row in rows:
        assert row["images_per_second"] == pytest.approx(4000 / row["ms_per_batch"])
        assert 0 < row["peak_share"] < 1.2
        assert row["peak_memory_bytes"] > 50e6
    low, high = rows[0]["ratio_range"]["timm"]
    assert low <= rows[0]["ratio"]["timm"] <= high


@pytest.mark.slow  # several interpreters
def test_training_steps_are_measured_too():
    rows = bench(("mixer_pico2",), ("timm",), train=True, **SMALL)
    assert {row["mode"] for row in rows} == {"train"}


@pytest.mark.slow  # several interpreters
def test_a_backend_that_cannot_or_computes_something_else_is_said(monkeypatch):
    with pytest.raises(UsageError, match="no backend 'tensorrt'"):
        bench(("mixer_pico2",), ("tensorrt",), **SMALL)
    monkeypatch.setattr(module, "TOLERANCE", -1.0)
    rows = bench(("mixer_pico2",), ("eager",), **SMALL)
    assert "logits differ" in rows[1]["error"]
    with pytest.raises(UsageError, match="not a multiple of patch_size"):
        bench(("mixer_pico2",), ("eager",), **(SMALL | {"image_size": (9, 9)}))


@pytest.mark.slow  # several interpreters
def test_the_command_prints_one_object(capsys, monkeypatch):
    monkeypatch.setattr(Context, "json", True)
    status = run_command(["bench", "mixer_pico2", "--against", "none", "--rounds", "1", "--batch-size", "2"])
    value = json.loads(capsys.readouterr().out)
    assert status == 0
    assert value["rows"][0]["backend"] == "mixlab"
    assert value["machine"]["cores"] >= 1
