"""The one loop: when it ends, what it tells its course, and what it makes of a step that fails."""

import contextlib
import gc
import weakref
from dataclasses import replace

import pytest
import torch

from mixlab.data.loader import Batch
from mixlab.errors import TrainingError
from mixlab.models.catalog import create_model
from mixlab.training.clock import Clock
from mixlab.training.failures import NonFiniteError, OutOfMemoryError
from mixlab.training.fit import Course, fit
from mixlab.training.objectives.labels import Labels
from mixlab.training.optimizer import OptimizerConfig
from mixlab.training.recipe import Recipe
from mixlab.training.step import TrainState

RECIPE = Recipe(batch_size=8, optimizer=OptimizerConfig(lr=0.01), fast=False)
LABEL = torch.arange(8) % 4


class Noted(Course):
    """Writes down what it is told, and ends after `last`."""

    def __init__(self, last: int = 1000) -> None:
        self.losses: list[float | None] = []
        self.left_out, self.last = 0, last

    def leaves_out(self, batch, error):
        self.left_out += 1
        return True

    def after_step(self, result):
        self.losses.append(None if result is None else result.loss)
        return len(self.losses) >= self.last


def state_of(recipe: Recipe = RECIPE) -> TrainState:
    torch.manual_seed(0)
    model = create_model("mixer_pico4", num_classes=4, image_size=8)
    return TrainState(model, recipe, Labels(recipe.loss, LABEL.numpy(), 4), torch.device("cpu"))


def batches(count: int, **bad: float):
    draws = torch.Generator().manual_seed(0)
    for number in range(count):
        image = torch.randn(8, 3, 8, 8, generator=draws)
        if str(number) in bad:
            image[0, 0, 0, 0] = bad[str(number)]
        yield Batch(image, LABEL, LABEL.numpy())


def test_it_ends_with_the_batches_the_clock_or_the_course_whichever_is_first():
    for given, num_steps, last, expected in ((3, 9, 9, 3), (9, 4, 9, 4), (9, 9, 5, 5)):
        clock, course = Clock(num_steps), Noted(last)
        fit(state_of(), batches(given), clock, course)
        assert clock.step == len(course.losses) == expected


def test_a_batch_that_is_not_finite_is_the_courses_to_leave_out_and_changes_no_weight():
    course, state, clock = Noted(), state_of(), Clock(4)
    fit(state, batches(4, **{"1": float("nan")}), clock, course)
    assert [loss is None for loss in course.losses] == [False, True, False, False]
    assert (course.left_out, clock.step) == (1, 4)
    assert all(bool(torch.isfinite(p).all()) for p in state.model.parameters())
    with pytest.raises(NonFiniteError, match="the loss became nan at step 0"):
        fit(state_of(), batches(1, **{"0": float("nan")}), Clock(1), Course())


def test_memory_that_runs_out_says_what_to_do():
    def no_memory(*arguments):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    state = state_of(replace(RECIPE, accumulate=2))
    state.engine.forward = no_memory
    with pytest.raises(OutOfMemoryError, match="batch_size 8 in 2 part") as found:
        fit(state, batches(1), Clock(1), Course())
    assert isinstance(found.value, TrainingError)
    assert "--accumulate 4" in str(found.value.hint)
    state.engine.forward = None  # another fault stays what it is
    with pytest.raises(TypeError):
        fit(state, batches(1), Clock(1), Course())


def test_what_a_failed_step_held_is_free_at_once():
    class Activations:
        pass

    kept = []

    def no_memory(*arguments):
        activations = Activations()
        kept.append(weakref.ref(activations))
        raise RuntimeError("out of memory")

    state = state_of()
    state.engine.forward = no_memory
    gc.disable()
    try:
        with contextlib.suppress(OutOfMemoryError):
            fit(state, batches(1), Clock(1), Course())
        assert kept[0]() is None
    finally:
        gc.enable()
