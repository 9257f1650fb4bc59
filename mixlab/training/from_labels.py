"""The objective of labels, made of a recipe and its data: there is nothing to ask and nothing to keep."""

from pathlib import Path

from mixlab.training.losses import LossConfig
from mixlab.training.objectives.labels import Labels
from mixlab.training.prepared import Prepared
from mixlab.training.recipe import Recipe
from mixlab.training.session import Session


class OfLabels:
    """The preparation of labels: there is nothing to do before."""

    looks_at_views = False

    def prepare(self, recipe: Recipe, data: Prepared, session: Session, end: float | None = None) -> Labels:
        return labels_of(recipe.loss, data)


def begin(recipe: Recipe, class_names: tuple[str, ...], num_images: int) -> OfLabels:
    """See `choose.objective_module`."""
    return OfLabels()


def reopen(run: Path, recipe: Recipe, data: Prepared, session: Session) -> Labels:
    """See `choose.objective_module`."""
    return labels_of(recipe.loss, data)


def labels_of(config: LossConfig, data: Prepared) -> Labels:
    """The labels of a data set as an objective."""
    return Labels(config, data.train.split.labels, len(data.source.class_names))
