"""A little of benchmarks/fuzz_runs.py on every run."""

import pytest
import torch

from benchmarks import fuzz_runs

NUM_CASES = 30


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.set_num_threads(1)
    base = tmp_path_factory.mktemp("base")
    fuzz_runs.make_run(base)
    return base


def cases(base, place, numbers):
    return [fuzz_runs.try_one(7, number, base, place / "case") for number in numbers]


def test_mutated_run_folders_are_read_or_refused_and_nothing_is_lost(base, tmp_path):
    found = cases(base, tmp_path, range(1, NUM_CASES + 1))
    assert [case for case in found if case["findings"]] == []
    outcomes = {
        name: {case["outcomes"][name] for case in found} for name in ("card", "predict", "evaluate", "resume")
    }
    assert all(seen == {"ok", "refused"} for seen in outcomes.values()), outcomes
