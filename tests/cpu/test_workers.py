"""Programs that compute parts of a batch: the bits of threads, whichever computed what; no end goes unnoticed."""

import gc
import json
import os
import signal
import subprocess
import sys
import time
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mixlab.cpu import cores as cores_module
from mixlab.cpu import workers
from mixlab.cpu.cores import Cores, are_short
from mixlab.cpu.worker import describe, made, readable
from mixlab.cpu.workers import end_programs, why_none
from mixlab.errors import TrainingError
from mixlab.models.catalog import create_model
from mixlab.training.losses import LossConfig
from mixlab.training.objectives.distillation import DistillationLoss, DistillConfig
from mixlab.training.objectives.labels import LabelLoss

pytestmark = pytest.mark.skipif(why_none() is not None, reason=str(why_none()))
FIRST = "MIXLAB_TESTS_FIRST"  # process, for losses that do something else in another one


@pytest.fixture(autouse=True, scope="module")
def first():
    end_programs()  # they have the environment of those that began them
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FIRST, str(os.getpid()))
        yield
    end_programs()


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
    gc.collect()  # programs of cores that nobody has any more are spare for the next test


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets)


def is_elsewhere() -> bool:
    if os.environ[FIRST] != str(os.getpid()):
        return True
    time.sleep(0.2)  # long enough for the other to take a part
    return False


def dies_elsewhere(logits: Tensor, targets: Tensor) -> Tensor:
    if is_elsewhere():
        os.kill(os.getpid(), signal.SIGKILL)
    return mean_loss(logits, targets)


def stops_elsewhere(logits: Tensor, targets: Tensor) -> Tensor:
    if is_elsewhere():
        os.kill(os.getpid(), signal.SIGSTOP)
    return mean_loss(logits, targets)


def fails_elsewhere(logits: Tensor, targets: Tensor) -> Tensor:
    if is_elsewhere():
        raise ValueError("not here")
    return mean_loss(logits, targets)


def model(**options):
    torch.manual_seed(0)
    made = create_model("mixer_pyramid_micro2", num_classes=5, image_size=8, stage_blocks=(1, 1), **options)
    torch.nn.init.normal_(made.head.weight)
    return made


def batch(num_images: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return torch.randn(num_images, 3, 8, 8), F.one_hot(torch.arange(num_images) % 5, 5).float()


def cores_of(made, *, apart: bool, loss=mean_loss, num_images: int = 16) -> Cores:
    """Ready for batches of so many images, whose gradients they have not kept."""
    cores = Cores(made)
    cores._at_once = 4
    if not apart:
        cores.problem = "this test has none"
        return cores
    assert cores.problem is None
    image, target = batch(num_images)
    cores._by_programs(image, target, cores._model.draw(num_images), loss, num_images // 4, 1.0)
    cores.wait()
    assert cores.problem is None
    assert cores._job.workers.are_ready()
    return cores


def trained(*, apart: bool, sizes: tuple[int, ...]) -> tuple[list[Tensor], list[float]]:
    """The weights after a step on a batch of each size, and the losses."""
    made = model(stochastic_depth=0.5)
    cores, losses = cores_of(made, apart=apart, num_images=max(sizes)), []
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    for number, size in enumerate(sizes):
        optimizer.zero_grad()
        image, target = batch(size, number)
        loss, correct = cores.backward(image, target, mean_loss, share=0.7)
        assert 0 <= int(correct) <= size
        losses.append(float(loss))
        optimizer.step()
    assert (cores._job is not None) == apart
    cores.close()
    return [p.detach().clone() for p in made.parameters()], losses


def test_steps_have_the_bits_of_threads_on_smaller_batches_too():
    sizes = (32, 9, 31, 16)
    (one, losses), (other, again) = trained(apart=True, sizes=sizes), trained(apart=False, sizes=sizes)
    assert losses == again
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_threads_compute_until_the_programs_have_begun_and_no_bit_tells_which():
    end_programs()  # those that are spare would have begun
    found = []
    for apart in (True, False):
        made, losses, seen = model(), [], []
        cores = Cores(made)
        cores._at_once = 4
        if not apart:
            cores.problem = "this test has none"
        optimizer, step = torch.optim.SGD(made.parameters(), lr=0.01), 0
        while step < 12:
            loss, _ = cores.backward(*batch(16, step), mean_loss)
            optimizer.step()
            losses.append(float(loss))
            if step in (0, 5) and apart:
                cores.wait(0.0 if step == 0 else 30.0)
            seen.append(apart and cores._job.workers.are_ready())
            step += 1
        if apart:
            assert not seen[0]
            assert seen[-1]
        cores.close()
        found.append(losses)
    assert found[0] == found[1]


def test_a_larger_batch_takes_other_memory():
    cores = cores_of(model(), apart=True)
    first = cores._job.workers.pids
    cores.backward(*batch(64), mean_loss)
    assert len(cores._job.batch.tensors["image"]) == 64
    cores.wait()
    assert cores._job.workers.pids == first  # the same programs: they have begun already
    again, other = model(), model()
    cores_again = cores_of(again, apart=True, num_images=64)
    cores_again.backward(*batch(64), mean_loss)
    other_cores = cores_of(other, apart=False)
    other_cores.backward(*batch(64), mean_loss)
    assert all(
        torch.equal(a.grad, b.grad) for a, b in zip(again.parameters(), other.parameters(), strict=True)
    )


def test_a_batch_has_as_much_memory_as_it_has_parts():
    cores = cores_of(model(), apart=True)
    size = 2 + sum(p.numel() for p in cores._parameters)
    assert tuple(cores._job.workers._results.shape) == (4, size)


def test_gradients_are_added_to_those_that_are_there():
    made = model()
    cores, (image, target) = cores_of(made, apart=True), batch(16)
    cores.backward(image, target, mean_loss)
    first = [p.grad.clone() for p in made.parameters()]
    cores.backward(image, target, mean_loss)
    assert all(torch.equal(p.grad, 2 * g) for p, g in zip(made.parameters(), first, strict=True))
    cores.close()


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_frozen_layers_and_the_loss_of_a_recipe_are_the_same_elsewhere(dtype):
    labels = LabelLoss(config=LossConfig(label_smoothing=0.1), class_weights=(0.5, 1.25, 0.1, 1.0, 3.0))
    loss = DistillationLoss(labels=labels, config=DistillConfig(teacher="t", weight=0.3, temperature=2.0))
    found = []
    for apart in (True, False):
        made = model()
        made.stem.requires_grad_(False)
        made.checkpoint_blocks = True
        cores, (image, target) = Cores(made, dtype), batch(16)
        cores._at_once, target = 4, torch.stack([target, target.flip(1)], dim=1)
        if not apart:
            cores.problem = "this test has none"
        cores.backward(image, target, loss)
        cores.wait()
        assert not apart or cores._job.workers.are_ready()
        made.zero_grad()
        value, _ = cores.backward(image, target, loss)
        found.append([value, *(p.grad for p in made.parameters() if p.requires_grad)])
        assert made.stem.weight.grad is None
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_values_are_described_by_name_and_made_again():
    loss = LabelLoss(config=LossConfig(name="sigmoid"), class_weights=(1.0, 0.1))
    for value in (loss, model().config, F.cross_entropy, mean_loss, (1, (2.5, None), "x", True)):
        assert made(json.loads(json.dumps(describe(value)))) == value
    with pytest.raises(ValueError, match="no name by which another process could find it"):
        describe(lambda logits, targets: logits)


def test_a_loss_without_a_name_is_computed_by_threads():
    cores = cores_of(model(), apart=True)
    loss, _ = cores.backward(*batch(16), lambda logits, targets: mean_loss(logits, targets))
    assert float(loss) > 0
    assert "no name" in cores.problem


def test_a_process_that_was_killed_is_an_error_and_the_next_batch_begins_others():
    cores, (image, target) = cores_of(model(), apart=True), batch(16)
    cores.backward(image, target, mean_loss)
    (child,) = cores._job.workers.pids
    os.kill(child, signal.SIGKILL)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    with pytest.raises(TrainingError, match="has ended"):
        cores.backward(image, target, mean_loss)
    cores.backward(image, target, mean_loss)
    cores.wait(0.0)
    assert cores._job.workers.pids != [child]
    cores.close()


def test_a_process_that_is_killed_while_it_computes_is_an_error_too():
    for _ in range(9):
        try:
            cores = cores_of(model(), apart=True, loss=dies_elsewhere)
            break
        except TrainingError:  # it began so soon that it took part, and died, in what makes it ready
            continue
    with pytest.raises(TrainingError, match="has ended"):
        cores.backward(*batch(16), dies_elsewhere)
    assert cores._job is None


def test_a_pipe_that_is_closed_before_its_process_counts_as_ended_is_said_so_at_once():
    """A killed process closes its files a moment before it can be waited for; looks in that moment take no time."""
    cores = cores_of(model(), apart=True)
    cores.backward(*batch(16), mean_loss)
    workers_, began = cores._job.workers, time.monotonic()
    (program,) = workers_._programs

    def own(number: int) -> Tensor:
        while workers_._next() is not None:  # parts that the other one has begun, as far as this one knows
            pass
        program.leave()
        os.kill(program.process.pid, signal.SIGCONT)
        while program.process.poll() is None and not readable([workers_._done_out], 0.1):
            pass
        return torch.zeros(workers_._results.shape[1])

    os.kill(program.process.pid, signal.SIGSTOP)  # so that it takes no part
    with pytest.raises(TrainingError, match="has ended"):
        workers_.compute(4, own)
    assert time.monotonic() - began < 60
    assert not program.has_ended()
    cores.close(is_whole=False)


def test_a_process_that_ends_before_it_has_begun_leaves_the_work_to_threads():
    end_programs()  # those that are spare would have begun
    cores = Cores(model())
    cores._at_once = 4
    cores.backward(*batch(16), mean_loss)
    cores.wait(0.0)
    (child,) = cores._job.workers.pids
    os.kill(child, signal.SIGKILL)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    cores.backward(*batch(16), mean_loss)
    assert cores.problem


def test_a_training_of_a_moment_starts_no_program(monkeypatch):
    end_programs()  # those that are spare would be taken
    cores = Cores(model())
    for _ in range(2):
        cores.backward(*batch(16), mean_loss)
    assert cores._job is None
    monkeypatch.setattr(cores_module, "START_SECONDS", 0.0)
    cores.backward(*batch(16), mean_loss)
    assert cores._job is not None
    cores.close()


def test_where_no_program_can_be_started_threads_compute(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    end_programs()  # those that are spare would be taken
    cores = Cores(model())
    loss, _ = cores.backward(*batch(16), mean_loss)
    assert float(loss) > 0
    cores.wait(0.0)
    assert "nowhere" in cores.problem
    assert workers.try_program().startswith("none: ")


def test_a_process_that_is_stopped_while_it_computes_is_given_up():
    cores = cores_of(model(), apart=True, loss=stops_elsewhere)
    cores._job.workers._timeout_seconds, began = 2.0, time.monotonic()
    (child,) = cores._job.workers.pids
    with pytest.raises(TrainingError, match=r"gave none for 2 s: \d+ is stopped"):
        cores.backward(*batch(16), stops_elsewhere)
    assert time.monotonic() - began < 10
    assert cores._job is None
    assert not os.path.isdir(f"/proc/{child}")


def test_an_error_in_one_of_the_processes_is_an_error_here(capfd):
    cores = cores_of(model(), apart=True, loss=fails_elsewhere)
    with pytest.raises(TrainingError, match="has ended"):
        cores.backward(*batch(16), fails_elsewhere)
    assert "ValueError: not here" in capfd.readouterr().err
    assert cores._job is None


def test_programs_are_spare_for_others_and_end_when_told():
    cores = cores_of(model(), apart=True)
    (child,) = cores._job.workers.pids
    del cores
    other = cores_of(model(), apart=True)
    assert other._job.workers.pids == [child]
    other.close()
    assert os.path.isdir(f"/proc/{child}")
    end_programs()
    assert not os.path.isdir(f"/proc/{child}")


@pytest.mark.parametrize("has_begun", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_others_end_with_the_first_however_that_ends(has_begun):
    code = (
        "import os, sys, torch; sys.path.insert(0, 'tests/cpu'); torch.set_num_threads(2)\n"
        f"os.environ['{FIRST}'] = str(os.getpid())\n"
        "from test_workers import batch, cores_of, mean_loss, model, Cores\n"
        f"cores = cores_of(model(), apart=True) if {has_begun} else Cores(model())\n"
        "cores.backward(*batch(16), mean_loss); cores.wait(0.0)\n"
        "if os.fork():\n"  # who has all that it has, and lives on
        "    print(*cores._job.workers.pids, flush=True); os.kill(os.getpid(), 9)\n"
        "os.close(1); os.close(2); import time; time.sleep(20)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == -9, done.stderr
    child, deadline = int(done.stdout), time.monotonic() + (2 if has_begun else 10)
    while time.monotonic() < deadline and os.path.isdir(f"/proc/{child}"):
        time.sleep(0.05)
    assert not os.path.isdir(f"/proc/{child}")


def test_rows_of_threads_are_not_all_kept():
    made = create_model("mixer_nano4", num_classes=10)
    assert not are_short(made.config)
    cores, alive, most = Cores(made), set(), 0

    def watched(*arguments):
        row = real(*arguments)
        alive.add(id(row))
        weakref.finalize(row, alive.discard, id(row))
        nonlocal most
        most = max(most, len(alive))
        time.sleep(0.02)
        return row

    real, cores_module.gradient = cores_module.gradient, watched
    try:
        cores._at_once = 2
        image = torch.randn(48, 3, 32, 32)
        cores.backward(image, F.one_hot(torch.arange(48) % 10, 10).float(), mean_loss)
    finally:
        cores_module.gradient = real
    assert 0 < most < 12  # of 24


def test_what_is_short():
    with torch.device("meta"):
        assert all(are_short(create_model(name).config) for name in ("mixer_micro4", "mixer_pyramid_nano2"))
        assert not are_short(create_model("mixer_nano4").config)
