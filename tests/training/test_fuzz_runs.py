"""A little of benchmarks/fuzz_runs.py on every run, and proof that it finds what it is for."""

import pytest
import torch

from benchmarks import fuzz_runs
from mixlab.training import history

NUM_CASES = 30


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.set_num_threads(1)
    base = tmp_path_factory.mktemp("base")
    fuzz_runs.make_run(base)
    return base


def cases(base, place, numbers):
    with fuzz_runs.unpictured():
        return [fuzz_runs.try_one(7, number, base, place / "case") for number in numbers]


def test_mutated_run_folders_are_read_or_refused_and_nothing_is_lost(base, tmp_path):
    found = cases(base, tmp_path, range(1, NUM_CASES + 1))
    assert [case for case in found if case["findings"]] == []
    outcomes = {
        name: {case["outcomes"][name] for case in found} for name in ("card", "predict", "evaluate", "resume")
    }
    assert all(seen == {"ok", "refused"} for seen in outcomes.values()), outcomes


def test_without_the_look_at_links_and_checkpoints_the_fuzzer_finds_losses(base, tmp_path, monkeypatch):
    monkeypatch.setattr("mixlab.planning.train.check_links", lambda run: None)
    monkeypatch.setattr("mixlab.planning.train.check_resumable", lambda run, start_over: False)
    assert history.check_links is not None
    with fuzz_runs.unpictured():
        tried = (fuzz_runs.try_one(7, number, base, tmp_path / "case") for number in range(1, 10 * NUM_CASES))
        assert any("lost" in case["findings"] for case in tried)  # ends with the first
