"""What every process of the tests begins with, and what a training in them leaves out."""

import pytest
import torch

# torch starts the threads of its backward passes in the first one, for all devices that it then knows of. An ONNX
# export makes one known that needs threads, and a process that has them cannot be forked into ranks any more.
torch.ones((), requires_grad=True).backward()


@pytest.fixture(autouse=True)
def _drawing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures take most of the time of a training of a few steps: only tests marked `figures` have them drawn."""
    if request.node.get_closest_marker("figures") is None:
        monkeypatch.setattr("mixlab.training.outcome._draw", lambda *arguments: [])
