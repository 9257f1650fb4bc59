"""What a training survives: full disks, batches that are not finite, a second process, memory that runs out."""

import csv
import errno
import multiprocessing
import os
import shutil
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import mixlab
from benchmarks.reliability import ranks
from benchmarks.reliability.faults import count_calls, inject
from mixlab.checkpoint.checkpoints import Checkpoint, load_newest_checkpoint, save_checkpoint, sweep
from mixlab.data import loader
from mixlab.data import workers as worker_module
from mixlab.errors import DataError, DiskError, TrainingError, UsageError, WeightsError
from mixlab.planning import batch_size, reopen
from mixlab.report.run_log import read_run_log
from mixlab.report.screen import Screen
from mixlab.training import course, exchanges, fit, from_labels
from mixlab.training.failures import NonFiniteError
from mixlab.training.run_folder import locked
from mixlab.training.saver import Saver, snapshot
from mixlab.training.signals import Interrupted
from mixlab.training.step import StepResult

QUIET = Screen(quiet=True)
SHORT = {"steps": 12, "epochs": None, "threads": 1, "batch_size": 32, "keep_weights": "last", "seed": 3}


def digits(run: Path, **options):
    return mixlab.train("digits", "digits", run=run, screen=QUIET, **(SHORT | options))


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


def test_a_disk_that_is_full_for_a_while_costs_a_warning_only(tmp_path, monkeypatch):
    digits(tmp_path / "calm")
    calls, real = [], exchanges.save_checkpoint

    def sometimes(*arguments, **options):
        calls.append(1)
        return full() if len(calls) <= 2 else real(*arguments, **options)

    monkeypatch.setattr(exchanges, "save_checkpoint", sometimes)
    result = digits(tmp_path / "run", checkpoint_seconds=0.0)
    assert len(calls) > 2
    assert same_weights(tmp_path / "calm", tmp_path / "run")
    assert checkpoints(tmp_path / "run")[-1] == "step_00000012"
    assert "training goes on" in (tmp_path / "run" / "report.html").read_text()
    assert result["test"]["num_images"] == 357


@pytest.mark.parametrize(("place", "kind"), [(exchanges, "save_checkpoint"), (course, "save_weights")])
def test_a_disk_that_stays_full_ends_with_the_error_and_the_old_files(place, kind, tmp_path, monkeypatch):
    digits(tmp_path / "calm")
    real, good = getattr(place, kind), []

    def first_only(*arguments, **options):
        if good:
            full()
        good.append(1)
        return real(*arguments, **options)

    monkeypatch.setattr(place, kind, first_only)
    with pytest.raises(DiskError, match="No space left"):
        digits(tmp_path / "run", checkpoint_seconds=0.0)
    monkeypatch.undo()
    assert (tmp_path / "run" / "config.json").is_file()
    mixlab.resume(tmp_path / "run", screen=QUIET)
    assert same_weights(tmp_path / "calm", tmp_path / "run")


def test_a_log_that_cannot_be_written_does_not_stop_the_training(tmp_path, monkeypatch):
    real = course.RunLog.write

    def some_lines(self, event, **values):
        if values.get("step") == 5:
            full()
        real(self, event, **values)

    monkeypatch.setattr(course.RunLog, "write", some_lines)
    digits(tmp_path / "run")
    steps = [r["step"] for r in read_run_log(tmp_path / "run" / "metrics.jsonl") if r["event"] == "train"]
    assert steps == [1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 12]


def test_checkpoints_come_by_time_in_mid_epoch_and_the_last_ones_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(Saver, "is_busy", False)  # no save is passed over because the one before takes long
    digits(tmp_path / "run", checkpoint_seconds=0.0, keep=3, batch_size=16)
    names = checkpoints(tmp_path / "run")
    assert names == ["step_00000010", "step_00000011", "step_00000012"]
    with pytest.raises(UsageError, match="keep must be at least 2"):
        digits(tmp_path / "other", keep=1)


def test_saves_that_take_long_are_rarer(tmp_path, monkeypatch):
    real, calls = exchanges.save_checkpoint, []

    def slow(*arguments, **options):
        calls.append(1)
        time.sleep(0.5)
        return real(*arguments, **options)

    monkeypatch.setattr(exchanges, "save_checkpoint", slow)
    digits(tmp_path / "run", checkpoint_seconds=0.001, steps=400)
    assert len(calls) == 2  # the first, and the one at the end


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


def save_at_once(monkeypatch) -> None:
    """Let no step begin before what was submitted is written; else how far the writer has come is luck."""
    submit = Saver.submit

    def submit_and_wait(saver, kind, job):
        submit(saver, kind, job)
        saver.wait()

    monkeypatch.setattr(Saver, "submit", submit_and_wait)


def spoil(monkeypatch, steps: set[int], kind: str) -> None:
    """Make the loss, or only the gradient, of some steps NaN."""
    real, counter = from_labels.labels_of, iter(range(10**6))

    def made(*arguments):
        objective = real(*arguments)
        loss_of = objective.loss

        def spoilt(logits, target):  # without a name, so that no other process computes it
            loss = loss_of(logits, target)
            if next(counter) not in steps:
                return loss
            if kind == "loss":
                return loss * float("nan")
            return loss + torch.sqrt(logits.sum() * 0.0)  # 0, and its gradient is 0 times infinity

        objective.loss = spoilt
        return objective

    monkeypatch.setattr(from_labels, "labels_of", made)


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_batch_that_is_not_finite_changes_nothing_and_is_written_down(kind, tmp_path, monkeypatch):
    spoil(monkeypatch, {7}, kind)
    with pytest.raises(NonFiniteError, match=f"{kind}.* became nan at step 7"):
        digits(tmp_path / "run", checkpoint_seconds=0.0)
    with open(tmp_path / "run" / "nonfinite.csv") as file:
        rows = list(csv.DictReader(file))
    assert len({row["index"] for row in rows}) == 32
    assert {(row["step"], row["what"]) for row in rows} == {("7", kind)}
    found, _ = load_newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert found.step <= 7
    assert all(torch.isfinite(t).all() for group in found.tensors.values() for t in group.values())


def test_so_many_batches_can_be_left_out_and_no_more_even_over_a_resume(tmp_path, monkeypatch):
    save_at_once(monkeypatch)
    with monkeypatch.context() as patch:
        spoil(patch, {3, 9}, "gradient")
        digits(tmp_path / "two", skip_nonfinite=2)
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path / "two").values())
    assert "step 3 was left out" in (tmp_path / "two" / "report.html").read_text().lower()
    with monkeypatch.context() as patch:
        spoil(patch, {3, 9}, "loss")
        with pytest.raises(NonFiniteError, match="step 9"):
            digits(tmp_path / "one", skip_nonfinite=1, checkpoint_seconds=0.0)
    found, _ = load_newest_checkpoint(tmp_path / "one" / "checkpoints")
    assert found.state["num_skipped"] == 1
    monkeypatch.setattr(course, "add_nonfinite_batch", full)  # that it cannot be written down hides nothing
    spoil(monkeypatch, {9 - found.step}, "loss")  # the counter starts again with the process
    with pytest.raises(NonFiniteError, match="step 9"):
        mixlab.resume(tmp_path / "one", screen=QUIET)


def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch):
    real = fit.train_step

    def break_weights(state, batch, clock):
        result = real(state, batch, clock)
        if clock.step == 6:
            with torch.no_grad():
                state.model.head.bias[0] = float("inf")
        return result

    monkeypatch.setattr(fit, "train_step", break_weights)
    with pytest.raises(TrainingError, match=r"head.bias was no longer finite|loss became"):
        digits(tmp_path / "run", checkpoint_seconds=0.0)
    found, _ = load_newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert found.step <= 6
    assert torch.isfinite(found.tensors["model"]["head.bias"]).all()


def test_one_process_at_a_time_trains_in_a_run(tmp_path):
    digits(tmp_path / "run")
    with locked(tmp_path / "run"), pytest.raises(UsageError, match="another process is training"):
        mixlab.resume(tmp_path / "run", screen=QUIET)
    mixlab.resume(tmp_path / "run", screen=QUIET)


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ...")],
)
def test_memory_that_runs_out_is_named_with_what_to_do(error, tmp_path, monkeypatch):
    def too_much(*_):
        raise error

    monkeypatch.setattr(fit, "train_step", too_much)
    with pytest.raises(TrainingError, match="batch_size 32") as found:
        digits(tmp_path / "run")
    assert "--accumulate 2" in found.value.hint


def test_other_errors_of_a_step_are_not_called_memory(tmp_path, monkeypatch):
    def wrong(*_):
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(fit, "train_step", wrong)
    with pytest.raises(RuntimeError, match="multiplied"):
        digits(tmp_path / "run")


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


def test_saving_does_not_wait_for_the_disk(tmp_path, monkeypatch):
    real = exchanges.save_checkpoint

    def slow(*arguments, **options):
        time.sleep(1.0)
        return real(*arguments, **options)

    monkeypatch.setattr(exchanges, "save_checkpoint", slow)
    began = time.monotonic()
    digits(tmp_path / "run", checkpoint_seconds=0.0)
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


STREAM = {"steps": 20, "epochs": None, "threads": 1, "batch_size": 8, "in_memory": False, "screen": QUIET}


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker")
def test_any_number_of_workers_changed_in_mid_run_gives_the_same_bits(colours, tmp_path, monkeypatch):
    for workers in (0, 2, 4):
        mixlab.train("small_data", str(colours), run=tmp_path / f"w{workers}", num_workers=workers, **STREAM)
    assert same_weights(tmp_path / "w0", tmp_path / "w2")
    assert same_weights(tmp_path / "w0", tmp_path / "w4")
    real = fit.train_step

    def stop(state, batch, clock):
        if clock.step == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(state, batch, clock)

    with monkeypatch.context() as patch:
        patch.setattr(fit, "train_step", stop)
        with pytest.raises(Interrupted):
            mixlab.train("small_data", str(colours), run=tmp_path / "cut", num_workers=4, **STREAM)
    recipe = tmp_path / "cut" / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("num_workers = 4", "num_workers = 2"))
    mixlab.resume(tmp_path / "cut", screen=QUIET)
    assert same_weights(tmp_path / "w0", tmp_path / "cut")


def test_killed_workers_are_replaced_and_change_nothing(colours, tmp_path, monkeypatch):
    mixlab.train("small_data", str(colours), run=tmp_path / "calm", num_workers=0, **STREAM)
    real, killed = fit.train_step, []

    def kill_one(state, batch, clock):
        if clock.step in (1, 9):
            children = multiprocessing.active_children()
            killed.append(children[0].pid)
            os.kill(children[0].pid, signal.SIGKILL)
        return real(state, batch, clock)

    monkeypatch.setattr(fit, "train_step", kill_one)
    mixlab.train("small_data", str(colours), run=tmp_path / "run", num_workers=2, **STREAM)
    assert len(set(killed)) == 2
    assert same_weights(tmp_path / "calm", tmp_path / "run")


def test_workers_that_keep_dying_end_the_training_with_the_reason(colours, tmp_path, monkeypatch):
    monkeypatch.setattr(worker_module, "MAX_WORKER_DEATHS", 0)

    def kill_all(state, batch, clock):
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)
        return StepResult(loss=0.0, num_correct=0, num_images=8, lr=0.0)

    monkeypatch.setattr(fit, "train_step", kill_all)
    with pytest.raises(DataError, match="died 1 times"):
        mixlab.train("small_data", str(colours), run=tmp_path / "run", num_workers=2, **STREAM)


# Memory, clock, storage


def fake_memory(monkeypatch, per_image: int, total: int):
    """A machine of `total` bytes on which a step takes 1000 bytes and `per_image` for each image."""
    peak = [0]
    real = fit.train_step

    def step(state, batch, clock):
        need = 1000 + per_image * len(batch.image) // state.recipe.accumulate
        if need > total:
            raise RuntimeError("out of memory")
        peak[0] = max(peak[0], need)
        return real(state, batch, clock)

    monkeypatch.setattr(fit, "train_step", step)
    monkeypatch.setattr(batch_size, "_used", lambda device: peak[0])
    monkeypatch.setattr(batch_size, "_memory", lambda device, world: total / batch_size.MEMORY_SHARE)


@pytest.mark.parametrize(
    ("total", "expected"), [(1000 + 100 * 70, 64), (10**9, 1024), (1000 + 100 * 5, 4), (1150, 1)]
)
def test_batch_size_auto_is_the_largest_that_fits(total, expected, tmp_path, monkeypatch):
    fake_memory(monkeypatch, 100, total)
    digits(tmp_path / "run", batch_size="auto", steps=1)
    recipe = (tmp_path / "run/recipe.toml").read_text()
    assert f"batch_size = {expected}\n" in recipe


def test_batch_size_auto_counts_parts_and_a_failure_that_is_no_lack_of_memory_is_told(tmp_path, monkeypatch):
    fake_memory(monkeypatch, 100, 1000 + 100 * 70)
    digits(tmp_path / "shards", batch_size="auto", virtual_shards=8, steps=1)
    assert "batch_size = 64\n" in (tmp_path / "shards/recipe.toml").read_text()
    digits(tmp_path / "run", batch_size="auto", accumulate=2, steps=1)
    assert "batch_size = 128\n" in (tmp_path / "run/recipe.toml").read_text()
    monkeypatch.setattr(fit, "train_step", lambda *_: (_ for _ in ()).throw(RuntimeError("a shape")))
    with pytest.raises(RuntimeError, match="a shape"):
        digits(tmp_path / "other", batch_size="auto", steps=1)
    fake_memory(monkeypatch, 100, 50)
    with pytest.raises(TrainingError, match="one image a process"):
        digits(tmp_path / "none", batch_size="auto", steps=1)


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
            mixlab.resume(run, screen=QUIET)
    assert mixlab.resume(run, screen=QUIET)["steps"] == 12


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
            "batch_size": 8,
            "data__in_memory": False,
            "data__num_workers": 2,
            "timeout_seconds": 2,
        }
        mixlab.train("small_data", str(tmp_path / "data"), run=tmp_path / "run", screen=QUIET, **options)

    began = time.monotonic()
    assert ranks.wait(ranks.start(job), 40) == [1]
    assert time.monotonic() - began < 30
    # One that is stopped does not hand over what it has read before, either.
    assert f"gave none for 2 s at step {'3' if how == 'waits' else ''}" in capfd.readouterr().err


@pytest.mark.parametrize("how", ["deleted", "moved"])
def test_a_run_folder_that_vanishes_is_said_at_once(how, tmp_path, monkeypatch):
    real, run = fit.train_step, tmp_path / "run"

    def vanishing(state, batch, clock):
        if clock.step == 4 and how == "deleted":
            shutil.rmtree(run)
        elif clock.step == 4:
            run.rename(tmp_path / "elsewhere")
        return real(state, batch, clock)

    monkeypatch.setattr(fit, "train_step", vanishing)
    with pytest.raises(TrainingError, match=r"the run folder is gone: .* before step 5"):
        digits(run)
    assert not run.exists()


def test_ctrl_c_while_a_run_is_opened_again_says_that_it_is_as_it_was(tmp_path, monkeypatch):
    digits(tmp_path / "run")
    monkeypatch.setattr(reopen, "read_everywhere", interrupted)
    with pytest.raises(Interrupted, match=r"the run is as it was.*--resume") as error:
        mixlab.resume(tmp_path / "run", screen=QUIET)
    assert error.value.exit_status == 130


def interrupted(*_, **__):
    raise KeyboardInterrupt
