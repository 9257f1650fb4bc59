"""Before the first step: open the data, read it, and fill in what the recipe left open."""

import os
from dataclasses import fields, replace
from math import prod
from typing import Any

import numpy as np
import torch

from mixlab.data.dataset import Source, Split
from mixlab.data.modality import SETS, Modality, Needs, Preprocess
from mixlab.data.sources import open_source
from mixlab.device import is_bf16_faster, memory_bytes, num_cores
from mixlab.errors import UsageError
from mixlab.models.catalog import (
    MODELS,
    OPEN_SIZES,
    PYRAMID,
    ModelConfig,
    create_model,
    name_with_patch,
    parse_mixer_name,
)
from mixlab.models.recompute import checkpoint_blocks
from mixlab.training.recipe import Recipe
from mixlab.training.small_sets import check_parts

MEMORY_SHARE = 0.25  # of the machine's memory, that the examples of one run may take


def model_settings(recipe: Recipe, num_classes: int) -> dict[str, Any]:
    """Keyword arguments of `create_model`: the recipe's, without what was left to the name."""
    model = recipe.model
    settings = {
        "name": model.name,
        "num_classes": num_classes,
        "image_size": recipe.data.image_size,
        "in_channels": recipe.data.channels,
    }
    # timm models share recipes with ours: what only a Mixer has is left out for them.
    mixer_only = ("head_bias", "branch_init_scale", "gelu", "layer_norm_eps")
    for field in fields(ModelConfig):
        value = getattr(model, field.name)
        if field.name in mixer_only and str(model.name).startswith("timm/"):
            continue
        if field.name != "name" and value != getattr(ModelConfig(), field.name):
            settings[field.name] = value
    return settings


def open_data(recipe: Recipe, *, download: bool = False) -> Source:
    """The recipe's data set."""
    data = recipe.data
    return open_source(data.source, data_dir=data.data_dir, download=download, streaming=data.streaming)


def resolve(
    recipe: Recipe,
    train: Split,
    modality: Modality,
    num_processes: int = 1,
    num_images: int | None = None,
) -> Recipe:
    """Fill in what `recipe` leaves to the data: image size, channels, model, patch, memory, threads.

    modality: of the examples in `train`. num_processes: of this training on this machine; they share its cores.
    num_images: of all splits, those of train by default.
    """
    data, model = recipe.data, recipe.model
    if model.name in OPEN_SIZES:
        model = replace(model, name=OPEN_SIZES[model.name])
    recipe.check_parts(modality)
    data, part = modality.resolve(data, recipe.part_of(modality), train, _needs(model.name))
    recipe = replace(recipe, **{modality.part: part})
    name = model.name or ("mixer_pico" if max(data.image_size) <= 16 else "mixer_micro")
    name = name_with_patch(name, data.image_size, model.patch_size)
    model = replace(model, name=name)
    if data.permutation != "none" and data.permutation_patch_size is None:
        side = _patch_side(name, model.patch_size, data.permutation)
        data = replace(data, permutation_patch_size=side)
    if train.encoded is not None and train.encoded.window:
        data = replace(data, in_memory=False, num_workers=0)  # each worker would read the whole stream
    if data.in_memory is None:
        preprocess = build_preprocess(replace(recipe, data=data), modality)
        data = replace(data, in_memory=fits_in_memory(num_processes * (num_images or len(train)), preprocess))
    cores = max(num_cores() // num_processes, 1)
    if data.num_workers is None:
        data = replace(data, num_workers=cores)
    threads = recipe.threads or (1 if recipe.is_exact else cores)
    return replace(recipe, data=data, model=model, threads=threads)


def pick_precision(recipe: Recipe, device: torch.device, num_processes: int) -> Recipe:
    """A resolved recipe whose precision, if it is `auto`, is bf16 where mixlab's own passes compute it fast.

    device: of the training. num_processes: of all of it, on all machines.
    """
    if recipe.precision != "auto":
        return recipe
    is_ours = not str(recipe.model.name).startswith("timm/") and recipe.fast and not recipe.compile
    is_alone = num_processes == 1 and not recipe.is_exact
    is_fast = is_ours and device.type == "cpu" and is_alone and is_bf16_faster()
    return replace(recipe, precision="bf16" if is_fast else "fp32")


def _patch_side(name: str, patch_size: int | None, permutation: str) -> int:
    """The side of a model's patches, which a permutation of patches takes."""
    if permutation == "global":
        return 1  # it has none
    if patch_size is not None:
        return patch_size
    if name.startswith("timm/"):
        raise UsageError(
            f"whose patches shall be permuted is not clear for {name}",
            where="data.permutation_patch_size",
            hint="give the side of the patches in pixels",
        )
    return parse_mixer_name(name)[1]


def for_this_machine(recipe: Recipe, modality: Modality, num_train: int, num_processes: int) -> Recipe:
    """A resolved recipe with what changes no bits fitted to another number of processes on this machine."""
    if num_processes == 1:
        return recipe
    data = recipe.data
    if data.in_memory and not fits_in_memory(num_processes * num_train, build_preprocess(recipe, modality)):
        data = replace(data, in_memory=False)
    workers = min(data.num_workers or 0, max(num_cores() // num_processes, 1))
    return replace(recipe, data=replace(data, num_workers=workers))


def _needs(model_name: str | None) -> Needs:
    """What a model of this name wants of its input."""
    unit = 8 if PYRAMID in (model_name or "") else None
    if model_name in MODELS:
        side = MODELS[model_name][0]
        return Needs(side=side, is_fixed=side >= 64, unit=unit)
    return Needs(side=224 if (model_name or "").startswith("timm/") else None, unit=unit)


def build_preprocess(recipe: Recipe, modality: Modality) -> Preprocess:
    """The preprocessing that a resolved recipe has for examples of a modality."""
    return modality.preprocess(recipe.data, recipe.part_of(modality))


def fits_in_memory(num_images: int, preprocess: Preprocess) -> bool:
    """Whether that many examples at model size take less than MEMORY_SHARE of the machine's memory."""
    return num_images * num_bytes_kept(preprocess) <= MEMORY_SHARE * memory_bytes()


def num_bytes_kept(preprocess: Preprocess) -> int:
    """What an example takes in memory."""
    return prod(preprocess.kept_shape) * np.dtype(preprocess.kept_dtype).itemsize


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """The same recipe with paths that hold from any folder, so that --resume and evaluate find the data."""
    data = recipe.data
    source = os.path.abspath(os.path.expanduser(data.source))
    if os.path.exists(source):
        return replace(recipe, data=replace(data, source=source))
    kind, colon, rest = data.source.partition(":")
    if colon and kind in ("wds", "hf"):
        local = os.path.abspath(os.path.expanduser(rest))
        if kind == "wds" or os.path.exists(local):
            return replace(recipe, data=replace(data, source=f"{kind}:{local}"))
        return recipe
    if data.source in SETS:
        return recipe
    return replace(
        recipe, data=replace(data, data_dir=os.path.abspath(os.path.expanduser(data.data_dir or "data")))
    )


def check_model(recipe: Recipe, num_classes: int, num_train: int, num_processes: int) -> None:
    """UsageError if the recipe's model cannot be built, checkpointed, or trained on as few images as it would get.

    Takes no memory for a Mixer. num_train: training images. num_processes: of all of the training.
    """
    settings = model_settings(recipe, num_classes)
    with torch.device("cpu" if settings["name"].startswith("timm/") else "meta"):
        model = create_model(**settings)
    if recipe.checkpoint_blocks:
        checkpoint_blocks(model)
    check_parts(recipe, model, num_train, num_processes)
