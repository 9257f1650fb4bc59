"""What a training will be, once everything is decided: below what decides it and what does it."""

import math
from dataclasses import dataclass
from typing import Any

from mixlab.checkpoint.store import Weights
from mixlab.data.modality import Modality, Preprocess
from mixlab.training.objectives import Objective
from mixlab.training.prepared import Prepared
from mixlab.training.recipe import Recipe
from mixlab.training.setup import model_settings


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A training without an open question. What is None here is truly absent.

    recipe: with every key set that was left open. data: what was read. num_steps: as planned. deadline: on
    time.monotonic(), by which it must end, its number of steps following the machine's speed. initial: weights that
    it starts from. objective: what it minimises. tried: which learning rates were tried before, and what they gave.
    """

    recipe: Recipe
    data: Prepared
    objective: Objective
    num_steps: int
    deadline: float | None = None
    initial: Weights | None = None
    tried: dict[str, Any] | None = None

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.data.source.class_names

    @property
    def preprocess(self) -> Preprocess:
        """How examples become the model's input; it has their size and channels."""
        return self.data.preprocess

    @property
    def modality(self) -> Modality:
        """What kind of example is trained on."""
        return self.data.source.modality

    @property
    def augment(self) -> Any:
        """How examples are changed in training: the modality's part of the recipe."""
        return self.recipe.part_of(self.modality)

    @property
    def longest_augment(self) -> Any:
        """The same for a training without end: as expensive as it can become, where nobody knows the length yet."""
        return self.modality.settled(self.augment, math.inf)

    @property
    def num_workers(self) -> int:
        """Processes that read examples."""
        return self.recipe.data.num_workers or 0

    @property
    def model_settings(self) -> dict[str, Any]:
        """Keyword arguments of `create_model` for the model that it ends with."""
        return model_settings(self.recipe, len(self.class_names))
