"""`--batch-size auto`: the largest power of two of images a step that fits into memory, found by trying."""

import copy
from dataclasses import replace
from typing import Any

import torch

from mixlab.data.augment import LONG, settled
from mixlab.data.loader import TrainingPictures, training_batches
from mixlab.device import memory_bytes, peak_memory_bytes
from mixlab.errors import TrainingError, UsageError
from mixlab.report.screen import Screen
from mixlab.training.distributed import World
from mixlab.training.failures import explain_out_of_memory
from mixlab.training.prepared import Prepared
from mixlab.training.recipe import Recipe
from mixlab.training.small_sets import check_parts, needs_two
from mixlab.training.step import TrainState, train_step

MEMORY_SHARE = 0.8  # of the memory: the rest is for evaluation, snapshots of a save, and others
STEPS = 2  # of training at each size: the optimizer's state appears in the first


def find_batch_size(
    prepared: Prepared, model: torch.nn.Module, device: torch.device, world: World, screen: Screen
) -> Recipe:
    """The recipe with the batch size set: doubled until the next would not fit, or there are no more images.

    On a GPU it is tried until memory runs out; on a CPU, where that would end the process, the next size's need is
    told from the growth so far. Every process takes an equal part, as large as the one with least memory can.
    """
    recipe, count = prepared.recipe, len(prepared.train)
    if recipe.parallel == "fsdp" and world.size > 1:
        raise UsageError("the batch size cannot be tried with fsdp", where="batch_size", hint="give a number")
    limit = max(count // world.size // recipe.accumulate, 1)
    assert recipe.data.image_size is not None
    # Images a process.
    size, fits = 1 + needs_two(model, recipe.data.image_size, recipe.data.channels or 3), 0
    if size > limit:
        check_parts(replace(recipe, batch_size=recipe.accumulate * world.size), model, count, world.size)
    before = _used(device)
    while size <= limit:
        world.now(f"trying a batch of {size * world.size}")
        need = _try(_for_trial(recipe, size), prepared, model, device)
        # All ranks go on or stop together; a negative maximum is a minimum.
        if -world.largest([-(need is not None)])[0] != 1:
            break
        assert need is not None
        # Linear in the size, from the last two; after the first one there is only the second to try.
        following = need + (2 * (need - before) if fits else 0)
        before, fits = need, size
        if world.largest([following > MEMORY_SHARE * _memory(device, world)])[0]:
            break
        size *= 2
    if not fits:
        raise TrainingError(
            f"memory ran out with {'one image' if size == 1 else 'two images'} a process",
            where="batch_size",
            hint="take a smaller model or image size",
        )
    batch_size = fits * world.size * recipe.accumulate
    unit = max(recipe.virtual_shards, 1) * recipe.accumulate
    batch_size = max(batch_size // unit, 1) * unit  # so that it can be shared out
    screen.say(
        f"batch size {batch_size}: the largest tried that fits in memory; the learning rate is as it was"
    )
    return replace(recipe, batch_size=batch_size)


def _for_trial(recipe: Recipe, size: int) -> Recipe:
    return replace(
        recipe,
        batch_size=size * recipe.accumulate,
        steps=1_000_000,
        compile=False,
        virtual_shards=0,
        parallel="ddp",
    )


def _try(recipe: Recipe, prepared: Prepared, model: torch.nn.Module, device: torch.device) -> int | None:
    """Peak memory in bytes of a few steps on a copy, by this process alone; None if memory ran out."""
    pictures = TrainingPictures(
        images=prepared.train,
        augment=settled(recipe.augment, LONG),
        batch_size=recipe.batch_size,
        seed=recipe.seed,
    )
    trial: Any = None
    try:
        trial = TrainState(
            copy.deepcopy(model),
            recipe,
            prepared.train.split.labels,
            len(prepared.source.class_names),
            device,
        )
        for step, batch in enumerate(
            training_batches(pictures, first_step=0, num_steps=STEPS, num_workers=0, on_bad=lambda file: None)
        ):
            train_step(trial, batch, step)
        return _used(device)
    except (MemoryError, RuntimeError) as error:
        if explain_out_of_memory(error, recipe, device) is None:
            raise
        return None
    finally:
        del trial
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _used(device: torch.device) -> int:
    """Most memory that this process has held so far, in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_reserved(device))
    return peak_memory_bytes()


def _memory(device: torch.device, world: World) -> float:
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return memory_bytes() / world.local_size
