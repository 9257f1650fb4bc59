"""Training from the outside: build or reopen, run its course, report. One way for every kind of training."""

import os
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unicodedata import normalize

import torch

from mixlab.checkpoint.checkpoints import CHECKPOINTS_NAME, checkpoint_paths
from mixlab.checkpoint.described import check_size
from mixlab.checkpoint.store import CONFIG_NAME, WEIGHTS_NAME, read_config
from mixlab.data.dataset import everything
from mixlab.data.order import steps_per_epoch
from mixlab.data.preprocess import Preprocess
from mixlab.data.workers import leave_if_imported_again
from mixlab.device import autocast, set_threads
from mixlab.errors import DataError, UsageError, WeightsError
from mixlab.models.catalog import display_name
from mixlab.records import take, take_list
from mixlab.report.screen import Screen
from mixlab.training.batch_size import find_batch_size
from mixlab.training.budget import plan_steps
from mixlab.training.build import build_state, new_model, read_pictures
from mixlab.training.choose_split import open_own_data, recipe_of
from mixlab.training.course import Training
from mixlab.training.curriculum import check_curriculum
from mixlab.training.distill import Teaching
from mixlab.training.distributed import World, is_under_torchrun, joined
from mixlab.training.history import StartOver, check_links, check_resumable, set_aside
from mixlab.training.initial import fit_initial, open_initial, with_absolute_weights
from mixlab.training.lr_grid import LrGrid, choose_lr
from mixlab.training.model_size import choose_size, is_size_open
from mixlab.training.outcome import finish
from mixlab.training.prepared import Prepared, prepare, read_new, settle_augment
from mixlab.training.recipe import Recipe
from mixlab.training.run_folder import (
    add_bad_files,
    check_place,
    create_run,
    default_run_path,
    is_of_this_command,
    locked,
)
from mixlab.training.setup import (
    check_model,
    for_this_machine,
    model_settings,
    open_data,
    pick_precision,
    resolve,
    with_absolute_paths,
)
from mixlab.training.signals import Interrupted, catch_signals, stopped_at_once
from mixlab.training.small_sets import describe_absent, why_not_tested
from mixlab.training.splits import split_source
from mixlab.training.step import TrainState
from mixlab.training.teacher import ask_teacher, keep_answers, open_teacher, read_answers
from mixlab.training.tracking import check_tracker


def train(
    recipe: Recipe,
    *,
    run: Path | None = None,
    budget_seconds: float | None = None,
    follow_clock: bool = True,
    lr_grid: LrGrid | None = None,
    started: float | None = None,
    device: str = "auto",
    download: bool = False,
    with_pictures: bool = True,
    tracker: str | None = None,
    screen: Screen | None = None,
) -> dict[str, Any]:
    """Train `recipe` into the new folder `run`; returns the object that `train --json` prints.

    budget_seconds: total time from `started` (a time.monotonic(), by default now) to the end; sets the steps.
    follow_clock: whether their number is set anew while it trains; if not, those planned first are all taken.
    lr_grid: learning rates to try first, of which the best takes the place of the recipe's.
    """
    leave_if_imported_again()
    started = time.monotonic() if started is None else started
    screen = screen or Screen()
    with joined(recipe.timeout_seconds) as world:
        if run is None and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0:
            raise UsageError(
                "torchrun would not find the run again after a restart",
                where="--run",
                hint="name the run: --run NAME",
            )
        exists = world.from_main(lambda: run is not None and run.exists())
        if run and exists and is_under_torchrun() and world.from_main(partial(is_of_this_command, run)):
            # A machine that starts a lost training again cannot be asked.
            return _resume(world, run, None, device, with_pictures, tracker, screen, "if unfinished")
        if exists:
            raise UsageError(
                "this run exists already", where=str(run), hint="choose another --run, or --resume it"
            )
        world.from_main(lambda: check_place(default_run_path(recipe) if run is None else run))
        if budget_seconds is not None and (recipe.steps is not None or recipe.epochs is not None):
            raise UsageError(
                "a budget sets the steps itself", where="--budget", hint="leave steps and epochs out"
            )
        torch_device = world.device(device)
        autocast(torch_device, recipe.precision)  # raises if this device does not have it
        check_tracker(tracker)
        recipe = with_absolute_weights(with_absolute_paths(recipe))
        initial = open_initial(recipe)
        source = open_data(recipe, download=download)
        splits = split_source(source, recipe)
        untested = why_not_tested(source, splits)
        if untested is not None:
            screen.say(f"nothing will be tested: {untested}")
        for sentence in describe_absent(source, splits).values():
            screen.say(sentence)
        if lr_grid is not None and "val" not in splits:
            raise UsageError(
                "nothing is held out to judge learning rates on",
                where="--lr-grid",
                hint="give --val-fraction 0.1, and more than one picture of each class",
            )
        if initial is not None:
            recipe, initial = fit_initial(recipe, initial)
        may_choose = budget_seconds is not None and is_size_open(recipe)
        recipe = world.from_main(
            lambda: pick_precision(
                resolve(recipe, splits["train"], world.local_size, len(source)), torch_device, world.size
            )
        )
        # Before reading the pictures, which may take long.
        check_model(recipe, len(source.class_names), len(splits["train"]), world.size)
        check_curriculum(recipe)
        teacher = open_teacher(recipe, source.class_names, world.local_size * len(splits["train"]))
        set_threads(recipe.threads)
        prepared = read_pictures(world, partial(read_new, recipe, source, screen))
        recipe = prepared.recipe
        if recipe.batch_size == 0:
            model = new_model(prepared, prepared.model_settings, initial, screen)
            recipe = find_batch_size(prepared, model, torch_device, world, screen)
            prepared = replace(prepared, recipe=recipe)
        per_epoch = steps_per_epoch(len(prepared.train), recipe.batch_size)
        if budget_seconds is None:
            recipe = replace(recipe, steps=recipe.steps or max(round((recipe.epochs or 10) * per_epoch), 1))
            prepared = settle_augment(replace(prepared, recipe=recipe), per_epoch)
        elif teacher is not None:  # its views are drawn before the length is known
            prepared = settle_augment(prepared, per_epoch)
        end = None if budget_seconds is None else started + budget_seconds
        teaching = None
        if teacher is not None:
            teaching = ask_teacher(teacher, prepared, torch_device, world, screen, end)

        def build(prepared: Prepared) -> TrainState:
            return build_state(prepared, torch_device, initial, Screen(quiet=True), world, teaching)

        if end is not None and may_choose:
            prepared = choose_size(prepared, build, end=end, world=world)
        state = build_state(prepared, torch_device, initial, screen, world, teaching)
        deadline = None
        if budget_seconds is not None:
            plan = plan_steps(
                prepared, state, budget_seconds=budget_seconds, started=started, lr_grid=lr_grid
            )
            deadline = plan.deadline if follow_clock else None
            prepared = settle_augment(replace(prepared, recipe=plan.recipe), per_epoch)
            if may_choose:
                assert plan.recipe.model.name is not None
                assert plan.recipe.steps is not None
                size, epochs = display_name(plan.recipe.model.name), plan.recipe.steps / per_epoch
                screen.say(f"{size} suits this budget: time for about {epochs:.1f} epochs")
        recipe, tried = prepared.recipe, None
        if lr_grid is not None:
            del state  # its memory is needed for the trials
            recipe, tried = choose_lr(prepared, lr_grid, build, screen)
            prepared = replace(prepared, recipe=recipe)
            state = build(prepared)
        state.recipe = recipe
        run = world.from_main(lambda: _create(run, prepared, tried, teaching))
        with locked(run, screen) if world.is_main else nullcontext():
            return _run(prepared, state, run, started, deadline, with_pictures, tracker, screen)


def _create(
    run: Path | None, prepared: Prepared, tried: dict[str, Any] | None, teaching: Teaching | None
) -> Path:
    run = run or default_run_path(prepared.recipe)
    create_run(run, prepared, tried)
    if teaching is not None:
        keep_answers(run, teaching)
    return run


def resume(
    run: Path,
    *,
    data: str | None = None,
    device: str = "auto",
    with_pictures: bool = True,
    tracker: str | None = None,
    screen: Screen | None = None,
    start_over: StartOver = "never",
) -> dict[str, Any]:
    """Go on with the training in `run` from its newest valid checkpoint, as if it had never stopped.

    The number of processes may be another one than before. data: where the data set is now, if it was moved.
    start_over: begin again instead, and keep what is there in a folder of its own (history.py). TrainingError where
    that would be needed and is not asked for.
    """
    leave_if_imported_again()
    screen = screen or Screen()
    if not (run / "recipe.toml").is_file():
        raise UsageError("there is no run to resume", where=str(run), hint="`mixlab runs` lists the runs")
    with joined(recipe_of(run).timeout_seconds) as world:
        return _resume(world, run, data, device, with_pictures, tracker, screen, start_over)


def _resume(
    world: World,
    run: Path,
    data: str | None,
    device: str,
    with_pictures: bool,
    tracker: str | None,
    screen: Screen,
    start_over: StartOver,
) -> dict[str, Any]:
    started = time.monotonic()
    world.from_main(lambda: check_links(run))
    with locked(run, screen) if world.is_main else nullcontext():
        if world.from_main(lambda: check_resumable(run, start_over)):
            place = world.from_main(lambda: set_aside(run))
            screen.say(f"starting from the beginning; what was there is kept in {place}")
        when, hint = "before it went on; the run is as it was", f"go on with --resume {run}"
        with stopped_at_once(run, when, hint, every=world.size > 1):
            prepared, state = _reopen(world, run, data, device, screen)
            return _run(prepared, state, run, started, None, with_pictures, tracker, screen, resuming=True)


def _reopen(
    world: World, run: Path, data: str | None, device: str, screen: Screen
) -> tuple[Prepared, TrainState]:
    """The data, which may be at `data` now, and the model of a run as they were before its first step."""
    recipe = recipe_of(run)
    _check_resolved(recipe, run)
    source, recorded = open_own_data(run, recipe, data)
    known = source.class_names
    if (
        run / CONFIG_NAME
    ).is_file():  # alone: a kill may have come between new weights and what describes them
        names = take_list(read_config(run / CONFIG_NAME), "class_names", str, str(run / CONFIG_NAME))
        known = tuple(normalize("NFC", name) for name in names)
        _check_described(run, recipe)
    if known != source.class_names:
        raise DataError("the data set has other classes than when this run began", where=source.name)
    set_threads(recipe.threads)
    joined = everything(source)
    splits = {name: joined.take(places) for name, places in recorded.places.items()}
    recipe = for_this_machine(recipe, len(splits["train"]), world.local_size)
    prepared = read_pictures(world, partial(prepare, recipe, source, splits, screen, recorded.digests))
    world.from_main(lambda: add_bad_files(run, prepared.bad_files))
    initial = None
    if not checkpoint_paths(run / CHECKPOINTS_NAME):
        initial = open_initial(recipe)
        if initial is not None:
            recipe, initial = fit_initial(recipe, initial)
    torch_device = world.device(device)
    teaching = _reopen_teaching(world, run, prepared, torch_device, screen)
    return prepared, build_state(prepared, torch_device, initial, screen, world, teaching)


def _check_resolved(recipe: Recipe, run: Path) -> None:
    """UsageError if a run's recipe leaves open what every run's says."""
    stated = {
        "steps": recipe.steps,
        "threads": recipe.threads,
        "batch_size": recipe.batch_size or None,
        "precision": None if recipe.precision == "auto" else recipe.precision,
        "model.name": recipe.model.name,
        "data.image_size": recipe.data.image_size,
        "data.channels": recipe.data.channels,
        "data.in_memory": recipe.data.in_memory,
    }
    if missing := [key for key, value in stated.items() if value is None]:
        raise UsageError(
            f"the recipe of a run says its {missing[0]}, and this one does not",
            where=str(run / "recipe.toml"),
            hint="bring the file back as the run wrote it",
        )


def _check_described(run: Path, recipe: Recipe) -> None:
    """WeightsError if recipe.toml and config.json of a run are of different models: one of them was changed."""
    where = str(run / CONFIG_NAME)
    config = read_config(run / CONFIG_NAME)
    preprocess = Preprocess.from_json(take(config, "preprocess", dict, where), where)
    stated = (recipe.data.image_size, recipe.data.channels)
    if stated != (preprocess.image_size, preprocess.channels):
        raise WeightsError(
            "recipe.toml and config.json say different things of the size or channels of the pictures",
            where=where,
            hint="one of them is not this run's: bring it back",
        )
    files = [*(run / CHECKPOINTS_NAME).glob("step_*/model.safetensors"), run / WEIGHTS_NAME]
    num_bytes = max((file.stat().st_size for file in files if file.is_file()), default=None)
    if num_bytes is not None and not list((run / CHECKPOINTS_NAME).glob("step_*/.metadata")):
        num_classes = len(take_list(config, "class_names", str, where))
        check_size(model_settings(recipe, num_classes), num_bytes, str(run / "recipe.toml"))


def _reopen_teaching(
    world: World, run: Path, prepared: Prepared, device: torch.device, screen: Screen
) -> Teaching | None:
    """The teacher's answers as they were kept in the run; only where they are not whole it is asked again."""
    if not prepared.recipe.distill.is_on:
        return None
    kept = read_answers(run, prepared)
    if not world.largest([kept is None])[0]:
        return kept
    num_images = world.local_size * len(prepared.train)
    teacher = open_teacher(prepared.recipe, prepared.source.class_names, num_images)
    assert teacher is not None
    teaching = ask_teacher(teacher, prepared, device, world, screen)
    world.from_main(lambda: keep_answers(run, teaching))
    return teaching


def _run(
    prepared: Prepared,
    state: TrainState,
    run: Path,
    started: float,
    deadline: float | None,
    with_pictures: bool,
    tracker: str | None,
    screen: Screen,
    resuming: bool = False,
) -> dict[str, Any]:
    world = state.world
    if not all(world.gather((run / "recipe.toml").is_file())):
        raise UsageError(
            "not all machines see the run folder",
            where=str(run),
            hint="put it on storage that all of them share, and give its whole path",
        )
    training = Training(prepared, state, run, screen, tracker)
    if resuming:
        training.load()
    try:
        with catch_signals(every=world.size > 1) as signals:
            training.steps(signals, deadline)
            world.now("waiting for the last files")
            if state.is_spread:
                training.saver.close()
            else:
                world.from_main(training.saver.close)
            number = world.largest([signals[0] if signals else 0])[0]
            if number:
                signals.append(number)  # also where another rank got it
                raise Interrupted(number, run, training.step)
            training.check_folder()
            if state.cores is not None and state.cores.problem:
                text = (
                    f"Threads computed this training, slower than programs beside it: {state.cores.problem}."
                )
                screen.say(text)
                training.notes.append(text)
    finally:
        training.saver.abandon()
        if state.cores is not None:
            state.cores.close()
    when = "after the last step, before the report was whole; the weights are there"
    hint = f"`mixlab train --resume {run}` tests them and writes the report"
    with stopped_at_once(run, when, hint, every=world.size > 1):
        return finish(
            prepared,
            run,
            steps=training.step,
            seconds=training.seconds,
            device=state.device,
            started=started,
            with_pictures=with_pictures,
            notes=training.notes,
            screen=screen,
            world=world,
        )
