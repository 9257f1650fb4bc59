"""The inference copy answers as the model does, for every shape, and leaves the process as it was."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from torch import nn

from mixlab.cpu.inference import FastMixer, fast
from mixlab.models.catalog import create_model


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def trained(name: str, size: tuple[int, int], **options) -> nn.Module:
    """A model whose every parameter is drawn, so that nothing that is left out goes unseen."""
    torch.manual_seed(1)
    model = create_model(name, num_classes=7, image_size=size, **options).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2 if parameter.ndim == 1 else parameter[0].numel() ** -0.5)
    return model


@pytest.mark.parametrize("num_images", [1, 2, 3, 37])
@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        ("mixer_micro4", (32, 32), {}),
        ("mixer_pico2", (8, 12), {"in_channels": 1}),
        ("mixer_nano4", (28, 20), {"gelu": "erf", "layer_norm_eps": 1e-5, "num_blocks": 2}),
    ],
)
def test_logits_are_the_models(num_images, name, size, options, threads):
    model = trained(name, size, **options)
    image = torch.randn(num_images, options.get("in_channels", 3), *size)
    with torch.inference_mode():
        expected = model(image)
    found = fast(model)(image)
    assert expected.abs().max() > 0.05
    assert (found - expected).abs().max() < 1e-4
    assert found.shape == expected.shape
    assert torch.get_num_threads() == threads


def test_wide_layers_and_many_chunks(threads):
    model = trained("mixer_s16", (112, 112), num_blocks=2)
    image = torch.randn(5, 3, 112, 112)
    copy = fast(model)
    copy.chunk = 2
    with torch.inference_mode():
        assert (copy(image) - model(image)).abs().max() < 1e-4


def test_the_copy_is_of_this_moment_and_cannot_be_trained():
    model = trained("mixer_pico2", (8, 8))
    image = torch.randn(2, 3, 8, 8)
    copy = fast(model)
    before = copy(image)
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.blocks[0].token_norm.weight)
    assert torch.equal(copy(image), before)
    assert isinstance(copy, FastMixer)
    assert list(copy.parameters()) == []


def test_what_has_no_fast_copy_is_left_as_it_is():
    for model in (
        create_model("mixer_pico2", num_classes=3, image_size=(8, 8), token_mixing="untied"),
        create_model("mixer_pico2", num_classes=3, image_size=(8, 8)).double(),
        nn.Linear(2, 2),
    ):
        assert fast(model) is model


def test_several_threads_may_ask_at_once():
    model = trained("mixer_micro4", (32, 32))
    copy = fast(model)
    images = [torch.randn(9, 3, 32, 32) for _ in range(6)]
    with torch.inference_mode():
        expected = [model(image) for image in images]
    found: list = [None] * 6
    callers = [
        threading.Thread(target=lambda i=i: found.__setitem__(i, copy(images[i]))) for i in range(len(images))
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert all((one - other).abs().max() < 1e-4 for one, other in zip(found, expected, strict=True))


def test_a_forked_process_makes_threads_of_its_own(threads):
    model = trained("mixer_pico2", (8, 8))
    copy, image = fast(model), torch.randn(9, 3, 8, 8)
    expected = copy(image)
    child = os.fork()
    if not child:
        torch.set_num_threads(threads)
        os._exit(0 if torch.equal(copy(image), expected) else 1)
    deadline = time.monotonic() + 30
    while not (done := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < deadline:
        time.sleep(0.01)
    if not done[0]:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert done == (child, 0)


@pytest.mark.skipif(
    not os.path.isdir("/proc/self/task"), reason="counts the threads of a process as Linux does"
)
def test_each_core_computes_alone():
    """A thread of the pool that shares its work with threads of its own has the cores wait for each other."""
    code = """
import os, torch
from mixlab.models.catalog import create_model
from mixlab.threads import pool_of_cores
from mixlab.cpu.inference import fast
torch.set_num_threads(2)
model = create_model("mixer_micro4", num_classes=10).eval()
image = torch.randn(64, 3, 32, 32)
with torch.no_grad():
    model(image)  # the threads of torch itself
before = len(os.listdir("/proc/self/task"))
pool_of_cores(2)
fast(model)(image)
print(len(os.listdir("/proc/self/task")) - before)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "2"
