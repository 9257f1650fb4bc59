"""With how many threads a test runs."""

import os
from collections.abc import Iterator
from pathlib import Path

# Before torch begins. Two tests run at a time, each with every core: a thread of OpenMP that waits for another one
# sleeps, instead of keeping a core busy that the other test has work for.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

# Those that train, resume and run commands have every core for them, as people do; two tests run at a time.
EVERY_CORE = ("training", "recipes", "studies", "test_cli", "test_docs", "test_environment")


@pytest.fixture(autouse=True, scope="module")
def _threads_of_processes(request: pytest.FixtureRequest) -> Iterator[None]:
    place = request.path.relative_to(Path(__file__).parent).parts[0]
    with pytest.MonkeyPatch.context() as patch:
        if place.startswith(EVERY_CORE):
            patch.delenv("OMP_NUM_THREADS", raising=False)
        else:
            patch.setenv("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)
        yield


@pytest.fixture(autouse=True)
def _threads() -> None:
    """What a test computes by itself; a training takes as many threads as its recipe says."""
    torch.set_num_threads(1)
