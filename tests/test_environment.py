"""Machines as they are: streams that are closed or read no more, no locks, no right to write, no home, Ctrl-C."""

import errno
import fcntl
import io
import json
import logging
import os
import signal
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mixlab as package
from mixlab.checkpoint import download
from mixlab.data import hub
from mixlab.data.images.known import open_torchvision
from mixlab.errors import DataError, DiskError, MixlabError, UsageError
from mixlab.files import can_be_written, take_lock
from mixlab.report.screen import Screen
from mixlab.studies.harness import Options, Study, conduct
from mixlab.training.run_folder import locked
from mixlab.training.signals import Interrupted, stopped_at_once
from tests.forked import ENVIRONMENT, MIXLAB, mixlab
from tests.training.seams import QUIET, Listening


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with weights `weights` and `picture.png`."""
    folder = tmp_path_factory.mktemp("place")
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(folder / "picture.png")
    command = ["train", "digits", "--steps", "1", "--run", "first", "--threads", "1", "--without-figures"]
    result = mixlab(*command, cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder


# Standard streams


@pytest.mark.parametrize(
    ("stdout", "extra"), [("closed", []), ("broken", []), ("broken", ["--json"])], ids=str
)
def test_the_work_is_done_in_silence_where_nobody_reads_it(stdout, extra, place):
    result = mixlab("predict", "first", "picture.png", "--csv", "out.csv", *extra, cwd=place, stdout=stdout)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert "mixlab:" not in result.stderr
    assert (place / "out.csv").read_text().startswith("path,rank")
    (place / "out.csv").unlink()


def test_a_failure_is_told_on_standard_error_alone_where_there_is_no_other(place):
    result = mixlab("predict", "first", "missing.png", "--json", cwd=place, stdout="broken")
    assert result.returncode == 2
    assert result.stderr.startswith("mixlab: there is no such image")


@pytest.mark.parametrize("stderr", ["closed", "broken", "full"])
def test_without_standard_error_the_answer_is_on_standard_output_alone(stderr, place):
    result = mixlab("predict", "first", "picture.png", "--json", cwd=place, stderr=stderr)
    assert result.returncode == 0
    assert json.loads(result.stdout)["num_ok"] == 1
    result = mixlab("trian", cwd=place, stderr=stderr)
    assert (result.returncode, result.stdout) == (2, "")


def test_a_training_goes_on_when_the_reader_of_its_lines_has_gone(tmp_path):
    command = ["train", "digits", "--steps", "2", "--run", "r", "--threads", "1", "--without-figures"]
    result = mixlab(*command, cwd=tmp_path, stdout="broken", stderr="broken")
    assert result.returncode == 0
    assert (tmp_path / "runs" / "r" / "report.html").is_file()


@pytest.mark.parametrize("command", [["recipes"], ["recipes", "--json"], ["train", "--help"], ["--version"]])
def test_a_full_disk_behind_standard_output_is_one_sentence(command, tmp_path):
    result = mixlab(*command, cwd=tmp_path, stdout="full")
    assert result.returncode == 1
    assert "mixlab: could not write: No space left on device\n  where: standard output" in result.stderr
    assert "Traceback" not in result.stderr
    assert "Exception ignored" not in result.stderr


@pytest.mark.parametrize("ending", [">&-", "2>&-", ">&- 2>&-", "<&- >&-", "| true", "2>&1 | true"])
def test_a_shell_sees_neither_traceback_nor_another_status(ending, tmp_path):
    """A real process: Python itself writes what is left in its buffers when it ends."""
    line = f"set -o pipefail; {' '.join(MIXLAB)} --help {ending}"
    for environment in (ENVIRONMENT, ENVIRONMENT | {"PYTHONUNBUFFERED": "1"}):
        result = subprocess.run(
            ["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, env=environment
        )
        assert result.returncode == 0, (environment.get("PYTHONUNBUFFERED"), result.stderr)
        assert "rror" not in result.stderr


def test_a_screen_of_a_service_without_standard_output_is_silent():
    closed = io.StringIO()
    closed.close()
    for stream in (None, closed):
        with redirect_stdout(stream):
            screen = Screen()
            screen.say("nobody hears this")
            with screen.progress("work", 3) as bar:
                bar.update(1)


# Locks


def no_locks(monkeypatch, number: int) -> None:
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_without_locks_is_one_warning(number, tmp_path, monkeypatch):
    no_locks(monkeypatch, number)
    screen = Listening()
    for _ in range(2):
        with locked(tmp_path, screen):
            pass
    assert len(screen.said) == 1
    assert "has no locks" in screen.said[0]


@pytest.mark.parametrize("number", [errno.EWOULDBLOCK, errno.EACCES])
def test_a_lock_that_another_process_has_is_refused(number, tmp_path, monkeypatch):
    no_locks(monkeypatch, number)
    with pytest.raises(UsageError, match="another process is training"), locked(tmp_path, QUIET):
        pass


def test_training_goes_on_without_locks_and_says_so(tmp_path, monkeypatch):
    no_locks(monkeypatch, errno.ENOSYS)
    screen = Listening()
    package.train("digits", "digits", run=tmp_path / "run", steps=1, threads=1, screen=screen, figures=False)
    assert (tmp_path / "run" / "report.html").is_file()
    assert sum("has no locks" in line for line in screen.said) == 1


def test_without_locks_two_downloads_do_not_share_a_file(tmp_path, monkeypatch):
    parts = []
    monkeypatch.setenv("MIXLAB_CACHE", str(tmp_path))
    monkeypatch.setattr(download, "_download", lambda entry, path, part, *_: parts.append(part.name))
    monkeypatch.setattr(download, "_verify", lambda *_: None)
    entry = download.PUBLISHED["mixer_b16:imagenet1k"]
    download.fetch_published(entry)
    no_locks(monkeypatch, errno.ENOLCK)
    download.fetch_published(entry)
    assert parts == ["Mixer-B_16.npz.part", f"Mixer-B_16.npz.{os.getpid()}.part"]


def test_a_lock_is_seen_by_another_open_file(tmp_path):
    with (tmp_path / "lock").open("a") as one, (tmp_path / "lock").open("a") as other:
        assert take_lock(one)
        with pytest.raises(BlockingIOError):
            take_lock(other)


# Folders that cannot be written. As root every folder can be, so a file stands where a folder is needed.


@pytest.fixture
def nowhere(tmp_path) -> Path:
    (tmp_path / "file").touch()
    return tmp_path / "file" / "below"


def test_what_can_be_written_is_known_before_it_is_there(tmp_path, nowhere):
    assert can_be_written(tmp_path)
    assert can_be_written(tmp_path / "a" / "b")
    assert not can_be_written(nowhere)
    assert not can_be_written(tmp_path / "file")


def test_a_run_that_cannot_be_written_is_refused_before_the_data_is_read(nowhere):
    with pytest.raises(DiskError, match=r"run folder cannot be made.*--run PATH"):
        package.train("no such data", "digits", run=nowhere / "run", steps=1, screen=QUIET, figures=False)


def test_a_download_without_a_place_names_the_option(nowhere):
    with pytest.raises(DiskError, match=r"cannot be kept here.*--data-dir"):
        open_torchvision("cifar10", nowhere, download=True)
    with pytest.raises(DataError, match="--download"):
        open_torchvision("cifar10", nowhere, download=False)


def test_a_cache_of_weights_without_a_place_names_the_variable(nowhere, monkeypatch):
    monkeypatch.setenv("MIXLAB_CACHE", str(nowhere))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("MIXLAB_OFFLINE", raising=False)
    for name in ("mixer_b16:imagenet1k", "timm/mixer_b16_224.goog_in21k"):
        with pytest.raises(DiskError, match="MIXLAB_CACHE"):
            download.fetch_published(download.PUBLISHED[name])


def test_without_a_home_folder_only_what_needs_one_fails(monkeypatch):
    import pwd

    def unknown(uid):
        raise KeyError(uid)

    for name in ("HOME", "MIXLAB_CACHE", "XDG_CACHE_HOME", "HF_HUB_OFFLINE", "MIXLAB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(DiskError, match=r"no home folder.*MIXLAB_CACHE"):
        package.load("mixer_b16:imagenet1k")
    assert len(download.list_published()) == len(download.PUBLISHED)
    package.load("mixer_cifar:cifar10")  # comes with the package


def test_a_cache_of_datasets_without_a_place_names_the_variable(nowhere, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.parquet").write_bytes(b"PAR1")
    monkeypatch.chdir(tmp_path)
    for cache in (str(nowhere), "~/.cache/huggingface"):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        with pytest.raises(DiskError, match="HF_HOME"):
            hub.open_hub(str(tmp_path / "set"))


def test_figures_are_drawn_in_silence_where_matplotlib_has_no_folder(nowhere):
    """A new process: matplotlib looks for its folder once, when it is imported."""
    code = (
        "from pathlib import Path; import mixlab.report.figures as f; "
        "f.save_figure(f.learning_curves([]), Path('x'))"
    )
    environment = {key: value for key, value in ENVIRONMENT.items() if key != "HOME"}
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True, text=True, cwd=nowhere.parent.parent,
        env=environment | {"MPLCONFIGDIR": str(nowhere), "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert (result.returncode, result.stderr) == (0, "")
    assert (nowhere.parent.parent / "x").is_file()
    assert logging.getLogger("matplotlib").level == logging.NOTSET  # its other warnings are left as they are


# Ctrl-C


class Stopping(Screen):
    """A silent screen that sends this process a signal when work of this name begins, or on such a line."""

    def __init__(self, text: str, number: int = signal.SIGINT) -> None:
        super().__init__(quiet=True)
        self.text, self.number = text, number

    def say(self, text: str = "") -> None:
        if self.text in text:
            os.kill(os.getpid(), self.number)

    def progress(self, label, total, start=0):
        self.say(label)
        return super().progress(label, total, start)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_before_the_report_says_what_is_there_and_resume_writes_it(number, tmp_path):
    # Of a class whose name no font can draw the report says so, just before it is written.
    for i, name in enumerate(("a", "\U0010fffd")):
        (tmp_path / "data" / name).mkdir(parents=True)
        for level in range(5):
            Image.new("L", (8, 8), 100 * i + 10 * level).save(tmp_path / "data" / name / f"{level}.png")
    run = tmp_path / "run"
    options = {"steps": 2, "threads": 1, "model__name": "mixer_pico", "figures": False}
    before = signal.getsignal(number)
    screen = Stopping("no font here can draw", number)
    with pytest.raises(Interrupted, match="the weights are there") as found:
        package.train(tmp_path / "data", "small_data", run=run, screen=screen, **options)
    assert found.value.exit_status == (130 if number == signal.SIGINT else 143)
    assert f"`mixlab train --resume {run}`" in str(found.value.hint)
    assert signal.getsignal(number) is before
    assert (run / "weights.safetensors").is_file()
    assert not (run / "report.html").exists()
    content = (run / "weights.safetensors").read_bytes()
    result = package.resume(run, screen=QUIET, figures=False)
    assert result["steps"] == 2
    assert result["test"]["num_images"] == 2
    assert (run / "report.html").is_file()
    assert (run / "weights.safetensors").read_bytes() == content


def test_a_signal_before_a_resumed_training_goes_on_leaves_the_run_as_it_was(tmp_path):
    run = tmp_path / "run"
    package.train("digits", "digits", run=run, steps=1, threads=1, screen=QUIET, figures=False)
    log = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(Interrupted, match=r"the run is as it was.*--resume") as found:
        package.resume(run, screen=Stopping("reading train"), figures=False)
    assert found.value.exit_status == 130
    assert (run / "metrics.jsonl").read_bytes() == log


def test_a_study_that_is_stopped_says_that_the_same_call_goes_on(tmp_path):
    study = Study(
        name="s", title="", question="", paper="", run=lambda options: os.kill(os.getpid(), signal.SIGINT)
    )
    with pytest.raises(MixlabError, match="the same call again goes on"):
        conduct(study, Options(out=tmp_path, screen=QUIET))


def test_a_second_signal_on_the_way_out_changes_nothing_of_what_is_said(tmp_path):
    def interrupted_twice() -> None:
        with stopped_at_once(tmp_path, "now", "again"):
            try:
                os.kill(os.getpid(), signal.SIGINT)
            finally:
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="stopped by SIGINT now"):
        interrupted_twice()
