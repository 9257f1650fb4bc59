"""The parts of a training before its first step: a model drawn or loaded, its optimizer."""

from torch import nn

from mixlab.data.random import torch_seed
from mixlab.device import return_memory
from mixlab.models.catalog import config_of, create_model
from mixlab.models.recompute import checkpoint_blocks
from mixlab.threads import seeded
from mixlab.training.initial import load_initial
from mixlab.training.optimizer import freeze_layers
from mixlab.training.plan import Plan
from mixlab.training.session import Session
from mixlab.training.step import TrainState
from mixlab.training.whitening import whiten_stem


def build(plan: Plan, session: Session) -> TrainState:
    """Model and optimizer before the first step, the same for every rank and every time."""
    recipe, data = plan.recipe, plan.data
    model = new_model(plan, session)
    if recipe.whiten_stem and plan.initial is None and config_of(model) is not None:
        whiten_stem(model, data.train)
    return TrainState(model, recipe, plan.objective, session.device, session.world)


def new_model(plan: Plan, session: Session) -> nn.Module:
    """A model drawn by the recipe's seed, or with the weights in it that the plan starts from."""
    recipe = plan.recipe
    with seeded(torch_seed(recipe.seed, 0, 2**31)):  # a shard number that no step uses
        model = create_model(**plan.model_settings)
    if plan.initial is not None:
        session.screen.say(load_initial(model, plan.initial, recipe, plan.class_names))
    freeze_layers(model, recipe.freeze)
    if recipe.checkpoint_blocks:
        checkpoint_blocks(model)
        return_memory()  # what this saves would be lost otherwise, in pieces of other sizes
    return model
