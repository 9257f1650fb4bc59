"""Who computes loss and gradient of one part of a batch, here: torch, or mixlab's own passes on a CPU."""

from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

from mixlab.language import Sentence


class Engine(Protocol):
    """What computes a part of a batch."""

    def stepping(self) -> AbstractContextManager[object]:
        """Around a whole step, for how the cores of this process share its work."""
        ...

    def backward(self, image: Tensor, target: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
        """Add the gradient of `share` times the mean loss of these images to the parameters' own.

        image (B, channels, H, W), target as the objective has it -> that product, and the number of correct answers.
        seed: of stochastic depth and dropout.
        """
        ...

    def wait(self, seconds: float) -> None:
        """Until it computes as fast as it will, at most so long: before something is measured."""

    def problem(self) -> Sentence | None:
        """Why it is slower than it could be, if it is."""
        ...

    def close(self) -> None:
        """Give back what it holds; the next call takes it again."""
