"""From a time budget to a number of steps, by measuring this machine's speed on this recipe."""

import re
import time
from dataclasses import replace

from mixlab.data.loader import evaluation_batches
from mixlab.errors import UsageError
from mixlab.evaluation.classify import classify
from mixlab.models.catalog import display_name
from mixlab.planning.draft import UNKNOWN_STEPS, Draft
from mixlab.training.build import build
from mixlab.training.choose import needs_all_ranks
from mixlab.training.clock import Clock
from mixlab.training.fit import Course, batches, fit
from mixlab.training.plan import Plan
from mixlab.training.recipe import Recipe
from mixlab.training.step import StepResult, TrainState

REPORT_SECONDS = 12.0  # figures, report and leaving Python, on two cores; measured
MEASURE_SHARE = 0.01  # of the budget, spent measuring; the clock of the training goes on with it
WAIT_SHARE = 0.1  # of what is left of it, at most, until what is measured computes as it will
SPARE_SHARE = 0.01  # of the budget, kept for a machine that slows down
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_duration(text: str) -> float:
    """`90s`, `10m`, `1.5h`, `2d` or plain seconds, as seconds. UsageError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text.strip().lower())
    if match is None or float(match[1]) == 0:
        raise UsageError(f"{text!r} is no length of time", where="--budget", hint="write 90s, 10m or 1.5h")
    return float(match[1]) * UNITS[match[2] or "s"]


def decide_steps(draft: Draft) -> Draft:
    """The steps that fit between now and the end of a budget, evaluation, report and trials of rates included.

    UsageError if there is not time for one step.
    """
    budget_seconds, end, world = draft.request.budget_seconds, draft.end, draft.session.world
    if budget_seconds is None or end is None:
        return draft
    if needs_all_ranks(draft.recipe, world):
        raise UsageError(
            f"a budget cannot be measured with {draft.recipe.parallel}",
            where="--budget",
            hint="give --steps or --epochs",
        )
    step_seconds, image_seconds = _measure(draft, max(MEASURE_SHARE * budget_seconds, 0.5), end)
    num_val = len(draft.data.val) if draft.data.val is not None else 0
    val_seconds = num_val * image_seconds  # of the one at the end
    test = draft.data.splits.get("test", ())
    reserve = REPORT_SECONDS + len(test) * (image_seconds + draft.data.seconds_per_read)
    left = end - time.monotonic() - reserve - SPARE_SHARE * budget_seconds
    trials = draft.request.trials
    num_trials, trial_share = (trials.num_trials, trials.share) if trials is not None else (0, 0.0)
    # One validation at the end, and one after each trial.
    left_to_train = left - (1 + num_trials) * val_seconds
    step_seconds *= 1 + num_trials * trial_share
    steps = int(left_to_train / (step_seconds + num_val * image_seconds / draft.steps_per_epoch))
    steps = world.run_on_main(lambda: steps)
    if steps < 1:
        raise UsageError(
            f"a budget of {budget_seconds:.0f} s leaves no time to train: reading, evaluation and report need "
            f"about {budget_seconds - left:.0f} s",
            where="--budget",
            hint="give more time, or a smaller model",
        )
    recipe = replace(draft.recipe, epochs=None, budget_seconds=budget_seconds)
    if draft.may_choose_size:
        size, epochs = display_name(str(recipe.model.name)), steps / draft.steps_per_epoch
        draft.session.screen.say(f"{size} suits this budget: time for about {epochs:.1f} epochs")
    deadline = end - reserve - val_seconds if draft.request.follow_clock else None
    return replace(draft, recipe=recipe, deadline=deadline).with_steps(steps)


def _measure(draft: Draft, measure_seconds: float, end: float) -> tuple[float, float]:
    """What a step and an image of an evaluation take, in seconds, measured on a model that is thrown away."""
    plan = draft.plan(UNKNOWN_STEPS, for_measuring(draft.recipe))
    trial = build(plan, draft.session.silent())
    step_seconds = measure_steps(plan, trial, measure_seconds, end)
    return step_seconds, _evaluation_speed(plan, trial) / trial.world.size


def for_measuring(recipe: Recipe) -> Recipe:
    """The recipe of a trial: nothing compiled, and no example read before its steps."""
    return replace(recipe, compile=False, whiten_stem=False)


class _Stopwatch(Course):
    """Ends a fit when enough steps have been timed."""

    doing = "measuring"

    def __init__(self, trial: TrainState, measure_seconds: float, end: float) -> None:
        self._trial, self._measure_seconds, self._end = trial, measure_seconds, end
        self._times, self._waited = [time.monotonic()], 0.0

    def after_step(self, result: StepResult | None) -> bool:
        times = self._times
        if len(times) == 1:
            began = time.monotonic()
            # What it will be in a moment is what counts.
            self._trial.engine.wait(WAIT_SHARE * max(self._end - began, 0.0))
            self._waited = time.monotonic() - began
        times.append(time.monotonic() - self._waited)
        enough = len(times) > 5 and times[-1] - times[0] > self._measure_seconds
        is_late = times[-1] + self._waited > self._end
        return bool(self._trial.world.all_reduce_max([enough or is_late])[0])

    @property
    def step_seconds(self) -> float:
        times = self._times
        warm = min(3, max(len(times) - 3, 0))  # the first steps allocate
        return (times[-1] - times[warm]) / (len(times) - 1 - warm)


def measure_steps(plan: Plan, trial: TrainState, measure_seconds: float, end: float) -> float:
    """Seconds that a step takes, reading included, from steps for about `measure_seconds`, not far beyond `end`."""
    watch, clock = _Stopwatch(trial, measure_seconds, end), Clock(UNKNOWN_STEPS)
    fit(trial, batches(plan, trial, clock, watch, augment=plan.longest_augment), clock, watch)
    return watch.step_seconds


def _evaluation_speed(plan: Plan, trial: TrainState) -> float:
    """Seconds to read and classify one example, on a few batches."""
    examples = plan.data.val if plan.data.val is not None else plan.data.train
    began, done = time.monotonic(), 0
    for batch in evaluation_batches(examples, plan.recipe.batch_size):
        done += len(classify(trial.model, [batch], trial.device).label)
        if time.monotonic() - began > 1.0:
            break
    return (time.monotonic() - began) / done
