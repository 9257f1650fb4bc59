"""The parts of a training before its first step: pictures read, a model drawn or loaded, its optimizer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mixlab.checkpoint.store import Weights
from mixlab.data.random import torch_seed
from mixlab.device import return_memory
from mixlab.models.catalog import create_model
from mixlab.models.mixer import Mixer
from mixlab.models.recompute import checkpoint_blocks
from mixlab.report.screen import Screen
from mixlab.threads import seeded
from mixlab.training.curriculum import first_settings
from mixlab.training.distill import Teaching
from mixlab.training.distributed import World, same_everywhere
from mixlab.training.initial import load_initial
from mixlab.training.optimizer import freeze_layers
from mixlab.training.prepared import Prepared
from mixlab.training.step import TrainState
from mixlab.training.whitening import whiten_stem


def read_pictures(world: World, read: Callable[[], Prepared]) -> Prepared:
    """What `read` gives, and that all ranks have the same training pictures."""
    world.now("reading the data set")
    prepared = read()
    pictures = (len(prepared.train), prepared.train.split.names, prepared.train.split.labels.tolist())
    world.check_same(same_everywhere(pictures), "training images")
    return prepared


def build_state(
    prepared: Prepared,
    device: torch.device,
    initial: Weights | None,
    screen: Screen,
    world: World,
    teaching: Teaching | None,
) -> TrainState:
    """Model and optimizer before the first step, the same for every rank and every time."""
    settings, recipe = prepared.model_settings, prepared.recipe
    model = new_model(prepared, first_settings(settings, recipe), initial, screen)
    if recipe.whiten_stem and initial is None and isinstance(model, Mixer):
        whiten_stem(model, prepared.train)
    num_classes, labels = len(prepared.source.class_names), prepared.train.split.labels
    return TrainState(model, recipe, labels, num_classes, device, world, teaching)


def new_model(
    prepared: Prepared, settings: dict[str, Any], initial: Weights | None, screen: Screen
) -> nn.Module:
    """A model drawn by the recipe's seed, or with `initial` in it."""
    with seeded(torch_seed(prepared.recipe.seed, 0, 2**31)):  # a shard number that no step uses
        model = create_model(**settings)
    if initial is not None:
        screen.say(load_initial(model, initial, prepared.recipe, prepared.source.class_names))
    freeze_layers(model, prepared.recipe.freeze)
    if prepared.recipe.checkpoint_blocks:
        checkpoint_blocks(model)
        return_memory()  # what this saves would be lost otherwise, in pieces of other sizes
    return model
