"""Weights that a training starts from: opened, fitted to the run's grid, patches, channels and classes."""

import os
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mixlab.checkpoint.open import existing_path, open_weights
from mixlab.checkpoint.store import Weights
from mixlab.cpu.describe import describe_settings
from mixlab.data.images.preprocess import ImagePreprocess
from mixlab.data.modality import Modality
from mixlab.errors import UsageError
from mixlab.models.catalog import ModelConfig, config_of, family_of, settings_of
from mixlab.models.mixer import Mixer, MixerConfig
from mixlab.models.resolution import extend, resample
from mixlab.training.recipe import Recipe


def open_initial(recipe: Recipe) -> Weights | None:
    """The weights that `recipe.init_from` names, if any."""
    if recipe.init_from is None:
        if recipe.init_grid != "resample":
            raise UsageError("init_grid says how weights are fitted, and none are named", where="init_from")
        return None
    return open_weights(recipe.init_from, image_size=recipe.data.image_size, resampled=False)


def with_absolute_weights(recipe: Recipe) -> Recipe:
    """The same recipe with paths of weights that hold from any folder; published names stay as they are."""
    return _with_absolute(recipe)


def _with_absolute(config: Any) -> Any:
    changes: dict[str, Any] = {}
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            changes[field.name] = _with_absolute(value)
        elif field.metadata.get("is_weights") and value is not None:
            path = existing_path(os.path.expanduser(value))
            changes[field.name] = value if path is None else os.path.abspath(path)
    return replace(config, **changes)


def fit_initial(recipe: Recipe, weights: Weights, modality: Modality) -> tuple[Recipe, Weights]:
    """The weights fitted to the recipe's images, and the recipe with what it left open as the weights have it.

    Open may be the model, image size, channels, mean and std. UsageError where the recipe asks for another model.
    """
    preprocess = weights.preprocess
    if preprocess.modality is not modality:
        raise UsageError(
            f"these weights take {preprocess.modality.many}, and the data has {modality.many}",
            where=str(recipe.init_from),
        )
    if isinstance(preprocess, ImagePreprocess) and preprocess.permutation is not None:
        raise UsageError(
            "these weights take permuted images, on which a training cannot start",
            where=str(recipe.init_from),
            hint="start from the weights from before `mixlab permute`",
        )
    own_name = weights.model_settings["name"]
    data, part = modality.start_from(recipe.data, recipe.part_of(modality), preprocess)
    recipe = replace(recipe, data=data, **{modality.part: part})
    if config_of(weights.model) is not None:
        fitted = _fitted(weights.model, recipe)
        weights, settings = replace(weights, model=fitted), settings_of(fitted.config)
        model = ModelConfig(**{k: v for k, v in settings.items() if k in ModelConfig.__dataclass_fields__})
    else:
        model = ModelConfig(name=weights.model_settings["name"])
    wanted, default = recipe.model, ModelConfig()
    if wanted.name not in (None, model.name, own_name):
        raise UsageError(
            f"the weights are of {own_name}, the recipe's model is {wanted.name}",
            where="model.name",
            hint="leave the model out: it follows from --init-from",
        )
    # Of the recipe's own model settings only those hold that are no property of the weights.
    kept = ("stochastic_depth", "head_bias")
    for key in ModelConfig.__dataclass_fields__:
        value = getattr(wanted, key)
        free = key in (*kept, "name", "patch_size", "branch_init_scale", "gelu", "layer_norm_eps")
        if not free and value != getattr(default, key) and value != getattr(model, key):
            raise UsageError(
                f"{key} {value} does not fit the weights", where=f"model.{key}", hint="leave it out"
            )
    numerics = {k: getattr(wanted, k) for k in ("gelu", "layer_norm_eps") if getattr(wanted, k) is not None}
    model = replace(model, **{key: getattr(wanted, key) for key in kept}, **numerics)
    return replace(recipe, model=model), weights


def load_initial(model: nn.Module, weights: Weights, recipe: Recipe, class_names: tuple[str, ...]) -> str:
    """Copy fitted weights into `model`; the head only if the classes are the same. A sentence that says what."""
    keeps_head = class_names == weights.class_names
    given, own = weights.model.state_dict(), model.state_dict()
    head = family_of(model).classifier(model)
    for name, tensor in given.items():
        if not keeps_head and name.startswith(head):
            continue
        if name not in own or own[name].shape != tensor.shape:
            needed = f"needs {tuple(own[name].shape)}" if name in own else "has none"
            size = weights.preprocess.input_size
            raise UsageError(
                f"{name} of the weights has shape {tuple(tensor.shape)}, this model {needed}",
                where=str(recipe.init_from),
                hint=f"they are of {weights.model_settings['name']} for inputs of {size[0]}x{size[1]}, and only "
                "a Mixer can be resampled",
            )
        own[name].copy_(tensor)
    kept = "its head too" if keeps_head else f"with a new head for {len(class_names)} classes"
    text = f"started from {recipe.init_from} ({weights.provenance.get('format', 'mixlab')}), {kept}"
    return text if recipe.init_grid == "resample" else f"{text}; {_grid_costs(model, recipe, weights)}"


def _grid_costs(model: Any, recipe: Recipe, weights: Weights) -> str:
    """What one image costs with the extended token mixing stored whole and as blocks: they differ by the zeros."""
    config: MixerConfig = model.config
    assert recipe.data.image_size is not None
    copies = (recipe.data.image_size[0] // weights.preprocess.input_size[0]) ** 2
    own = describe_settings(settings_of(config), batch_size=1)["macs"]
    hidden = config.token_mlp_dim // (copies if recipe.init_grid == "dense" else 1)
    zeros = config.num_blocks * config.hidden_dim * 2 * config.num_patches * hidden * (copies - 1)
    dense, blocks = (own, own - zeros) if recipe.init_grid == "dense" else (own + zeros, own)
    return f"an image costs {dense / 1e9:.3g} GMACs as a dense matrix, {blocks / 1e9:.3g} as blocks"


def _fitted(model: Any, recipe: Recipe) -> Mixer:
    """The same weights for the recipe's channels, patch side and image size."""
    data = recipe.data
    assert data.image_size is not None
    assert data.channels is not None
    if model.config.in_channels != data.channels:
        model = _with_channels(model, data.channels)
    patch_size = recipe.model.patch_size or model.config.patch_size
    if recipe.init_grid == "resample":
        if (data.image_size, patch_size) == (model.config.image_size, model.config.patch_size):
            return model  # of any kind of token mixing
        return resample(model, data.image_size, patch_size=patch_size)
    height, width = model.config.image_size
    factor = data.image_size[0] // height
    if patch_size != model.config.patch_size or data.image_size != (height * factor, width * factor):
        raise UsageError(
            f"init_grid {recipe.init_grid} needs a whole multiple of {height}x{width} and patches of "
            f"{model.config.patch_size}, got {data.image_size[0]}x{data.image_size[1]} and {patch_size}",
            where="init_grid",
            hint="init_grid resample takes any size",
        )
    return extend(model, factor, sparse=recipe.init_grid == "blocks")


def _with_channels(model: Mixer, channels: int) -> Mixer:
    """A stem for grey images from one for colour (the sum over the three equal channels), or the other way."""
    config: MixerConfig = replace(model.config, in_channels=channels)
    with torch.device("meta"):
        changed = type(model)(config)
    state: dict[str, Any] = model.state_dict()
    kernel: Tensor = state["stem.weight"]
    state["stem.weight"] = kernel.sum(dim=1, keepdim=True).expand(-1, channels, -1, -1) / channels
    changed.load_state_dict(state, assign=True)
    return changed
