"""What training minimises: the targets of a batch, and the loss of logits and targets."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:  # the programs that only compute losses need no loader
    from mixlab.data.loader import Batch


class Objective(Protocol):
    """A loss and what it compares with."""

    @property
    def loss(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The mean loss of the logits (B, K) and targets of some images.

        A value that has a name, so that a program beside this one finds it (`worker.describe`).
        """
        ...

    def targets(self, batch: "Batch", device: torch.device) -> Tensor:
        """float (B, K) or (B, N, K), on `device`: for each image what it is, and N - 1 more rows for the loss.

        Where images are mixed with each other, so are their targets.
        """
        ...
