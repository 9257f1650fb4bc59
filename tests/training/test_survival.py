"""What a training survives: full disks, batches that are not finite, a second process, memory that runs out."""

import csv
import errno
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from benchmarks.reliability import ranks
from benchmarks.reliability.faults import count_calls, inject
from mixlab.checkpoint.checkpoints import Checkpoint, load_newest_checkpoint, save_checkpoint, sweep
from mixlab.data import loader
from mixlab.data.workers import items_of_workers
from mixlab.errors import DataError, DiskError, TrainingError, UsageError, WeightsError
from mixlab.planning.batch_size import MEMORY_SHARE, Memory, decide_batch_size
from mixlab.report.run_log import RunLog, read_run_log
from mixlab.training.course import TrainingCourse
from mixlab.training.exchanges import Exchange
from mixlab.training.failures import NonFiniteError
from mixlab.training.from_labels import labels_of
from mixlab.training.run_folder import locked
from mixlab.training.saver import Saver, snapshot
from mixlab.training.signals import Interrupted
from tests.training.seams import TINY, StopAfter, before_steps, resume, train, with_decisions

SHORT = TINY | {
    "steps": 12,
    "epochs": None,
    "threads": 1,
    "batch_size": 32,
    "keep_weights": "last",
    "seed": 3,
}


def digits(run: Path, *, course_type: type[TrainingCourse] = TrainingCourse, **options):
    return train("digits", "digits", run, doubles={"course_type": course_type}, **(SHORT | options))


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "weights.safetensors")


def same_weights(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(t, second[name]) for name, t in first.items())


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def full(*_, **__):
    raise DiskError("could not write: No space left on device", where="checkpoints")


def test_jobs_are_written_in_order_beside_the_caller():
    done, gate = [], threading.Event()
    saver = Saver(lambda error: done.append(error))
    saver.submit("one", lambda: (gate.wait(10), done.append(1)))
    assert saver.is_busy
    assert done == []
    gate.set()
    saver.submit("two", lambda: done.append(2))
    saver.close()
    assert done == [1, 2]


def test_two_jobs_of_one_moment_do_not_wait_for_each_other_and_a_third_does():
    gate, done = threading.Event(), []
    saver = Saver(lambda error: None)
    for number in (1, 2):
        saver.submit("any", lambda number=number: (gate.wait(10), done.append(number)))
    assert done == []
    threading.Timer(0.2, gate.set).start()
    saver.submit("any", lambda: done.append(3))
    assert done[:1] == [1]
    saver.close()
    assert done == [1, 2, 3]


def test_a_failed_job_is_tried_again_before_one_that_may_rely_on_it():
    reported, done, is_full = [], [], True

    def write(name):
        if is_full:
            full()
        done.append(name)

    saver = Saver(reported.append)
    saver.submit("weights", lambda: write("old weights"))
    saver.submit("weights", lambda: write("weights"))
    saver.submit("checkpoint", lambda: write("checkpoint 1"))
    saver.wait()
    assert (len(reported), done) == (3, [])
    is_full = False
    saver.submit("checkpoint", lambda: write("checkpoint 2"))
    saver.wait()
    assert done == ["weights", "checkpoint 2"]
    is_full = True
    saver.submit("checkpoint", lambda: write("checkpoint 3"))
    with pytest.raises(DiskError, match="No space left"):
        saver.close()


def test_a_fault_that_is_no_full_disk_is_not_survived():
    saver = Saver(lambda error: None)
    saver.submit("a", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        saver.close()


def test_a_snapshot_does_not_follow_what_it_was_made_from():
    tensor = torch.ones(3)
    copied = snapshot({"x": tensor})
    tensor.add_(1)
    assert copied["x"].tolist() == [1, 1, 1]


def saving_by(exchange: Exchange) -> type[TrainingCourse]:
    """A course whose files are written by `exchange`."""

    class Saving(TrainingCourse):
        def __init__(self, *arguments) -> None:
            super().__init__(*arguments)
            self.exchange = exchange

    return Saving


class Disk(Exchange):
    """One that is full while `is_full` says so of the number of this write."""

    def __init__(self, is_full: Callable[[int], bool] = lambda number: False, seconds: float = 0.0) -> None:
        self.is_full, self.seconds, self.num_saves = is_full, seconds, 0

    def save(self, folder, checkpoint, *, keep):
        self.num_saves += 1
        time.sleep(self.seconds)
        if self.is_full(self.num_saves):
            full()
        super().save(folder, checkpoint, keep=keep)


class DiskFullForWeights(Exchange):
    """One that is full after weights were written once."""

    num_writes = 0

    def writing(self, job):
        self.num_writes += 1
        return job if self.num_writes == 1 else full


def test_a_disk_that_is_full_for_a_while_costs_a_warning_only(tmp_path):
    digits(tmp_path / "calm")
    disk = Disk(lambda number: number <= 2)
    result = digits(tmp_path / "run", course_type=saving_by(disk), checkpoint_seconds=0.0)
    assert disk.num_saves > 2
    assert same_weights(tmp_path / "calm", tmp_path / "run")
    assert checkpoints(tmp_path / "run")[-1] == "step_00000012"
    assert "training goes on" in (tmp_path / "run" / "report.html").read_text()
    assert result["test"]["num_images"] == 357


@pytest.mark.parametrize(
    "disk", [Disk(lambda number: number > 1), DiskFullForWeights()], ids=["checkpoints", "weights"]
)
def test_a_disk_that_stays_full_ends_with_the_error_and_the_old_files(disk, tmp_path):
    digits(tmp_path / "calm")
    with pytest.raises(DiskError, match="No space left"):
        digits(tmp_path / "run", course_type=saving_by(disk), checkpoint_seconds=0.0)
    assert (tmp_path / "run" / "config.json").is_file()
    resume(tmp_path / "run")
    assert same_weights(tmp_path / "calm", tmp_path / "run")


def test_a_log_that_cannot_be_written_does_not_stop_the_training(tmp_path):
    class FullOnce(RunLog):
        def write(self, event, **values):
            if values.get("step") == 5:
                full()
            super().write(event, **values)

    class Logging(TrainingCourse):
        def __init__(self, *arguments) -> None:
            super().__init__(*arguments)
            self.log = FullOnce(self.run / "metrics.jsonl")

    digits(tmp_path / "run", course_type=Logging)
    steps = [r["step"] for r in read_run_log(tmp_path / "run" / "metrics.jsonl") if r["event"] == "train"]
    assert steps == [1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 12]


class AtOnce(Saver):
    """No step begins before what was submitted is written; else how far the writer has come is luck."""

    def submit(self, kind, job):
        super().submit(kind, job)
        self.wait()


class SavingAtOnce(TrainingCourse):
    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.saver = AtOnce(self._note_disk_error)


def test_checkpoints_come_by_time_in_mid_epoch_and_the_last_ones_are_kept(tmp_path):
    digits(tmp_path / "run", course_type=SavingAtOnce, checkpoint_seconds=0.0, keep=3, batch_size=16)
    names = checkpoints(tmp_path / "run")
    assert names == ["step_00000010", "step_00000011", "step_00000012"]
    with pytest.raises(UsageError, match="keep must be at least 2"):
        digits(tmp_path / "other", keep=1)


def test_saves_that_take_long_are_rarer(tmp_path):
    disk = Disk(seconds=0.5)
    digits(tmp_path / "run", course_type=saving_by(disk), checkpoint_seconds=0.001, steps=200)
    assert disk.num_saves == 2  # the first, and the one at the end


def test_nothing_is_pruned_for_a_checkpoint_that_cannot_be_read_back(tmp_path, monkeypatch):
    def write(step):
        tensors = {"model": {"x": torch.full((4,), float(step))}}
        return save_checkpoint(tmp_path, Checkpoint(step=step, tensors=tensors, state={}))

    write(1), write(2)

    def rotten(path):
        raise WeightsError("model.safetensors is damaged", where=str(path))

    with monkeypatch.context() as patch:
        patch.setattr("mixlab.checkpoint.checkpoints._verify", rotten)
        with pytest.raises(DiskError, match="cannot be read back"):
            write(3)
    assert {"step_00000001", "step_00000002"} <= {path.name for path in tmp_path.iterdir()}
    write(4)
    assert load_newest_checkpoint(tmp_path)[0].step == 4


def spoil(steps: set[int], kind: str, parent: type[TrainingCourse] = TrainingCourse) -> type[TrainingCourse]:
    """A course that makes the loss, or only the gradient, of some steps NaN."""

    class Spoiling(parent):
        def is_over(self) -> bool:
            objective, is_spoilt = self.state.objective, self.clock.step in steps
            loss_of = labels_of(self.recipe.loss, self.plan.data).loss

            def spoilt(logits, target):  # without a name, so that no other process computes it
                loss = loss_of(logits, target)
                if kind == "loss":
                    return loss * float("nan")
                return loss + torch.sqrt(logits.sum() * 0.0)  # 0, and its gradient is 0 times infinity

            objective.loss = spoilt if is_spoilt else loss_of
            return super().is_over()

    return Spoiling


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_batch_that_is_not_finite_changes_nothing_and_is_written_down(kind, tmp_path):
    with pytest.raises(NonFiniteError, match=f"{kind}.* became nan at step 7"):
        digits(tmp_path / "run", course_type=spoil({7}, kind), checkpoint_seconds=0.0)
    with open(tmp_path / "run" / "nonfinite.csv") as file:
        rows = list(csv.DictReader(file))
    assert len({row["index"] for row in rows}) == 32
    assert {(row["step"], row["what"]) for row in rows} == {("7", kind)}
    found, _ = load_newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert found.step <= 7
    assert all(torch.isfinite(t).all() for group in found.tensors.values() for t in group.values())


def test_so_many_batches_can_be_left_out_and_no_more_even_over_a_resume(tmp_path):
    digits(tmp_path / "two", course_type=spoil({3, 9}, "gradient"), skip_nonfinite=2)
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path / "two").values())
    assert "step 3 was left out" in (tmp_path / "two" / "report.html").read_text().lower()
    course_type = spoil({3, 9}, "loss", SavingAtOnce)
    with pytest.raises(NonFiniteError, match="step 9"):
        digits(tmp_path / "one", course_type=course_type, skip_nonfinite=1, checkpoint_seconds=0.0)
    found, _ = load_newest_checkpoint(tmp_path / "one" / "checkpoints")
    assert found.state["num_skipped"] == 1
    (tmp_path / "one" / "nonfinite.csv").unlink()
    (tmp_path / "one" / "nonfinite.csv").mkdir()  # that it cannot be written down hides nothing
    with pytest.raises(NonFiniteError, match="step 9"):
        resume(tmp_path / "one", course_type=course_type)


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    def break_weights(course):
        if course.clock.step == 7:
            with torch.no_grad():
                course.state.model.head.bias[0] = float("inf")

    with pytest.raises(TrainingError, match=r"head.bias was no longer finite|loss became"):
        digits(tmp_path / "run", course_type=before_steps(break_weights), checkpoint_seconds=0.0)
    found, _ = load_newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert found.step <= 7
    assert torch.isfinite(found.tensors["model"]["head.bias"]).all()


def test_one_process_at_a_time_trains_in_a_run(tmp_path):
    digits(tmp_path / "run")
    with locked(tmp_path / "run"), pytest.raises(UsageError, match="another process is training"):
        resume(tmp_path / "run")
    resume(tmp_path / "run")


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ...")],
)
def test_memory_that_runs_out_is_named_with_what_to_do(error, tmp_path):
    with pytest.raises(TrainingError, match="batch_size 32") as found:
        digits(tmp_path / "run", course_type=failing(error))
    assert "--accumulate 2" in found.value.hint


def failing(error: Exception) -> type[TrainingCourse]:
    """A course whose steps end with `error`."""

    def loss(logits, target):
        raise error

    return before_steps(lambda course: setattr(course.state.objective, "loss", loss))


def test_other_errors_of_a_step_are_not_called_memory(tmp_path):
    with pytest.raises(RuntimeError, match="multiplied"):
        digits(tmp_path / "run", course_type=failing(RuntimeError("shapes cannot be multiplied")))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EPERM])
def test_every_write_of_a_save_can_fail_and_an_older_or_the_new_checkpoint_is_there(number, tmp_path):
    tensors = {"model": {"x": torch.ones(8)}, "optimizer": {"0.step": torch.ones(1)}}

    def write(step):
        save_checkpoint(tmp_path / "c", Checkpoint(step=step, tensors=tensors, state={"a": 1}))

    write(1), write(2)
    total = count_calls(lambda: write(3))
    assert total > 15
    for call in range(total):
        before = load_newest_checkpoint(tmp_path / "c")[0].step
        with inject(call, number) as hit, suppress(DiskError):  # nothing else may come out of it
            write(before + 1)
        assert hit, call
        found, rejected = load_newest_checkpoint(tmp_path / "c")
        assert found.step in (before, before + 1)
        assert rejected == []
        sweep(tmp_path / "c")


def test_saving_does_not_wait_for_the_disk(tmp_path):
    began = time.monotonic()
    digits(tmp_path / "run", course_type=saving_by(Disk(seconds=1.0)), checkpoint_seconds=0.0)
    assert time.monotonic() - began < 11  # twelve saves one after the other would take longer
    assert checkpoints(tmp_path / "run")[-1] == "step_00000012"


@pytest.fixture
def colours(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    for number, name in enumerate(("blue", "green", "red")):
        (tmp_path / "colours" / name).mkdir(parents=True)
        for i in range(16):
            pixels = rng.integers(0, 120, (9, 11, 3))
            pixels[..., 2 - number] += 100
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "colours" / name / f"{i:02}.png")
    return tmp_path / "colours"


STREAM = {
    "model__name": "mixer_pico",
    "steps": 20,
    "epochs": None,
    "threads": 1,
    "batch_size": 8,
    "in_memory": False,
}


@pytest.fixture
def streamed(colours, tmp_path):
    """A function that trains on images that so many processes read."""

    def begin(name: str, num_workers: int, **options) -> Path:
        train(colours, "small_data", tmp_path / name, num_workers=num_workers, **(STREAM | options))
        return tmp_path / name

    return begin


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker")
def test_any_number_of_workers_changed_in_mid_run_gives_the_same_bits(streamed, tmp_path):
    for workers in (0, 2, 4):
        streamed(f"w{workers}", workers)
    assert same_weights(tmp_path / "w0", tmp_path / "w2")
    assert same_weights(tmp_path / "w0", tmp_path / "w4")
    with pytest.raises(Interrupted):
        streamed("cut", 4, screen=StopAfter(8))
    recipe = tmp_path / "cut" / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("num_workers = 4", "num_workers = 2"))
    resume(tmp_path / "cut")
    assert same_weights(tmp_path / "w0", tmp_path / "cut")


def test_killed_workers_are_replaced_and_change_nothing(streamed):
    calm, killed = streamed("calm", 0), []

    def kill_one(course):
        if course.clock.step in (1, 9):
            children = multiprocessing.active_children()
            killed.append(children[0].pid)
            os.kill(children[0].pid, signal.SIGKILL)

    run = streamed("run", 2, doubles={"course_type": before_steps(kill_one)})
    assert len(set(killed)) == 2
    assert same_weights(calm, run)


def test_workers_that_keep_dying_end_the_training_with_the_reason():
    def kill_all(item):
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)

    items = items_of_workers(range(100), 0, 100, 2, 60.0, max_deaths=0)
    with pytest.raises(DataError, match="died 1 times"):
        list(map(kill_all, items))


# Memory, clock, storage


class SmallMemory(Memory):
    """Of a machine of `size` bytes on which a step takes 1000 bytes and 100 for each image."""

    def __init__(self, size: int, error: str = "out of memory") -> None:
        self.size, self.error, self.peak = size, error, 0

    def used(self, device):
        return self.peak

    def total(self, device, world):
        return self.size / MEMORY_SHARE

    def decide(self, draft):
        """Decide the batch size for this machine, with an objective that takes its memory."""
        objective = labels_of(draft.recipe.loss, draft.data)
        targets_of = objective.targets

        def targets(batch, device):
            need = 1000 + 100 * len(batch.inputs) // draft.recipe.accumulate
            if need > self.size:
                raise RuntimeError(self.error)
            self.peak = max(self.peak, need)
            return targets_of(batch, device)

        objective.targets = targets
        decided = decide_batch_size(replace(draft, objective=objective), self)
        return replace(decided, objective=draft.objective)


def with_auto_batch(run: Path, memory: SmallMemory, **options) -> str:
    decisions = with_decisions(decide_batch_size=memory.decide)
    train("digits", "digits", run, doubles={"decisions": decisions}, **(SHORT | AUTO | options))
    return (run / "recipe.toml").read_text()


AUTO = {"batch_size": "auto", "steps": 1}


@pytest.mark.parametrize(
    ("total", "expected"), [(1000 + 100 * 70, 64), (10**9, 1024), (1000 + 100 * 5, 4), (1150, 1)]
)
def test_batch_size_auto_is_the_largest_that_fits(total, expected, tmp_path):
    assert f"batch_size = {expected}\n" in with_auto_batch(tmp_path / "run", SmallMemory(total))


def test_batch_size_auto_counts_parts_and_a_failure_that_is_no_lack_of_memory_is_told(tmp_path):
    memory = SmallMemory(1000 + 100 * 70)
    assert "batch_size = 64\n" in with_auto_batch(tmp_path / "shards", memory, virtual_shards=8)
    memory = SmallMemory(1000 + 100 * 70)
    assert "batch_size = 128\n" in with_auto_batch(tmp_path / "run", memory, accumulate=2)
    with pytest.raises(RuntimeError, match="a shape"):
        with_auto_batch(tmp_path / "other", SmallMemory(50, "a shape"))
    with pytest.raises(TrainingError, match="one image a process"):
        with_auto_batch(tmp_path / "none", SmallMemory(50))


def test_a_clock_that_jumps_changes_nothing(tmp_path, monkeypatch):
    digits(tmp_path / "calm")
    jumps = iter(range(10**6))
    monkeypatch.setattr(time, "time", lambda: (-1) ** next(jumps) * 1e8)
    digits(tmp_path / "jumpy", checkpoint_seconds=0.0)
    assert same_weights(tmp_path / "calm", tmp_path / "jumpy")
    rows = [row for row in read_run_log(tmp_path / "jumpy/metrics.jsonl") if "seconds" in row]
    assert all(0 <= row["seconds"] < 60 for row in rows)


def test_a_run_folder_that_cannot_be_written_is_said_and_resumed_later(tmp_path, monkeypatch):
    with pytest.raises(DiskError, match="could not write"):
        digits(Path("/proc/no/run"))
    run = tmp_path / "run"
    digits(run)
    real = Path.open

    def read_only(self, mode="r", *arguments, **options):
        if run in self.parents and set(mode) & set("wax+"):
            raise OSError(errno.EROFS, "Read-only file system")
        return real(self, mode, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", read_only)
        with pytest.raises(DiskError, match="run folder cannot be written: Read-only"):
            resume(run)
    assert resume(run)["steps"] == 12


@pytest.mark.parametrize("how", ["waits", pytest.param("stopped", marks=pytest.mark.slow)])
def test_a_loader_worker_that_hangs_is_given_up_and_does_not_hold_up_the_end(how, tmp_path, capfd):
    for i in range(40):
        path = tmp_path / f"data/{'ab'[i % 2]}/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), i, dtype=np.uint8)).save(path)

    def job():
        real = loader.TrainingDataset.__getitem__

        def hanging(self, step):
            if step == 3:
                os.kill(os.getpid(), signal.SIGSTOP) if how == "stopped" else signal.pause()
            return real(self, step)

        loader.TrainingDataset.__getitem__ = hanging
        options = SHORT | {
            "model__name": "mixer_pico",
            "batch_size": 8,
            "data__in_memory": False,
            "data__num_workers": 2,
            "timeout_seconds": 2,
        }
        train(tmp_path / "data", "small_data", tmp_path / "run", **options)

    began = time.monotonic()
    assert ranks.wait(ranks.start(job), 40) == [1]
    assert time.monotonic() - began < 30
    # One that is stopped does not hand over what it has read before, either.
    assert f"gave none for 2 s at step {'3' if how == 'waits' else ''}" in capfd.readouterr().err


@pytest.mark.parametrize("how", ["deleted", "moved"])
def test_a_run_folder_that_vanishes_is_said_at_once(how, tmp_path):
    run = tmp_path / "run"

    def vanish(course):
        if course.clock.step == 4 and how == "deleted":
            shutil.rmtree(run)
        elif course.clock.step == 4:
            run.rename(tmp_path / "elsewhere")

    with pytest.raises(TrainingError, match=r"the run folder is gone: .* before step 5"):
        digits(run, course_type=before_steps(vanish))
    assert not run.exists()
