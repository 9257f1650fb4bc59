"""The way of one training: planned or reopened, fitted, finished. One way for every kind of training."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from mixlab.data.workers import leave_if_imported_again
from mixlab.errors import UsageError
from mixlab.planning.draft import Request
from mixlab.planning.make_plan import DECISIONS, Decision, make_plan
from mixlab.planning.reopen import reopen
from mixlab.training.build import build
from mixlab.training.cautions import data_cautions
from mixlab.training.choose_split import recipe_of
from mixlab.training.clock import Clock, read_changes
from mixlab.training.course import TrainingCourse
from mixlab.training.distributed import is_under_torchrun, joined
from mixlab.training.fit import batches, fit
from mixlab.training.history import StartOver, check_links, check_resumable, set_aside
from mixlab.training.introduce import introduce
from mixlab.training.outcome import finish
from mixlab.training.plan import Plan
from mixlab.training.run_folder import check_place, create_run, default_run_path, is_of_this_command, locked
from mixlab.training.session import Session
from mixlab.training.signals import stopped_at_once
from mixlab.training.step import TrainState


def train(
    request: Request,
    session: Session,
    *,
    decisions: Sequence[Decision] = DECISIONS,
    course_type: type[TrainingCourse] = TrainingCourse,
    clock_type: type[Clock] = Clock,
) -> dict[str, Any]:
    """Train what the request says into a new run; returns the object that `train --json` prints.

    decisions: as of `make_plan`. course_type: what goes with the steps. clock_type: what counts them.
    """
    leave_if_imported_again()
    with joined(request.recipe.timeout_seconds) as world:
        session = session.within(world)
        if request.run is not None and _is_started_again(request.run, session):
            return _resume(request.run, None, session, "if unfinished", course_type)
        _check(request, session)
        plan = make_plan(request, session, decisions)
        state = build(plan, session)
        run = world.run_on_main(lambda: create_run(request.run or default_run_path(plan.recipe), plan))
        with _alone_in(run, session):
            return _train(plan, state, run, session, course_type=course_type, clock_type=clock_type)


def resume(
    run: Path,
    session: Session,
    *,
    data: str | None = None,
    start_over: StartOver = "never",
    course_type: type[TrainingCourse] = TrainingCourse,
) -> dict[str, Any]:
    """Go on with the training in `run` from its newest valid checkpoint, as if it had never stopped.

    The number of processes may be another one than before. data: where the data set is now, if it was moved.
    start_over: begin again instead, and keep what is there in a folder of its own (history.py); TrainingError where
    that would be needed and `start_over` does not allow it. course_type: what goes with the steps.
    """
    leave_if_imported_again()
    if not (run / "recipe.toml").is_file():
        raise UsageError("there is no run to resume", where=str(run), hint="`mixlab runs` lists the runs")
    with joined(recipe_of(run).timeout_seconds) as world:
        return _resume(run, data, session.within(world), start_over, course_type)


def _resume(
    run: Path, data: str | None, session: Session, start_over: StartOver, course_type: type[TrainingCourse]
) -> dict[str, Any]:
    world = session.world
    world.run_on_main(lambda: check_links(run))
    with _alone_in(run, session):
        if world.run_on_main(lambda: check_resumable(run, start_over)):
            place = world.run_on_main(lambda: set_aside(run))
            session.screen.say(f"starting from the beginning; what was there is kept in {place}")
        when, hint = "before it went on; the run is as it was", f"go on with mixlab train --resume {run}"
        with stopped_at_once(run, when, hint, every=world.size > 1):
            plan = reopen(run, data, session)
            return _train(plan, build(plan, session), run, session, course_type=course_type, is_resumed=True)


def _train(
    plan: Plan,
    state: TrainState,
    run: Path,
    session: Session,
    *,
    course_type: type[TrainingCourse],
    clock_type: type[Clock] = Clock,
    is_resumed: bool = False,
) -> dict[str, Any]:
    world = session.world
    if not all(world.gather((run / "recipe.toml").is_file())):
        raise UsageError(
            "not all machines see the run folder",
            where=str(run),
            hint="put it on storage that all of them share, and give its whole path",
        )
    clock = clock_type(
        plan.num_steps,
        deadline=plan.deadline,
        run=run,
        changes=world.run_on_main(lambda: read_changes(run)),
    )
    course = course_type(plan, state, run, clock, session)
    introduce(plan, state, run, clock, session)
    for caution in data_cautions(plan):
        session.screen.say(f"warning: {caution}")
    if is_resumed:
        course.load()
    with course.running():
        fit(state, batches(plan, state, clock, course), clock, course)
    when = "after the last step, before the report was whole; the weights are there"
    hint = f"`mixlab train --resume {run}` tests them and writes the report"
    with stopped_at_once(run, when, hint, every=world.size > 1):
        return finish(run, plan, course, session)


def _is_started_again(run: Path, session: Session) -> bool:
    """Whether a job's manager has started this command again after `run` was lost."""
    world = session.world
    if not world.run_on_main(run.exists):
        return False
    if is_under_torchrun() and world.run_on_main(partial(is_of_this_command, run)):
        return True
    raise UsageError("this run exists already", where=str(run), hint="choose another --run, or --resume it")


def _check(request: Request, session: Session) -> None:
    """UsageError if the command cannot end well, before the data is opened for it."""
    run, recipe = request.run, request.recipe
    if run is None and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0:
        raise UsageError(
            "torchrun would not find the run again after a restart",
            where="--run",
            hint="name the run: --run NAME",
        )
    session.world.run_on_main(lambda: check_place(default_run_path(recipe) if run is None else run))
    if request.budget_seconds is not None and (recipe.steps is not None or recipe.epochs is not None):
        raise UsageError(
            "a budget sets the steps itself", where="--budget", hint="leave steps and epochs out"
        )


@contextmanager
def _alone_in(run: Path, session: Session) -> Iterator[None]:
    """One training at a time in a run's folder."""
    with locked(run, session.screen) if session.world.is_main else nullcontext():
        yield
