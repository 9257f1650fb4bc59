"""From a time budget to a number of steps, by measuring this machine's speed on this recipe."""

import copy
import re
import time
from dataclasses import dataclass, replace

from mixlab.data.loader import TrainingPictures, evaluation_batches, training_batches
from mixlab.data.order import steps_per_epoch
from mixlab.errors import UsageError
from mixlab.evaluation.classify import classify
from mixlab.training.recipe import Recipe
from mixlab.training.setup import Prepared
from mixlab.training.step import TrainState, train_step

REPORT_SECONDS = 7.0  # figures, report and leaving Python, on two cores; measured
MEASURE_SHARE = 0.02  # of the budget, spent measuring
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


def plan_steps(prepared: Prepared, state: TrainState, *, budget_seconds: float, started: float) -> Plan:
    """Steps that fit between now and the end of the budget, evaluation and report included.

    started: time.monotonic() at which the budget began. UsageError if there is not time for one step.
    """
    recipe, images, world = prepared.recipe, prepared.train, state.world
    if state.is_spread:
        raise UsageError(
            "a budget cannot be measured with fsdp", where="--budget", hint="give --steps or --epochs"
        )
    end = started + budget_seconds
    measure_seconds = max(MEASURE_SHARE * budget_seconds, 0.5)
    # A copy learns, so that what is trained later starts from the same weights whatever was measured.
    optimizer = replace(recipe.optimizer, sam_from=0.0)  # its dearest steps
    trial_recipe = replace(recipe, steps=1_000_000, compile=False, optimizer=optimizer)
    num_classes = len(prepared.source.class_names)
    trial = TrainState(
        copy.deepcopy(state.model),
        trial_recipe,
        images.split.labels,
        num_classes,
        state.device,
        world,
        state.teaching,
    )
    pictures = TrainingPictures(
        images=images,
        augment=recipe.augment,
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        num_shards=trial.num_shards,
        shards=trial.shards,
        views=recipe.distill.num_views,
    )
    times = [time.monotonic()]
    workers = recipe.data.num_workers or 0
    for step, batch in enumerate(
        training_batches(
            pictures, first_step=0, num_steps=1_000_000, num_workers=workers, on_bad=lambda file: None
        )
    ):
        train_step(trial, batch, step)
        times.append(time.monotonic())
        enough = (step >= 4 and times[-1] - times[0] > measure_seconds) or times[-1] > end
        if world.largest([enough])[0]:
            break
    warm = min(3, max(len(times) - 3, 0))  # the first steps allocate
    seconds_per_step = (times[-1] - times[warm]) / (len(times) - 1 - warm)
    seconds_per_step *= 1 - recipe.optimizer.sam_from / 2  # a plain step takes half of one with two passes
    seconds_per_image = _evaluation_speed(prepared, trial) / world.size
    per_epoch = steps_per_epoch(len(images), recipe.batch_size)
    val_seconds = len(prepared.val) * seconds_per_image if prepared.val is not None else 0.0
    test = prepared.splits.get("test", ())
    reserve = REPORT_SECONDS + len(test) * (seconds_per_image + prepared.seconds_per_read)
    left = end - time.monotonic() - reserve - SPARE_SHARE * budget_seconds
    steps = int(
        (left - val_seconds) / (seconds_per_step + val_seconds / per_epoch)
    )  # one validation at the end
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
        deadline=end - reserve - val_seconds + SPARE_SHARE * budget_seconds,
    )


def _evaluation_speed(prepared: Prepared, trial: TrainState) -> float:
    """Seconds to read and classify one picture, on a few batches."""
    images = prepared.val if prepared.val is not None else prepared.train
    began, done = time.monotonic(), 0
    for batch in evaluation_batches(images, prepared.recipe.batch_size):
        done += len(classify(trial.model, [batch], trial.device).label)
        if time.monotonic() - began > 1.0:
            break
    return (time.monotonic() - began) / done
