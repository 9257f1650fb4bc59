"""Speed measured beside others: that all compute the same, and that the table says what was measured."""

import itertools
import json
import os
from pathlib import Path

import pytest
import torch

from mixlab.bench import bench as module
from mixlab.bench.backends import build_model, inference, timm_twin, training
from mixlab.bench.bench import bench
from mixlab.cli import run_command
from mixlab.commands.context import Context
from mixlab.cpu.inference import FastMixer
from mixlab.errors import UsageError
from mixlab.models.catalog import create_model

SMALL = {"image_size": (8, 8), "batch_size": 4, "threads": 1, "rounds": 2, "gemm_side": 512}


OWN = ("mixlab", "eager", "timm")  # others take seconds to make a graph


@pytest.mark.parametrize(
    ("backend", "gelu"),
    [
        *itertools.product(OWN, ["tanh", "erf"]),
        ("onnxruntime", "tanh"),
        *(
            pytest.param(*one, marks=pytest.mark.slow)
            for one in (("onnxruntime", "erf"), ("openvino", "tanh"), ("openvino", "erf"))
        ),
    ],
)
def test_every_backend_computes_the_models_logits(backend, gelu):
    torch.manual_seed(0)
    model = create_model("mixer_pico2", num_classes=5, image_size=(8, 12), num_blocks=2, gelu=gelu).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    image = torch.randn(6, 3, 8, 12)
    with torch.no_grad():
        call = inference(backend, model, image[:2], threads=1)
        for part in (image, image[:1]):  # the batch axis is free
            assert (call(part) - model(part)).abs().max() < 1e-4


@pytest.mark.slow  # two graphs
def test_eight_bits_compute_nearly_the_models_logits():
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = create_model("mixer_pico2", num_classes=5, image_size=(8, 12), num_blocks=2).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    image = torch.randn(16, 3, 8, 12)
    with torch.no_grad():
        expected = model(image)
        found = inference("onnxruntime-int8", model, image, threads=1)(image)
    error = (found - expected).square().mean().sqrt() / expected.std()
    assert 1e-4 < error < 0.2


def test_the_models_of_all_processes_are_the_same_and_do_not_answer_zero():
    first, second = build_model("mixer_pico2", (8, 8)), build_model("mixer_pico2", (8, 8))
    image = torch.randn(2, 3, 8, 8)
    assert torch.equal(first(image), second(image))
    assert first(image).abs().max() > 0.01
    assert timm_twin(first).__class__.__module__ == "timm.models.mlp_mixer"
    assert isinstance(inference("mixlab", first, image, 1), FastMixer)


@pytest.mark.parametrize("gelu", ["tanh", "erf"])
def test_every_training_step_has_the_same_loss_and_the_same_second_one(gelu):
    image = torch.randn(6, 3, 8, 8)
    losses = {}
    for backend in ("mixlab", "eager", "timm"):
        step = training(backend, build_model("mixer_pico2", (8, 8), gelu=gelu))
        losses[backend] = torch.stack([step(image), step(image)])
        assert losses[backend][1] < losses[backend][0]
    for found in losses.values():
        assert (found - losses["timm"]).abs().max() < 1e-5


def test_the_authors_code_computes_the_same():
    pytest.importorskip("flax", reason="the authors' code needs jax, flax and einops")
    code = os.environ.get("MIXLAB_OFFICIAL_CODE")
    if not code:
        pytest.skip("MIXLAB_OFFICIAL_CODE names no checkout of the authors' code")
    model = build_model("mixer_pico2", (8, 12))
    image = torch.randn(6, 3, 8, 12)
    with torch.no_grad():
        assert (inference("jax", model, image, 1, Path(code))(image) - model(image)).abs().max() < 1e-4
    ours, theirs = training("mixlab", model), training("jax", build_model("mixer_pico2", (8, 12)), Path(code))
    for _ in range(3):
        assert abs(float(ours(image)) - float(theirs(image))) < 1e-5


@pytest.mark.parametrize("backend", ["timm", "jax"])
def test_a_pyramid_is_nothing_that_others_have(backend):
    model = build_model("mixer_pyramid_micro2", (8, 8))
    with pytest.raises(UsageError, match=r"timm has no model like|plain Mixers"):
        inference(backend, model, torch.zeros(1, 3, 8, 8), 1, None)


def test_the_authors_code_must_be_named():
    with pytest.raises(UsageError, match="authors' code is needed"):
        inference("jax", build_model("mixer_pico2", (8, 8)), torch.zeros(1, 3, 8, 8), 1, None)


@pytest.mark.slow  # several interpreters
def test_a_row_for_each_backend_with_ratios_of_rounds():
    rows = bench("mixer_pico2", ("eager", "timm"), **SMALL)
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
    rows = bench("mixer_pico2", ("timm",), train=True, **SMALL)
    assert {row["mode"] for row in rows} == {"train"}


@pytest.mark.slow  # several interpreters
def test_a_backend_that_cannot_or_computes_something_else_is_said(monkeypatch):
    with pytest.raises(UsageError, match="no backend 'tensorrt'"):
        bench("mixer_pico2", ("tensorrt",), **SMALL)
    monkeypatch.setattr(module, "TOLERANCE", -1.0)
    rows = bench("mixer_pico2", ("eager",), **SMALL)
    assert "logits differ" in rows[1]["error"]
    with pytest.raises(UsageError, match="not a multiple of patch_size"):
        bench("mixer_pico2", ("eager",), **(SMALL | {"image_size": (9, 9)}))


@pytest.mark.slow  # several interpreters
def test_the_command_prints_one_object(capsys, monkeypatch):
    monkeypatch.setattr(Context, "json", True)
    status = run_command(["bench", "mixer_pico2", "--against", "none", "--rounds", "1", "--batch-size", "2"])
    value = json.loads(capsys.readouterr().out)
    assert status == 0
    assert value["rows"][0]["backend"] == "mixlab"
    assert value["machine"]["cores"] >= 1


def test_models_for_sounds_are_measured_only_at_a_size_that_is_given():
    with pytest.raises(UsageError, match="this model is for sounds"):
        run_command(["bench", "mixer_sound1", "--against", "none"])
