"""A small share of benchmarks/reliability/ on every run, and proof that each of these checks can fail."""

import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import mixlab
from benchmarks.reliability import damage, faults, kills, power, ranks
from mixlab import files
from mixlab.checkpoint import checkpoints
from mixlab.data import order
from mixlab.report.screen import Screen
from mixlab.training import step as step_module

NUMBERS = (28, 5, 1)
FAULTS = [
    (NUMBERS[0], False),
    *(
        pytest.param(*fault, marks=pytest.mark.slow)
        for fault in ((NUMBERS[1], False), (NUMBERS[2], False), (None, False), (None, True))
    ),
]


@pytest.mark.parametrize(("error", "after"), FAULTS)
def test_a_fault_or_kill_at_any_call_of_a_save_leaves_a_checkpoint(error, after, tmp_path):
    for step in (1, 2):
        checkpoints.save_checkpoint(tmp_path / "c", faults.example(step))
    total = faults.count_calls(lambda: checkpoints.save_checkpoint(tmp_path / "c", faults.example(3)))
    found = {faults.try_one(tmp_path / "c", call, error, after) for call in range(total)}
    assert found == {"previous", "new"}


@pytest.mark.parametrize("kind", ["flips", "cuts", "swaps"])
def test_damage_to_a_checkpoint_is_noticed(kind, tmp_path):
    assert damage.run(tmp_path, kind, 150, seed=1)["missed"] == []


def test_a_power_cut_leaves_a_checkpoint():
    assert power.run(40, seed=2) == {"ok": 40}


@pytest.mark.slow
def test_a_killed_and_resumed_training_ends_with_the_same_bits(tmp_path):
    torch.set_num_threads(1)
    exact = {"virtual_shards": 2}
    assert ranks.wait(kills.start(tmp_path / "calm", **exact), 120) == [0]
    expected = kills.fingerprint(tmp_path / "calm")
    draw = kills.random.Random(5)
    for trial, number in enumerate((kills.signal.SIGKILL, kills.signal.SIGTERM)):
        folder = tmp_path / f"trial{trial}"
        folder.mkdir()
        result = kills.try_one(folder, draw, 3.0, number, trial == 0, (2,), **exact)
        assert result["found"] == expected, result
        if number == kills.signal.SIGTERM:
            assert all(hit["seconds"] < 10 for hit in result["hits"])


def nothing(*_, **__):
    return None


@pytest.mark.parametrize("removed", ["fsync", "fsync of folders", "hash check"])
def test_without_a_part_of_the_save_the_checks_fail(removed, tmp_path, monkeypatch):
    real = files._fsync
    if removed == "fsync":
        monkeypatch.setattr(files, "_fsync", nothing)
        assert set(power.run(40, seed=2)) != {"ok"}
    elif removed == "fsync of folders":
        monkeypatch.setattr(files, "_fsync", lambda path: None if path.is_dir() else real(path))
        assert set(power.run(40, seed=2)) != {"ok"}
    else:
        monkeypatch.setattr(checkpoints, "sha256", lambda path: "always the same")
        assert damage.run(tmp_path, "flips", 60, seed=1)["missed"] != []


def test_without_the_rename_a_fault_leaves_half_a_checkpoint(tmp_path, monkeypatch):
    class InPlace:
        """What `written_whole` would be without its temporary name."""

        def __init__(self, path):
            self.path = path
            path.parent.mkdir(parents=True, exist_ok=True)

        def __enter__(self):
            return self.path

        def __exit__(self, *_):
            return None

    for step in (1, 2):
        checkpoints.save_checkpoint(tmp_path / "c", faults.example(step))
    monkeypatch.setattr(checkpoints, "written_whole", InPlace)
    monkeypatch.setattr(
        checkpoints, "remove", lambda path: shutil.rmtree(path) if path.name < "step_00000002" else None
    )
    total = faults.count_calls(lambda: checkpoints.save_checkpoint(tmp_path / "c", faults.example(3)))
    found = {faults.try_one(tmp_path / "c", call, None, False) for call in range(total)}
    assert found - {"previous", "new"}


@pytest.mark.parametrize("draw", ["sample order", "stochastic depth"])
def test_with_one_draw_that_has_a_state_two_runs_differ(draw, tmp_path, monkeypatch):
    def run(name):
        mixlab.train(
            "digits", "digits", run=tmp_path / name, screen=Screen(quiet=True), steps=8, epochs=None, threads=1,
            keep_weights="last", model__stochastic_depth=0.5, batch_size=32,
        )  # fmt: skip
        return load_file(tmp_path / name / "weights.safetensors")

    def same(one, other):
        return all(torch.equal(tensor, other[name]) for name, tensor in one.items())

    first = run("first")
    assert same(first, run("again"))
    stateful = np.random.default_rng()
    if draw == "sample order":
        monkeypatch.setattr(
            order, "_cached_order", lambda seed, epoch, number, *_: stateful.permutation(number)
        )
    else:
        monkeypatch.setattr(step_module, "torch_seed", lambda *_: int(stateful.integers(2**62)))
    assert not same(first, run("other"))


def test_the_numbers_of_the_faults_are_those_of_this_system():
    assert [os.strerror(number) for number in NUMBERS] == [
        "No space left on device", "Input/output error", "Operation not permitted",
    ]  # fmt: skip
