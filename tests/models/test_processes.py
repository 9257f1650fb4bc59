"""Processes that compute parts of a batch: the bits of threads, whoever computed what; no end goes unnoticed."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mixlab.errors import TrainingError
from mixlab.models.catalog import create_model
from mixlab.models.cores import Cores, are_short
from mixlab.models.processes import can_fork

pytestmark = pytest.mark.skipif(not can_fork(), reason="this system has no fork, or no /proc")


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets)


def model(**options):
    torch.manual_seed(0)
    made = create_model("mixer_pyramid_micro2", num_classes=5, image_size=8, stage_blocks=(1, 1), **options)
    torch.nn.init.normal_(made.head.weight)
    return made


def batch(num_images: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return torch.randn(num_images, 3, 8, 8), F.one_hot(torch.arange(num_images) % 5, 5).float()


def cores_of(made, *, apart: bool) -> Cores:
    cores = Cores(made)
    cores._apart, cores._at_once = apart, 4
    return cores


def trained(*, apart: bool, sizes: tuple[int, ...]) -> tuple[list[Tensor], list[float]]:
    """The weights after a step on a batch of each size, and the losses."""
    made = model(stochastic_depth=0.5)
    cores, losses = cores_of(made, apart=apart), []
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    for number, size in enumerate(sizes):
        optimizer.zero_grad()
        image, target = batch(size, number)
        loss, correct = cores.backward(image, target, mean_loss, share=0.7)
        assert 0 <= int(correct) <= size
        losses.append(float(loss))
        optimizer.step()
    assert (cores._batch is not None) == apart
    cores.close()
    return [p.detach().clone() for p in made.parameters()], losses


def test_steps_have_the_bits_of_threads_on_smaller_and_larger_batches_too():
    sizes = (16, 9, 31, 16)
    (one, losses), (other, again) = trained(apart=True, sizes=sizes), trained(apart=False, sizes=sizes)
    assert losses == again
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_gradients_are_added_to_those_that_are_there():
    made = model()
    cores, (image, target) = cores_of(made, apart=True), batch(16)
    cores.backward(image, target, mean_loss)
    first = [p.grad.clone() for p in made.parameters()]
    cores.backward(image, target, mean_loss)
    assert all(torch.equal(p.grad, 2 * g) for p, g in zip(made.parameters(), first, strict=True))
    cores.close()


def test_a_process_that_was_killed_is_an_error_and_the_next_batch_begins_others():
    cores, (image, target) = cores_of(model(), apart=True), batch(16)
    cores.backward(image, target, mean_loss)
    (child,) = cores._batch.processes._children
    os.kill(child, signal.SIGKILL)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    with pytest.raises(TrainingError, match="has ended"):
        cores.backward(image, target, mean_loss)
    cores.backward(image, target, mean_loss)
    assert cores._batch.processes._children != [child]
    cores.close()


def test_a_process_that_is_killed_while_it_computes_is_an_error_too():
    def dies_elsewhere(logits: Tensor, targets: Tensor, own: int = os.getpid()) -> Tensor:
        if os.getpid() != own:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.2)  # long enough for the other to take a part
        return mean_loss(logits, targets)

    cores, (image, target) = cores_of(model(), apart=True), batch(16)
    with pytest.raises(TrainingError, match="has ended"):
        cores.backward(image, target, dies_elsewhere)
    assert cores._batch is None


def test_processes_end_with_what_they_compute_for():
    cores = cores_of(model(), apart=True)
    cores.backward(*batch(16), mean_loss)
    (child,) = cores._batch.processes._children
    assert os.path.isdir(f"/proc/{child}")
    del cores
    assert not os.path.isdir(f"/proc/{child}")


def test_an_error_in_one_of_the_processes_is_an_error_here(capfd):
    own = os.getpid()

    def fails_elsewhere(logits: Tensor, targets: Tensor) -> Tensor:
        if os.getpid() != own:
            raise ValueError("not here")
        time.sleep(0.2)  # long enough for the other to take a part
        return mean_loss(logits, targets)

    cores, (image, target) = cores_of(model(), apart=True), batch(16)
    with pytest.raises(TrainingError, match="has ended"):
        cores.backward(image, target, fails_elsewhere)
    assert "ValueError: not here" in capfd.readouterr().err
    assert cores._batch is None


def test_the_others_end_with_the_first_however_that_ends():
    code = (
        "import os, sys, torch; sys.path.insert(0, 'tests/models'); torch.set_num_threads(2)\n"
        "from test_processes import batch, cores_of, mean_loss, model\n"
        "cores = cores_of(model(), apart=True); cores.backward(*batch(16), mean_loss)\n"
        "print(*cores._batch.processes._children, flush=True)\n"
        "os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stderr
    child, deadline = int(done.stdout), time.monotonic() + 10
    while time.monotonic() < deadline and os.path.isdir(f"/proc/{child}"):
        time.sleep(0.05)
    assert not os.path.isdir(f"/proc/{child}")


def test_what_is_short():
    names = {name: are_short(create_model(name).config) for name in ("mixer_micro4", "mixer_pyramid_nano2")}
    assert all(names.values())
    with torch.device("meta"):
        assert not are_short(create_model("mixer_nano4").config)
