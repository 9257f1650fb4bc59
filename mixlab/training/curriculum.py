"""Coarse patches first: a share of the steps sees patches several times as large, so fewer tokens, sooner.

The weights are then resampled to the model's own patches (models/resolution.py), and training goes on under the same
schedule, after Anagnostidis et al. 2023 (arXiv 2311.03233), who changed the patches of ViTs. Which patches a step has
follows from its number, so that a resumed run and every process change them at the same step.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from mixlab.errors import UsageError
from mixlab.models.catalog import mixer_config, parse_mixer_name
from mixlab.models.describe import describe_settings
from mixlab.models.mixer import MixerConfig
from mixlab.models.pyramid import PyramidConfig
from mixlab.models.resolution import resample
from mixlab.report.screen import Screen
from mixlab.training.clock import Clock
from mixlab.training.optimizer import freeze_layers
from mixlab.training.recipe import Recipe
from mixlab.training.step import TrainState


def check_curriculum(recipe: Recipe) -> None:
    """UsageError if the recipe begins with coarse patches that its model cannot have; `recipe` is resolved."""
    if not recipe.coarse_share:
        return
    name = str(recipe.model.name)
    if name.startswith("timm/") or type(own := _config(recipe)) not in (MixerConfig, PyramidConfig):
        raise UsageError(
            f"the patches of this {name} cannot be changed: it is neither a plain Mixer nor a pyramid",
            where="coarse_share",
            hint="leave it out",
        )
    try:
        replace(own, patch_size=coarse_patch_size(recipe))
    except UsageError as error:
        raise UsageError(
            f"the first steps cannot have patches of {coarse_patch_size(recipe)} pixels, {recipe.coarse_factor} "
            f"times {own.patch_size}: {error.message}",
            where="coarse_factor",
            hint="choose another image_size or patch_size, or leave coarse_share out",
        ) from error


def _config(recipe: Recipe) -> MixerConfig:
    return mixer_config(recipe.model, num_classes=1, image_size=recipe.data.image_size)


def coarse_patch_size(recipe: Recipe) -> int:
    """Side of the first steps' patches."""
    return recipe.coarse_factor * _config(recipe).patch_size


def num_coarse_steps(recipe: Recipe, num_steps: int) -> int:
    """How many of `num_steps` have coarse patches; never all, so that a run that ends has the model it asked for."""
    return min(round(recipe.coarse_share * num_steps), num_steps - 1)


def is_coarse(model: nn.Module, recipe: Recipe) -> bool:
    """Whether the model still has coarse patches."""
    if not recipe.coarse_share:
        return False
    config: MixerConfig = model.config  # type: ignore[assignment]
    return config.patch_size == coarse_patch_size(recipe)


def first_settings(settings: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """Keyword arguments of `create_model` for the model that a training begins with; `settings`: for its last one."""
    if not recipe.coarse_share:
        return settings
    size, _ = parse_mixer_name(settings["name"])
    kept = {key: value for key, value in settings.items() if key != "patch_size"}
    return kept | {"name": f"mixer_{size}{coarse_patch_size(recipe)}"}


def settings_now(settings: dict[str, Any], model: nn.Module, recipe: Recipe) -> dict[str, Any]:
    """Keyword arguments of `create_model` for `model` as it is now."""
    return first_settings(settings, recipe) if is_coarse(model, recipe) else settings


def refine_when_due(screen: Screen, state: TrainState, clock: Clock) -> None:
    """Refine the model of `state` before the first step that has fine patches; one of `TrainState.changes`."""
    recipe = state.recipe
    if is_coarse(state.model, recipe) and clock.step >= num_coarse_steps(recipe, clock.num_steps):
        state.world.now("changing the patches")
        refine(state)
        screen.say(f"patches {recipe.coarse_factor} times as small after step {clock.step}")


def refine(state: TrainState) -> None:
    """Go on with the model, and its moving average, resampled to the model's own patches.

    Tensors that keep their shape keep what the optimizer knows of them (moments, and Adam's count of steps); the stem
    and all token mixing, whose values are others now, begin with zeros, as in a first step.
    """
    model, ema, optimizer = state.model, state.ema, state.optimizer
    state.take(_refined(model, state.recipe))
    if ema is not None and state.ema is not None:
        state.ema.module = _refined(ema.module, state.recipe)
        state.ema.n_averaged.copy_(ema.n_averaged)
    parameters = (
        [p for group in of.param_groups for p in group["params"]] for of in (optimizer, state.optimizer)
    )
    for old, new in zip(*parameters, strict=True):
        if known := optimizer.state.get(old):
            kept = old.shape == new.shape
            state.optimizer.state[new] = known if kept else {k: _zeros(v, old, new) for k, v in known.items()}


def _refined(model: Any, recipe: Recipe) -> nn.Module:
    refined = resample(model, model.config.image_size, patch_size=_config(recipe).patch_size)
    freeze_layers(refined, recipe.freeze)
    refined.checkpoint_blocks = model.checkpoint_blocks
    return refined


def _zeros(value: torch.Tensor, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """What the optimizer keeps of `new` where it kept `value` of `old`: a moment, or a count of steps."""
    return value.new_zeros(new.shape if value.shape == old.shape else value.shape)


def mean_flops(settings: dict[str, Any], recipe: Recipe, clock: Clock) -> float:
    """Floating-point operations of one image's forward pass, the mean over the steps that were taken."""
    coarse = min(num_coarse_steps(recipe, clock.num_steps), clock.step) / max(clock.step, 1)
    shares = (coarse, first_settings(settings, recipe)), (1 - coarse, settings)
    return sum(share * 2 * describe_settings(of, batch_size=1)["macs"] for share, of in shares)


def describe_curriculum(recipe: Recipe, clock: Clock, kept: Any) -> str:
    """A sentence for the report on a run that ended at `clock` and kept the model `kept`."""
    coarse, own, steps = coarse_patch_size(recipe), _config(recipe).patch_size, clock.step
    change = num_coarse_steps(recipe, clock.num_steps)
    if steps <= change:
        return (
            f"Training ended before patches of {coarse} pixels became patches of {own}, after step {change}."
        )
    text = f"Patches had {coarse} pixels a side up to step {change} of {steps}, and {own} from then on."
    if is_coarse(kept, recipe):
        text += f" The weights that were best on validation are from before: their patches have {coarse}."
    return text
