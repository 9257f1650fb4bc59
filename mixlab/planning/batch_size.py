"""`--batch-size auto`: the largest power of two of images a step that fits into memory, found by trying."""

import copy
from dataclasses import replace

import torch

from mixlab.device import memory_bytes, peak_memory_bytes
from mixlab.errors import TrainingError, UsageError, is_out_of_memory
from mixlab.planning.draft import UNKNOWN_STEPS, Draft
from mixlab.training.build import new_model
from mixlab.training.choose import needs_all_ranks
from mixlab.training.clock import Clock
from mixlab.training.distributed import World
from mixlab.training.failures import OutOfMemoryError
from mixlab.training.fit import Course, batches, fit
from mixlab.training.recipe import Recipe
from mixlab.training.small_sets import check_parts, needs_two
from mixlab.training.step import StepResult, TrainState

MEMORY_SHARE = 0.8  # of the memory: the rest is for evaluation, snapshots of a save, and others
STEPS = 2  # of training at each size: the optimizer's state appears in the first


class Memory:
    """The memory that a training takes."""

    def used(self, device: torch.device) -> int:
        """Most of it that this process has held so far, in bytes."""
        if device.type == "cuda":
            return int(torch.cuda.max_memory_reserved(device))
        return peak_memory_bytes()

    def total(self, device: torch.device, world: World) -> float:
        """What there is for this process, in bytes."""
        if device.type == "cuda":
            return float(torch.cuda.get_device_properties(device).total_memory)
        return memory_bytes() / world.local_size


MEMORY = Memory()


def decide_batch_size(draft: Draft, memory: Memory = MEMORY) -> Draft:
    """The draft with a batch size, where its recipe leaves it open.

    Doubled until the next would not fit, or there are no more images. On a GPU it is tried until memory runs out; on
    a CPU, where that would end the process, the next size's need is told from the growth so far. Every process takes
    an equal part, as large as the one with least memory can.
    """
    recipe, count, session = draft.recipe, len(draft.data.train), draft.session
    if recipe.batch_size:
        return draft
    world, device, preprocess = session.world, session.device, draft.data.preprocess
    if needs_all_ranks(recipe, world):
        raise UsageError(
            f"the batch size cannot be tried with {recipe.parallel}", where="batch_size", hint="give a number"
        )
    plan = draft.plan(UNKNOWN_STEPS)
    model = new_model(plan, session.silent())
    limit = max(count // world.size // recipe.accumulate, 1)
    # Images a process.
    size, fits = 1 + needs_two(model, preprocess.input_size, preprocess.channels), 0
    if size > limit:
        check_parts(replace(recipe, batch_size=recipe.accumulate * world.size), model, count, world.size)
    before = memory.used(device)
    while size <= limit:
        world.now(f"trying a batch of {size * world.size}")
        need = _try(draft, _for_trial(recipe, size), model, memory)
        # All ranks go on or stop together; a negative maximum is a minimum.
        if -world.all_reduce_max([-(need is not None)])[0] != 1 or need is None:
            break
        # Linear in the size, from the last two; after the first one there is only the second to try.
        following = need + (2 * (need - before) if fits else 0)
        before, fits = need, size
        if world.all_reduce_max([following > MEMORY_SHARE * memory.total(device, world)])[0]:
            break
        size *= 2
    if not fits:
        raise TrainingError(
            f"memory ran out with {'one image' if size == 1 else 'two images'} a process",
            where="batch_size",
            hint="take a smaller model or image size",
        )
    batch_size = fits * world.size * recipe.accumulate
    unit = recipe.num_parts(1) * recipe.accumulate
    batch_size = max(batch_size // unit, 1) * unit  # so that it can be shared out
    session.screen.say(
        f"batch size {batch_size}: the largest tried that fits in memory; the learning rate is as it was"
    )
    return replace(draft, recipe=replace(recipe, batch_size=batch_size))


def _for_trial(recipe: Recipe, size: int) -> Recipe:
    return replace(
        recipe.for_one_process(),
        batch_size=size * recipe.accumulate,
        compile=False,
    )


class _FewSteps(Course):
    """Ends a fit after STEPS."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def after_step(self, result: StepResult | None) -> bool:
        return self._clock.step >= STEPS


def _try(draft: Draft, recipe: Recipe, model: torch.nn.Module, memory: Memory) -> int | None:
    """Peak memory in bytes of a few steps on a copy, by this process alone; None if memory ran out."""
    plan, device = draft.plan(UNKNOWN_STEPS, recipe), draft.session.device
    clock = Clock(UNKNOWN_STEPS)
    course = _FewSteps(clock)
    try:
        state = TrainState(copy.deepcopy(model), recipe, plan.objective, device)
        fit(
            state,
            batches(plan, state, clock, course, augment=plan.longest_augment, num_workers=0),
            clock,
            course,
        )
        return memory.used(device)
    except (MemoryError, OutOfMemoryError):
        return None
    except RuntimeError as error:  # of the copy itself
        if is_out_of_memory(error):
            return None
        raise
    finally:
        state = None  # type: ignore[assignment]  # frees it before the card gives its memory back
        if device.type == "cuda":
            torch.cuda.empty_cache()
