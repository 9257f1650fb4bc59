"""Training in whatever process somebody has: after other work, in threads, beside another one; nothing stays behind.

The trainings here are processes with their own number of threads, all cores, as people run them.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from mixlab.checkpoint.checkpoints import load_newest_checkpoint
from mixlab.cpu.workers import why_none

pytestmark = [
    pytest.mark.skipif(why_none() is not None, reason=str(why_none())),
    pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="looks for processes in /proc"),
]
HEAD = """
import gc, hashlib, json, os, sys, threading, time
import torch
import mixlab
import mixlab.cpu.cores
mixlab.cpu.cores.START_SECONDS = 0.0  # these trainings would be over before
torch.set_num_threads(2)  # also where there is one core

def train(run, steps=30, **options):
    mixlab.train("digits", "digits", steps=steps, run=run, threads=2, figures=False, **options)

def bits(run):
    with open(f"runs/{run}/weights.safetensors", "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        file.read(size)  # says when and where it was made
        return hashlib.sha256(file.read()).hexdigest()
"""
EXPORT = "torch.export.export(torch.nn.Linear(3, 3), (torch.ones(2, 3),))\n"
BACKWARD = "torch.nn.Linear(3, 3)(torch.ones(2, 3)).sum().backward()\n"
WAYS = {
    "alone": "train('run')",
    "after an export": EXPORT + BACKWARD + "train('run')",
    "after a backward": BACKWARD + "train('run')",
    "in a thread": "one = threading.Thread(target=train, args=['run']); one.start(); one.join()",
    "in asyncio": (
        "import asyncio\n"
        "async def main():\n"
        "    await asyncio.gather(asyncio.to_thread(train, 'run'), asyncio.sleep(0))\n"
        "asyncio.run(main())"
    ),
    "within a coroutine": "import asyncio\nasync def main():\n    train('run')\nasyncio.run(main())",
}


def environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}


def python(folder, *arguments, before=()):
    return subprocess.run(
        [*before, sys.executable, *arguments],
        cwd=folder,
        env=environment() | {"PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )


def script(code, folder, *before, check=True):
    done = python(folder, "-c", HEAD + code, before=before)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def last_json(done):
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def bits_alone(tmp_path_factory):
    return last_json(
        script(WAYS["alone"] + "\nprint(json.dumps(bits('run')))", tmp_path_factory.mktemp("alone"))
    )


@pytest.mark.slow  # two processes that import everything, and their programs
@pytest.mark.parametrize("way", [way for way in WAYS if way != "alone"])
def test_it_trains_to_the_same_bits(way, tmp_path, bits_alone):
    done = script(WAYS[way] + "\nprint(json.dumps(bits('run')))", tmp_path)
    assert last_json(done) == bits_alone


@pytest.mark.slow  # tests/cpu/test_workers.py has it without a training
def test_where_no_program_can_be_started_threads_train_and_it_is_said(tmp_path, bits_alone):
    code = "sys.executable = '/nowhere/python'\ntrain('run')\nprint(json.dumps(bits('run')))"
    done = script(code, tmp_path)
    assert last_json(done) == bits_alone
    said = "Threads computed this training, slower than programs beside it: "
    assert said in done.stdout + done.stderr
    assert said in (tmp_path / "runs" / "run" / "report.html").read_text()


@pytest.mark.slow
def test_two_at_once_in_two_threads(tmp_path, bits_alone):
    code = (
        "both = [threading.Thread(target=train, args=[run]) for run in ('a', 'b')]\n"
        "[one.start() for one in both]; [one.join() for one in both]\n"
        "print(json.dumps([bits('a'), bits('b')]))"
    )
    assert last_json(script(code, tmp_path)) == [bits_alone, bits_alone]


@pytest.mark.slow
def test_with_odd_places_on_the_path(tmp_path, bits_alone):
    code = (
        "import pathlib\nsys.path.append(pathlib.Path('src'))\ntrain('run')\nprint(json.dumps(bits('run')))"
    )
    assert last_json(script(code, tmp_path)) == bits_alone


@pytest.mark.slow
def test_five_times_in_a_row_nothing_is_left(tmp_path):
    code = (
        "def left():\n"
        "    gc.collect()\n"
        "    pids = open(f'/proc/self/task/{os.getpid()}/children').read().split()\n"
        "    mapped = sum('memfd:mixlab' in line for line in open('/proc/self/maps'))\n"
        "    return [len(pids), len(os.listdir('/proc/self/fd')), mapped]\n"
        "found = []\n"
        "for number in range(5):\n"
        "    train(f'run{number}')\n"
        "    found.append(left())\n"
        "print(json.dumps(found))"
    )
    found = last_json(script(code, tmp_path))
    assert [row[0] for row in found] == [0] * 5
    assert found[1:] == [found[1]] * 4, found
    assert found[1][2] == 0


@pytest.mark.slow
def test_in_a_notebook_that_has_exported_before(tmp_path, bits_alone, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    cells = [HEAD, EXPORT + BACKWARD, "train('run')", "print(bits('run'))"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert notebook.cells[-1].outputs[-1]["text"].strip() == bits_alone


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("unshare") is None, reason="no unshare")
def test_with_a_small_dev_shm(tmp_path):
    code = (
        "import torch.nn.functional as F\n"
        "from mixlab.models.catalog import create_model\n"
        "from mixlab.cpu.cores import Cores\n"
        "cores = Cores(create_model('mixer_pyramid_nano2', num_classes=10))\n"
        "target = F.one_hot(torch.arange(512) % 10, 10).float()\n"
        "for _ in range(2):\n"
        "    cores.backward(torch.randn(512, 3, 32, 32), target, F.cross_entropy); cores.wait()\n"
        "free = os.statvfs('/dev/shm')\n"
        "print(json.dumps([free.f_blocks * free.f_frsize, cores.problem, cores._job.workers._results.nbytes]))"
    )
    small = 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"'
    done = script(code, tmp_path, "unshare", "--mount", "sh", "-c", small, "sh", check=False)
    if done.returncode and ("unshare" in done.stderr or "mount" in done.stderr):
        pytest.skip("this process may not mount")
    size, problem, num_bytes = last_json(done)
    assert size == 64 << 20
    assert problem is None
    assert num_bytes > size


def started(folder, *more, steps=4000):
    """A training as a command, once its other process computes: (process, the other's id)."""
    command = [sys.executable, "-m", "mixlab", "train", "digits", "--steps", str(steps), "--threads", "2"]
    process = subprocess.Popen(
        [*command, "--run", str(folder / "run"), "--checkpoint-seconds", "0.2", *more],
        cwd=folder,
        env=environment() | {"PYTHONPATH": os.getcwd()},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (found := [child for child in children(process.pid) if has_job(child)]):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    begun = core_seconds(found[0])
    while core_seconds(found[0]) < begun + 1.0:  # of its own: a model is made in less, so it computes parts
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process, found[0]


def has_job(pid):
    """Whether a process has the memory that trainings share."""
    with open(f"/proc/{pid}/maps") as file:
        return "memfd:mixlab" in file.read()


def core_seconds(pid):
    with open(f"/proc/{pid}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[11]) / os.sysconf("SC_CLK_TCK")


def children(pid):
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return [int(child) for child in file.read().split()]
    except OSError:
        return []


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_a_process_that_ends_or_stops_is_an_error_and_the_run_goes_on(tmp_path, number):
    # One that was killed is seen without any wait; the wait of one that is stopped is longer than a busy machine's.
    seconds = "300" if number == signal.SIGKILL else "5"
    process, other = started(tmp_path, "--timeout-seconds", seconds, steps=10**6)
    os.kill(other, number)
    errors = ""
    try:
        for turn in range(20):
            try:
                _, errors = process.communicate(timeout=8)
                break
            except subprocess.TimeoutExpired:
                if number == signal.SIGSTOP:  # between two parts: the first process goes on alone
                    os.kill(other, signal.SIGCONT)
                    time.sleep(0.05 + 0.037 * turn)
                    os.kill(other, number)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 1, errors
    assert ("has ended" if number == signal.SIGKILL else "is stopped") in errors
    assert not os.path.isdir(f"/proc/{other}")
    found, _ = load_newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert found.step > 0  # from which it goes on


@pytest.mark.slow
def test_no_process_is_left_two_seconds_after_the_first_was_killed(tmp_path):
    process, other = started(tmp_path)
    process.kill()
    process.communicate(timeout=60)
    end = time.monotonic() + 2
    while os.path.isdir(f"/proc/{other}") and time.monotonic() < end:
        time.sleep(0.05)
    assert not os.path.isdir(f"/proc/{other}")


@pytest.mark.slow  # six processes that import everything
def test_a_script_without_a_guard_is_told_so_at_once(tmp_path):
    numpy = pytest.importorskip("numpy")
    image = pytest.importorskip("PIL.Image")
    for name in "ab":
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(12):
            pixels = numpy.random.default_rng(number).integers(0, 255, (32, 32, 3), dtype=numpy.uint8)
            image.fromarray(pixels).save(tmp_path / "data" / name / f"{number}.png")
    (tmp_path / "script.py").write_text(
        "import multiprocessing\n"
        "if multiprocessing.current_process().name == 'MainProcess':\n"
        "    multiprocessing.set_start_method('spawn')\n"
        "import mixlab\n"
        "mixlab.train('data', run='run', data__in_memory=False, data__num_workers=2, steps=6)\n"
    )
    done = python(tmp_path, "script.py")
    assert done.returncode != 0
    assert "it would train again in each" in done.stderr
    assert 'if __name__ == "__main__":' in done.stderr
    assert done.stderr.count("Traceback") == 1, done.stderr  # none of a worker
