"""A training on a GPU as a person has it: killed, resumed, moved to a CPU and back, out of memory, and used after."""

import http.client
import io
import json
import signal
import subprocess
import sys
import threading
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits

import mixlab
from mixlab.checkpoint.checkpoints import load_newest_checkpoint
from mixlab.checkpoint.open import open_weights
from mixlab.errors import TrainingError
from mixlab.report.run_log import read_run_log
from mixlab.training.evaluate import evaluate
from mixlab.training.failures import explain_out_of_memory
from mixlab.training.recipe import Recipe
from mixlab.training.signals import Interrupted
from tests.gpu.conftest import DEVICES
from tests.training.seams import QUIET, StopAfter

pytestmark = [pytest.mark.gpu, pytest.mark.slow]  # of a CPU, tests/training and tests/serving test the same
ROOT = Path(__file__).resolve().parents[2]
# Whatever draws random numbers or keeps state.
FULL = {
    "steps": 40, "epochs": None, "batch_size": 32, "threads": 1, "keep_weights": "last", "ema_decay": 0.9,
    "accumulate": 2, "augment__cutmix_alpha": 1.0, "model__stochastic_depth": 0.2,
}  # fmt: skip
KILLED_AT = 12
TRAIN = """
import json, os, signal, sys, time
from pathlib import Path
import torch
import mixlab
from mixlab.report.screen import Screen
from mixlab.training import fit

run, device, options, stop, number = sys.argv[1:]
torch.use_deterministic_algorithms(True)
real = fit.train_step

def step(state, batch, clock):
    if clock.step == int(stop):
        while not list(Path(run).glob("checkpoints/step_*")):
            time.sleep(0.01)
        os.kill(os.getpid(), int(number))
    return real(state, batch, clock)

fit.train_step = step
mixlab.train("digits", "digits", run=run, device=device, screen=Screen(quiet=True), with_pictures=False,
             checkpoint_seconds=0.0, **json.loads(options))
"""


def digits(run: Path, device: torch.device, **options):
    return mixlab.train(
        "digits",
        "digits",
        run=run,
        device=device.type,
        figures=False,
        with_pictures=False,
        **({"screen": QUIET} | FULL | options),
    )


def ended(run: Path, device: torch.device, number: int, **options) -> int:
    """Exit status of a process that trains in `run`, and is sent signal `number` after some steps."""
    arguments = [str(run), device.type, json.dumps(FULL | options), str(KILLED_AT), str(int(number))]
    return subprocess.run(
        [sys.executable, "-c", TRAIN, *arguments], cwd=ROOT, check=False, timeout=120
    ).returncode


@pytest.fixture(scope="module")
def run(device, tmp_path_factory):
    """A finished training on the device, with deterministic algorithms."""
    torch.use_deterministic_algorithms(True)
    folder = tmp_path_factory.mktemp("run") / "whole"
    digits(folder, device)
    return folder


def test_a_killed_training_resumes_to_the_same_bits(run, device, tmp_path):
    cut = tmp_path / "cut"
    assert ended(cut, device, signal.SIGKILL) == -signal.SIGKILL
    torch.use_deterministic_algorithms(True)
    mixlab.resume(cut, device=device.type, with_pictures=False, screen=QUIET, figures=False)
    log = [row for row in read_run_log(cut / "metrics.jsonl") if row["event"] == "resume"]
    assert [row["step"] for row in log] > [0]
    whole, again = (load_file(folder / "weights.safetensors") for folder in (run, cut))
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())


def test_a_checkpoint_goes_to_the_cpu_and_back(device, tmp_path):
    """Stopped on the device, then on a CPU, and ended on the device: near what the CPU alone has."""
    options = {"optimizer__name": "sgd", "model__stochastic_depth": 0.0, "optimizer__lr": 0.05}
    moved, still = tmp_path / "moved", tmp_path / "still"
    digits(still, torch.device("cpu"), **options)
    for place, step in ((device.type, 10), ("cpu", 20)):
        screen = StopAfter(step)
        if moved.exists():
            go_on = partial(mixlab.resume, moved, device=place, screen=screen, figures=False)
        else:
            go_on = partial(digits, moved, device, screen=screen, **options)
        with pytest.raises(Interrupted):
            go_on()
        checkpoint, _ = load_newest_checkpoint(moved / "checkpoints")
        assert checkpoint.step == step
        assert all(t.device.type == "cpu" for group in checkpoint.tensors.values() for t in group.values())
    mixlab.resume(moved, device=device.type, with_pictures=False, screen=QUIET, figures=False)
    expected, found = (load_file(folder / "weights.safetensors") for folder in (still, moved))
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() <= 1e-3, name


@pytest.mark.parametrize("device", DEVICES[1:], indirect=True)
def test_fp16_keeps_its_scale_over_a_resume(device, tmp_path):
    with pytest.raises(Interrupted):
        digits(tmp_path / "run", device, precision="fp16", screen=StopAfter(10))
    checkpoint, _ = load_newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert checkpoint.state["scaler"]["scale"] > 0
    mixlab.resume(tmp_path / "run", device=device.type, with_pictures=False, screen=QUIET, figures=False)
    losses = [
        row["loss"] for row in read_run_log(tmp_path / "run" / "metrics.jsonl") if row["event"] == "train"
    ]
    assert losses[-1] < losses[0]


def limit_memory(device: torch.device, num_bytes: int) -> None:
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(num_bytes / total)


LARGE = {
    "model__name": "mixer_nano4",
    "data__image_size": [64, 64],
    "steps": 1,
    "accumulate": 1,
}  # 15 MB an image


def test_the_batch_size_is_found_by_trying(device, tmp_path):
    limit_memory(device, 2 << 30)
    options = LARGE if device.type == "cuda" else {"steps": 1, "accumulate": 1}
    digits(tmp_path / "run", device, batch_size="auto", **options)
    found = next(
        line for line in (tmp_path / "run/recipe.toml").read_text().splitlines() if "batch_size" in line
    )
    size = int(found.split("=")[1])
    assert 16 <= size <= 128 if device.type == "cuda" else size == 1024  # as many as there are


@pytest.mark.parametrize("device", DEVICES[1:], indirect=True)
def test_a_training_that_runs_out_of_memory_says_what_to_do(device, tmp_path):
    limit_memory(device, 1 << 30)
    with pytest.raises(TrainingError, match="--accumulate 2") as told:
        digits(tmp_path / "run", device, **(LARGE | {"batch_size": 1024}))
    assert "cuda" in told.value.message


def test_what_the_allocator_says_is_understood(device):
    with pytest.raises((RuntimeError, MemoryError)) as raised:
        torch.empty(1 << 48, device=device)
    explained = explain_out_of_memory(raised.value, Recipe(batch_size=64), device)
    assert "--accumulate 2" in explained.hint


def pictures(count: int = 12) -> list[np.ndarray]:
    return [(image * 15).astype(np.uint8)[..., None] for image in load_digits().images[:count]]


def test_predictions_and_accuracy_of_the_run_are_the_cpus(run, device):
    on_cpu, found = (
        mixlab.load(run, device=place).predict(pictures(), top=10) for place in ("cpu", device.type)
    )
    for a, b in zip(on_cpu, found, strict=True):
        ours, theirs = ({g["label"]: g["probability"] for g in row["predictions"]} for row in (a, b))
        assert ours == pytest.approx(theirs, abs=1e-5)
    expected, again = (
        evaluate(run, device=place, threads=1, screen=QUIET)[0] for place in ("cpu", device.type)
    )
    assert again.num_images == expected.num_images == 357
    assert abs(again.num_correct - expected.num_correct) <= 1
    assert again.loss == pytest.approx(expected.loss, abs=1e-4)


@pytest.mark.parametrize(
    ("to", "ending", "needs"), [("torch-export", "pt2", "torch"), ("onnx", "onnx", "onnxscript")]
)
def test_the_run_is_exported(run, to, ending, needs, device, tmp_path):
    pytest.importorskip(needs)
    if (to, device.type) == ("onnx", "cpu"):
        pytest.skip("tests/exports/test_export.py does")
    from mixlab.exports.export import export

    out = tmp_path / f"model.{ending}"
    result = export(open_weights(run), out, to=to, examples=pictures(4))
    assert out.is_file()
    assert result["to"] == to


def test_the_run_is_served(run, device):
    for name in ("starlette", "uvicorn", "prometheus_client"):
        pytest.importorskip(name)
    from mixlab.serving.listen import make_server
    from mixlab.serving.server import create_app
    from mixlab.serving.service import Limits, Service

    classifier = mixlab.load(run, device=device.type)
    port: Future[int] = Future()
    app = create_app(Service(classifier, "digits", Limits(decoders=1)), token=None)
    server = make_server(app, host="127.0.0.1", port=0, started=port.set_result)
    thread = threading.Thread(target=server.run)
    thread.start()
    file = io.BytesIO()
    Image.fromarray(pictures(1)[0][..., 0]).save(file, "PNG")
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port.result(timeout=60), timeout=60)
        connection.request("POST", "/predict", file.getvalue())
        answer = connection.getresponse()
        assert answer.status == 200
        best = json.loads(answer.read())["predictions"][0]
        connection.close()
    finally:
        server.should_exit = True
        thread.join(timeout=60)
    expected = classifier.predict(file.getvalue())[0]["predictions"][0]
    assert best["label"] == expected["label"]
    assert best["probability"] == pytest.approx(expected["probability"], abs=1e-5)
