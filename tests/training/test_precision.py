"""`precision: auto`: bf16 only where mixlab's own passes compute it on a processor that multiplies it faster."""

from dataclasses import replace

import pytest
import torch

import mixlab.training.engines.by_cpu
import mixlab.training.setup
from mixlab.models.catalog import ModelConfig, create_model
from mixlab.training.objectives.labels import Labels
from mixlab.training.recipe import Recipe
from mixlab.training.setup import pick_precision
from mixlab.training.step import TrainState

CPU = torch.device("cpu")
RECIPE = Recipe(model=ModelConfig(name="mixer_pico2"), precision="auto", steps=1)


@pytest.mark.parametrize(
    ("changes", "device", "num_processes", "is_faster", "expected"),
    [
        ({}, "cpu", 1, True, "bf16"),
        ({"model": ModelConfig(name="mixer_pyramid_micro2")}, "cpu", 1, True, "bf16"),
        ({}, "cpu", 1, False, "fp32"),
        ({}, "cpu", 2, True, "fp32"),
        ({"virtual_shards": 8}, "cpu", 1, True, "fp32"),
        ({}, "cuda", 1, True, "fp32"),
        ({"fast": False}, "cpu", 1, True, "fp32"),
        ({"compile": True}, "cpu", 1, True, "fp32"),
        ({"model": ModelConfig(name="timm/resnet18")}, "cpu", 1, True, "fp32"),
        ({"precision": "bf16"}, "cpu", 2, False, "bf16"),
        ({"precision": "fp32"}, "cpu", 1, True, "fp32"),
    ],
)
def test_what_auto_becomes(monkeypatch, changes, device, num_processes, is_faster, expected):
    monkeypatch.setattr(mixlab.training.setup, "is_bf16_faster", lambda: is_faster)
    recipe = replace(RECIPE, **changes)
    assert pick_precision(recipe, torch.device(device), num_processes).precision == expected


@pytest.mark.parametrize(
    ("precision", "multiplies", "dtype"),
    [
        ("fp32", True, torch.float32),
        ("bf16", True, torch.bfloat16),
        ("bf16", False, None),
    ],
)
def test_the_passes_that_a_training_takes(monkeypatch, precision, multiplies, dtype):
    monkeypatch.setattr(mixlab.training.engines.by_cpu, "multiplies_bf16", lambda: multiplies)
    model = create_model("mixer_pico2", num_classes=10, image_size=8, in_channels=1)
    state = TrainState(model, replace(RECIPE, precision=precision), Labels(RECIPE.loss, None, 10), CPU)
    cores = getattr(state.engine, "cores", None)
    assert (cores and cores._model.dtype) == dtype
