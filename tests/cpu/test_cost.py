"""The memory that `info` predicts is what a process comes to need."""

import json
import subprocess
import sys

import pytest
import torch

from mixlab.cpu.cost import measure_cost
from mixlab.cpu.memory import Hollow, LiveBytes
from mixlab.models.catalog import create_model
from mixlab.models.recompute import checkpoint_blocks

MEASURE = """
import json, sys, torch
from mixlab.device import current_memory_bytes, peak_memory_bytes, return_memory, set_threads
from mixlab.cpu.cost import measure_cost
from mixlab.models.recompute import checkpoint_blocks
from mixlab.bench.backends import build_model, inference, training
name, side, batch_size, train = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "train"
set_threads(2)
if "timm" in name:
    import timm
before = current_memory_bytes()
model = build_model(name, (side, side))
image = torch.randn(batch_size, 3, side, side)
if "again" in sys.argv:
    checkpoint_blocks(model)
    return_memory()
call = training("mixlab", model) if train else inference("mixlab", model.requires_grad_(False), image, 2)
with torch.set_grad_enabled(train):
    for _ in range(2):  # from the second on, the optimizer's state is there too
        call(image)
found = peak_memory_bytes()
cost = measure_cost(model, (side, side), batch_size=batch_size)
print(json.dumps([found, before + (cost.training_bytes if train else cost.inference_bytes)]))
"""


SIZES = [  # of the Mixer-S, a part of the batch for each core, and two
    ("mixer_nano4", 32, 128), ("mixer_s16", 224, 16), ("mixer_s16", 224, 32), ("timm/vit_small_patch16_224", 224, 16),
    ("timm/resnet18", 224, 32),
]  # fmt: skip


@pytest.mark.slow  # interpreters of their own, real models
@pytest.mark.parametrize(
    ("name", "side", "batch_size", "mode", "again"),
    [
        *((*size, mode, "") for size in SIZES for mode in ("train", "inference")),
        ("mixer_s16", 224, 16, "train", "again"),  # where nothing is trained, nothing is computed again
        ("timm/vit_small_patch16_224", 224, 16, "train", "again"),
    ],
)
def test_peak_memory_is_predicted(name, side, batch_size, mode, again):
    command = [sys.executable, "-c", MEASURE, name, str(side), str(batch_size), mode, again]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    found, predicted = json.loads(run.stdout)
    # 15 % on the machine it was measured on (docs/memory.md); another allocator or processor may differ more.
    assert 0.7 < predicted / found < 1.4


def test_a_batch_that_is_computed_in_parts_needs_little_more():
    small, large = (
        measure_cost(create_model("mixer_micro4"), (32, 32), batch_size=batch_size) for batch_size in (256, 1024)
    )  # fmt: skip
    assert large.training_bytes - small.training_bytes == 768 * 4 * 3 * 32 * 32
    assert large.macs == small.macs


def test_bytes_are_counted_while_their_tensor_is_there():
    with LiveBytes() as live:
        a = torch.zeros(100, dtype=torch.float32)
        view = a.view(10, 10)
        b = view + 1
        assert live.now == 800
        del a, b
        assert live.now == 400  # the view holds its memory
        del view
        assert live.now == 0
        torch.zeros(50)
    assert live.most == 800


def test_memory_of_another_model_is_that_of_its_tensors():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(8, 8192, bias=False), torch.nn.ReLU())
    hollow = Hollow(model, (2, 4), 1)
    hidden, gradient = 4 * 64 * 8192, 4 * 8 * 8192
    assert hollow.infer(64) == 2 * hidden  # before and after the ReLU
    assert hollow.infer(32) == hidden
    assert 3 * hidden <= hollow.train(64) <= 6 * hidden + gradient
    assert next(model.parameters()).untyped_storage().nbytes() == gradient  # the model itself is as it was
    assert next(model.parameters()).grad is None


@pytest.mark.parametrize(
    "name", ["timm/vit_tiny_patch16_224", pytest.param("timm/resnet10t", marks=pytest.mark.slow), "mixer_s16"]
)
def test_computing_again_and_in_parts_is_predicted_to_need_less(name):
    def bytes_of_training(again: bool, accumulate: int, **options) -> int:
        with torch.device("meta"):
            model = create_model(name, image_size=64, num_classes=10)
        if again:
            checkpoint_blocks(model)
        cost = measure_cost(model, (64, 64), batch_size=256, accumulate=accumulate, **options)
        return cost.training_bytes - 4 * cost.weights_bytes

    plain, again, parts = (bytes_of_training(*key, fast=False) for key in ((False, 1), (True, 1), (False, 4)))
    assert again < 0.95 * plain
    assert parts < 0.5 * plain
    if name.startswith("mixer"):
        assert bytes_of_training(True, 1) < bytes_of_training(False, 1) < plain


def test_attention_is_counted():
    with torch.device("meta"):
        model = create_model("timm/vit_small_patch16_224")
    cost = measure_cost(model, (224, 224))
    tokens, width, depth = 197, 384, 12
    block = tokens * width * 12 * width + 2 * tokens**2 * width
    assert cost.macs == depth * block + 196 * 768 * width + width * 1000
