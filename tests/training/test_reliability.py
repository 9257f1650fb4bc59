"""A small share of benchmarks/reliability/ on every run."""

import os

import pytest
import torch

from benchmarks.reliability import damage, faults, kills, power, ranks
from mixlab.checkpoint import checkpoints

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


def test_the_numbers_of_the_faults_are_those_of_this_system():
    assert [os.strerror(number) for number in NUMBERS] == [
        "No space left on device", "Input/output error", "Operation not permitted",
    ]  # fmt: skip
