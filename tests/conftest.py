"""With how many threads a test runs, and what a training in the tests leaves out."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mixlab.device import num_cores

# Those that train, resume and run commands have every core, as people do; two tests run at a time.
EVERY_CORE = ("training", "recipes", "studies", "test_cli", "test_docs", "test_environment")


@pytest.fixture(autouse=True, scope="module")
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    place = request.path.relative_to(Path(__file__).parent).parts[0]
    with pytest.MonkeyPatch.context() as patch:
        if place.startswith(EVERY_CORE):
            patch.delenv("OMP_NUM_THREADS", raising=False)
            torch.set_num_threads(num_cores())
        else:
            patch.setenv("OMP_NUM_THREADS", "1")  # for processes that a test starts
            torch.set_num_threads(1)
        yield


@pytest.fixture(autouse=True)
def _drawing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures take most of the time of a training of a few steps: only tests marked `figures` have them drawn."""
    if request.node.get_closest_marker("figures") is None:
        monkeypatch.setattr("mixlab.training.outcome._draw", lambda *arguments: [])
