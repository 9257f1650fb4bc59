"""`--budget` chooses the size of a pyramid: by what each size reached on CIFAR-10, and this machine's speed."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from mixlab.errors import UsageError
from mixlab.models.catalog import DIMENSIONS, OPEN_SIZES, name_with_patch
from mixlab.planning.budget import for_measuring, measure_steps
from mixlab.planning.draft import UNKNOWN_STEPS, Draft
from mixlab.training.build import build
from mixlab.training.plan import Plan
from mixlab.training.recipe import Recipe
from mixlab.training.step import TrainState

MEASURE_SHARE, MEASURE_SECONDS = 0.004, 5.0  # of the budget, and at most, for each size measured
USABLE_SHARE = 0.95  # of what is left of the budget: the rest goes into evaluation and report
MUCH_WORSE = 1.1  # times the least error so far: larger models than one that bad are not measured
IMAGES = 45_000  # that an epoch of the runs below had
Measure = Callable[[Plan, TrainState, float, float], float]


@dataclass(frozen=True, kw_only=True)
class SizeCurve:
    """A size, patches `coarse` times as large as usual, and what whole runs of it gave.

    runs: (epochs, share of wrong answers on validation), the shortest first.
    """

    model: str
    coarse: int
    runs: tuple[tuple[float, float], ...]

    def error(self, num_images: float) -> float:
        """The share of wrong answers on CIFAR-10 to expect from a run that sees so many images.

        Straight lines through the runs on log-log paper, the first extended to shorter runs; a longer run than all
        counts as the longest.
        """
        epochs, errors = np.log(np.array(self.runs)).T
        wanted = np.log(num_images / IMAGES)
        if wanted < epochs[0]:
            slope = (errors[1] - errors[0]) / (epochs[1] - epochs[0])
            return float(np.exp(errors[0] + slope * (wanted - epochs[0])))
        return float(np.exp(np.interp(wanted, epochs, errors)))


# From the smallest to the largest. Runs of `small_images` on CIFAR-10, validation accuracy (LOG.md, 2026-11-28 and
# 29): one seed each, of Micro/2's second and third three, and its second and fourth were 3 and 7 epochs of 40,000
# images; Mini's longest is of the recipe before, with cosine decay and a stem that was not whitened. Which curve is
# best matters here, not how hard the person's own images are.
SIZE_CURVES = (
    SizeCurve(model="mixer_pyramid_micro", coarse=2, runs=((1, 0.397), (3, 0.301), (10, 0.196))),
    SizeCurve(
        model="mixer_pyramid_micro", coarse=1, runs=((1, 0.349), (2.7, 0.236), (4.7, 0.197), (6.2, 0.182))
    ),
    SizeCurve(model="mixer_pyramid_mini", coarse=1, runs=((3, 0.214), (7.3, 0.149), (29.4, 0.115))),
    SizeCurve(model="mixer_pyramid_nano", coarse=1, runs=((3, 0.190), (5, 0.154), (19, 0.111))),
)


def is_size_open(recipe: Recipe) -> bool:
    """Whether a recipe, before it is resolved, leaves the size of its model to a budget."""
    model = recipe.model
    given = (model.patch_size, model.stage_blocks, *(getattr(model, name) for name in DIMENSIONS))
    return model.name in OPEN_SIZES and all(value is None for value in given)


def decide_model_size(draft: Draft, measure: Measure = measure_steps) -> Draft:
    """The draft with the curve whose error should be the least at the end of its budget, if it may choose.

    Sizes are measured from the smallest on, until one would do clearly worse than the best so far. measure: as
    `measure_steps`, seconds of a step.
    """
    end = draft.end
    if end is None or not draft.may_choose_size:
        return draft
    began = time.monotonic()
    best: tuple[float, Draft] | None = None
    for curve in SIZE_CURVES:
        candidate = replace(draft, recipe=_on_curve(draft, curve))
        plan = candidate.plan(UNKNOWN_STEPS, for_measuring(candidate.recipe))
        try:
            trial = build(plan, draft.session.silent())
        except UsageError:  # such patches do not divide these images
            continue
        seconds = measure(plan, trial, min(MEASURE_SHARE * (end - began), MEASURE_SECONDS), end)
        # At least one, where the budget is over already: `decide_steps` says so.
        steps = max(USABLE_SHARE * (end - time.monotonic()) / seconds, 1.0)
        # What rank 0 found, on all ranks.
        error = draft.session.world.run_on_main(partial(curve.error, steps * plan.recipe.batch_size))
        if best is not None and error > MUCH_WORSE * best[0]:
            break
        if best is None or error < best[0]:
            best = (error, candidate)
    return draft if best is None else best[1]


def _on_curve(draft: Draft, curve: SizeCurve) -> Recipe:
    name = name_with_patch(curve.model, draft.data.preprocess.input_size)
    patch_size = curve.coarse * int(name.removeprefix(curve.model))
    model = replace(draft.recipe.model, name=f"{curve.model}{patch_size}")
    return replace(draft.recipe, model=model)
