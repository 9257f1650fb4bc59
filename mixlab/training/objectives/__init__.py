"""What training minimises: the targets of a batch, and the loss of logits and targets."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from mixlab.language import Sentence

if TYPE_CHECKING:  # the programs that only compute losses need no loader
    from mixlab.data.loader import Batch
    from mixlab.training.prepared import Prepared
    from mixlab.training.recipe import Recipe
    from mixlab.training.session import Session


class Objective(Protocol):
    """A loss and what it compares with.

    num_views: the draws of an image, taken in turn by the epochs; 0 draws anew in every epoch.
    notes: sentences for the report. facts: for the provenance of the weights. cards: headings and values at the top
    of the report.
    """

    @property
    def loss(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The mean loss of the logits (B, K) and targets of some images.

        A value that has a name, so that a program beside this one finds it (`worker.describe`).
        """
        ...

    @property
    def num_views(self) -> int: ...
    @property
    def notes(self) -> list[Sentence]: ...
    @property
    def facts(self) -> dict[str, Any]: ...
    @property
    def cards(self) -> list[tuple[str, str]]: ...

    def targets(self, batch: "Batch", device: torch.device) -> Tensor:
        """float (B, K) or (B, N, K), on `device`: for each image what it is, and N - 1 more rows for the loss.

        Where images are mixed with each other, so are their targets.
        """
        ...

    def keep(self, run: Path) -> None:
        """Write into the run what one that is resumed needs of it. DiskError if that fails."""


class Preparation(Protocol):
    """What comes before an objective: `begin` of the module that `choose.objective_module` finds gives it.

    looks_at_views: at the drawn images, so that their augmentation must be decided before it is done.
    """

    @property
    def looks_at_views(self) -> bool: ...

    def prepare(
        self, recipe: "Recipe", data: "Prepared", session: "Session", end: float | None = None
    ) -> Objective:
        """The objective of a recipe. end: when it must be there, on time.monotonic()."""
        ...
