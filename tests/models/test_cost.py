"""The memory that `info` predicts is what a process comes to need."""

import json
import subprocess
import sys

import pytest

from mixlab.models.catalog import create_model
from mixlab.models.cost import measure_cost

MEASURE = """
import json, sys, torch
from mixlab.device import current_memory_bytes, peak_memory_bytes, set_threads
from mixlab.models.cost import measure_cost
from mixlab.serving.backends import build_model, inference, training
name, side, batch_size, train = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "train"
set_threads(2)
before = current_memory_bytes()
model = build_model(name, (side, side))
image = torch.randn(batch_size, 3, side, side)
call = training("mixlab", model) if train else inference("mixlab", model.requires_grad_(False), image, 2)
with torch.set_grad_enabled(train):
    for _ in range(3):
        call(image)
found = peak_memory_bytes()
cost = measure_cost(model, (side, side), batch_size=batch_size)
print(json.dumps([found, before + (cost.training_bytes if train else cost.inference_bytes)]))
"""


@pytest.mark.slow  # interpreters of their own, real models
@pytest.mark.parametrize("mode", ["train", "inference"])
@pytest.mark.parametrize(
    ("name", "side", "batch_size"), [("mixer_nano4", 32, 128), ("mixer_s16", 224, 16), ("mixer_s16", 224, 64)]
)
def test_peak_memory_is_predicted(name, side, batch_size, mode):
    command = [sys.executable, "-c", MEASURE, name, str(side), str(batch_size), mode]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    found, predicted = json.loads(run.stdout)
    # 15 % on the machine it was measured on; another allocator or processor may differ more.
    assert 0.7 < predicted / found < 1.4


def test_a_batch_that_is_computed_in_parts_needs_little_more():
    small, large = (
        measure_cost(create_model("mixer_micro4"), (32, 32), batch_size=batch_size) for batch_size in (256, 1024)
    )  # fmt: skip
    assert large.training_bytes - small.training_bytes == 768 * 4 * 3 * 32 * 32
    assert large.macs == small.macs
