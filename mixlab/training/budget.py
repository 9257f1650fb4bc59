"""From a time budget to a number of steps, by measuring this machine's speed on this recipe."""

import copy
import re
import time
from dataclasses import dataclass, replace

from mixlab.data.augment import LONG, settled
from mixlab.data.loader import TrainingPictures, evaluation_batches, training_batches
from mixlab.data.order import steps_per_epoch
from mixlab.errors import UsageError
from mixlab.evaluation.classify import classify
from mixlab.training.curriculum import refine
from mixlab.training.lr_grid import LrGrid
from mixlab.training.prepared import Prepared
from mixlab.training.recipe import Recipe
from mixlab.training.step import TrainState, train_step

REPORT_SECONDS = 12.0  # figures, report and leaving Python, on two cores; measured
MEASURE_SHARE = 0.01  # of the budget, spent measuring; pace.py goes on with it
WAIT_SHARE = 0.1  # of what is left of it, at most, until what is measured computes as it will
SPARE_SHARE = 0.01  # of the budget, kept for a machine that slows down
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_duration(text: str) -> float:
    """`90s`, `10m`, `1.5h`, `2d` or plain seconds, as seconds. UsageError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text.strip().lower())
    if match is None or float(match[1]) == 0:
        raise UsageError(f"{text!r} is no length of time", where="--budget", hint="write 90s, 10m or 1.5h")
    return float(match[1]) * UNITS[match[2] or "s"]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a budget allows: the recipe with its steps set, and when training must stop (monotonic clock)."""

    recipe: Recipe
    deadline: float


def plan_steps(
    prepared: Prepared,
    state: TrainState,
    *,
    budget_seconds: float,
    started: float,
    lr_grid: LrGrid | None = None,
) -> Plan:
    """Steps that fit between now and the end of the budget, evaluation and report included.

    started: time.monotonic() at which the budget began. lr_grid: is tried before.
    UsageError if there is not time for one step.
    """
    recipe, images, world = prepared.recipe, prepared.train, state.world
    if state.is_spread:
        raise UsageError(
            "a budget cannot be measured with fsdp", where="--budget", hint="give --steps or --epochs"
        )
    end = started + budget_seconds
    measure_seconds = max(MEASURE_SHARE * budget_seconds, 0.5)
    # A copy learns, so that what is trained later starts from the same weights whatever was measured.
    num_classes = len(prepared.source.class_names)
    trial = TrainState(
        copy.deepcopy(state.model),
        for_measuring(recipe),
        images.split.labels,
        num_classes,
        state.device,
        world,
        state.teaching,
    )
    begins, seconds_per_step, val_seconds_mean, seconds_per_image = 0.0, 0.0, 0.0, 0.0
    num_val = len(prepared.val) if prepared.val is not None else 0
    phases = (recipe.coarse_share, 1 - recipe.coarse_share) if recipe.coarse_share else (1.0,)
    for number, share in enumerate(phases):
        if number:
            refine(trial)
        plain = min(max(recipe.optimizer.sam_from - begins, 0.0), share)  # a step with one pass takes half
        seconds = step_seconds(prepared, trial, measure_seconds / len(phases), end)
        seconds_per_step += (share - plain / 2) * seconds
        seconds_per_image = _evaluation_speed(prepared, trial) / world.size
        val_seconds_mean += share * num_val * seconds_per_image
        begins += share
    per_epoch = steps_per_epoch(len(images), recipe.batch_size)
    val_seconds = num_val * seconds_per_image  # of the one at the end
    test = prepared.splits.get("test", ())
    reserve = REPORT_SECONDS + len(test) * (seconds_per_image + prepared.seconds_per_read)
    left = end - time.monotonic() - reserve - SPARE_SHARE * budget_seconds
    num_trials, trial_share = (len(lr_grid.lrs), lr_grid.share) if lr_grid is not None else (0, 0.0)
    # One validation at the end, and one after each trial.
    left_to_train = left - (1 + num_trials) * val_seconds
    seconds_per_step *= 1 + num_trials * trial_share
    steps = int(left_to_train / (seconds_per_step + val_seconds_mean / per_epoch))
    steps = world.from_main(lambda: steps)
    if steps < 1:
        raise UsageError(
            f"a budget of {budget_seconds:.0f} s leaves no time to train: reading, evaluation and report need "
            f"about {budget_seconds - left:.0f} s",
            where="--budget",
            hint="give more time, or a smaller model",
        )
    return Plan(
        recipe=replace(recipe, steps=steps, epochs=None, budget_seconds=budget_seconds),
        deadline=end - reserve - val_seconds,
    )


def for_measuring(recipe: Recipe) -> Recipe:
    """The recipe of a trial: without an end, of SAM's the dearest steps, and no picture read before them."""
    optimizer = replace(recipe.optimizer, sam_from=0.0)
    return replace(recipe, steps=1_000_000, compile=False, optimizer=optimizer, whiten_stem=False)


def step_seconds(prepared: Prepared, trial: TrainState, measure_seconds: float, end: float) -> float:
    """Seconds that a step takes, reading included, from steps for about `measure_seconds`, not far beyond `end`."""
    recipe, world = prepared.recipe, trial.world
    pictures = TrainingPictures(
        images=prepared.train,
        augment=settled(recipe.augment, LONG),  # the dearest, as long as nobody knows the length
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        num_shards=trial.num_shards,
        shards=trial.shards,
        views=recipe.distill.num_views,
    )
    times, waited = [time.monotonic()], 0.0
    workers = recipe.data.num_workers or 0
    for step, batch in enumerate(
        training_batches(
            pictures, first_step=0, num_steps=1_000_000, num_workers=workers, on_bad=lambda file: None
        )
    ):
        train_step(trial, batch, step)
        if step == 0 and trial.cores is not None:
            began = time.monotonic()
            # What it will be in a moment is what counts.
            trial.cores.wait(WAIT_SHARE * max(end - began, 0.0))
            waited = time.monotonic() - began
        times.append(time.monotonic() - waited)
        enough = (step >= 4 and times[-1] - times[0] > measure_seconds) or times[-1] + waited > end
        if world.largest([enough])[0]:
            break
    warm = min(3, max(len(times) - 3, 0))  # the first steps allocate
    return (times[-1] - times[warm]) / (len(times) - 1 - warm)


def _evaluation_speed(prepared: Prepared, trial: TrainState) -> float:
    """Seconds to read and classify one picture, on a few batches."""
    images = prepared.val if prepared.val is not None else prepared.train
    began, done = time.monotonic(), 0
    for batch in evaluation_batches(images, prepared.recipe.batch_size):
        done += len(classify(trial.model, [batch], trial.device).label)
        if time.monotonic() - began > 1.0:
            break
    return (time.monotonic() - began) / done
