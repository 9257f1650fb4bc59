"""The command under the real torchrun: a lost process, machines that come and go, and the end of the time allowed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.reliability.ranks import free_port
from mixlab.files import sha256
from mixlab.report.run_log import read_run_log

pytestmark = pytest.mark.slow
TRAIN = "-m -- mixlab train digits --virtual-shards 2 --checkpoint-seconds 0.5 --without-pictures --without-figures"
STEPS = 160
LONG = 640  # steps that take longer than another machine takes to join


def torchrun(folder: Path, options: str, steps: int = STEPS, **variables: str) -> subprocess.Popen:
    folder.mkdir(exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    command = [sys.executable, "-m", "torch.distributed.run", *options.split(), *TRAIN.split()]
    command += ["--steps", str(steps), "--run", "run"]
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
        )


def children(process: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process)], capture_output=True, text=True)
    return [int(line) for line in found.stdout.split()]


def wait_for(folder: Path, event: str, count: int = 1, *, of: int | None = None) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        log = folder / "runs/run/metrics.jsonl"
        if log.exists():
            rows = [row for row in read_run_log(log) if row["event"] == event]
            if len(rows) >= count:
                return
        time.sleep(0.05)
    pytest.fail(f"{event} did not come: {(folder / 'log').read_text()[-3000:]}")


def ending(folder: Path, steps: int) -> str:
    """The digest of the weights of an undisturbed run."""
    assert torchrun(folder, "--nproc-per-node 1", steps).wait(120) == 0, (folder / "log").read_text()
    return sha256(folder / "runs/run/weights.safetensors")


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> str:
    return ending(tmp_path_factory.mktemp("calm"), STEPS)


def test_a_killed_rank_is_started_again_and_the_run_ends_with_the_same_bits(expected, tmp_path):
    job = torchrun(tmp_path, f"--nproc-per-node 2 --max-restarts 2 --master-port {free_port()}")
    wait_for(tmp_path, "train", 30)
    os.kill(children(job.pid)[-1], signal.SIGKILL)
    assert job.wait(120) == 0, (tmp_path / "log").read_text()[-3000:]
    events = [row["event"] for row in read_run_log(tmp_path / "runs/run/metrics.jsonl")]
    assert events.count("resume") == 1
    assert "no sign of life from rank 1" in (tmp_path / "log").read_text()
    assert sha256(tmp_path / "runs/run/weights.safetensors") == expected


def test_a_machine_joins_and_leaves_and_the_run_ends_with_the_same_bits(tmp_path):
    options = (
        f"--nnodes 1:2 --nproc-per-node 1 --max-restarts 3 --rdzv-backend c10d --rdzv-id job "
        f"--rdzv-endpoint 127.0.0.1:{free_port()} --rdzv-conf last_call_timeout=2"
    )
    # Without this a late machine waits for an address that torch 2.14 gives to the first ones only.
    own_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    first = torchrun(tmp_path, options, LONG, **own_store)
    wait_for(tmp_path, "train", 10)
    second = torchrun(tmp_path, options, LONG, **own_store)
    wait_for(tmp_path, "resume")
    time.sleep(1)
    for process in (*children(second.pid), second.pid):
        os.kill(process, signal.SIGKILL)
    second.wait(10)
    assert first.wait(120) == 0, (tmp_path / "log").read_text()[-3000:]
    log = (tmp_path / "log").read_text()
    assert "rank 0 of 2 got no answer" in log
    assert sha256(tmp_path / "runs/run/weights.safetensors") == ending(tmp_path / "calm", LONG)


def test_sigterm_to_torchrun_saves_and_the_same_command_goes_on(expected, tmp_path):
    options = f"--nproc-per-node 2 --max-restarts 1 --master-port {free_port()}"
    job = torchrun(tmp_path, options)
    wait_for(tmp_path, "train", 10)
    os.kill(job.pid, signal.SIGTERM)
    sent = time.monotonic()
    assert job.wait(30) == 1  # torchrun's own status; each rank's was 143
    assert time.monotonic() - sent < 10
    log = (tmp_path / "log").read_text()
    assert "stopped by SIGTERM after step" in log
    assert torchrun(tmp_path, options).wait(120) == 0
    assert "resumed after step" in (tmp_path / "log").read_text()
    assert sha256(tmp_path / "runs/run/weights.safetensors") == expected


def test_an_existing_run_of_another_command_is_not_gone_on_with(tmp_path):
    (tmp_path / "runs/run").mkdir(parents=True)
    job = torchrun(tmp_path, f"--nproc-per-node 2 --max-restarts 1 --master-port {free_port()}")
    assert job.wait(60) == 1
    assert "this run exists already" in (tmp_path / "log").read_text()
