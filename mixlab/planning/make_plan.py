"""`make_plan`: opens the data and takes every decision that a request leaves open, once."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from mixlab.data.dataset import Source, Split
from mixlab.device import autocast, set_threads
from mixlab.planning.batch_size import decide_batch_size
from mixlab.planning.budget import decide_steps
from mixlab.planning.draft import Draft, Request
from mixlab.planning.model_size import decide_model_size, is_size_open
from mixlab.training.choose import objective_module
from mixlab.training.distributed import World, same_everywhere
from mixlab.training.from_labels import labels_of
from mixlab.training.initial import fit_initial, open_initial, with_absolute_weights
from mixlab.training.plan import Plan
from mixlab.training.prepared import Prepared, read_new
from mixlab.training.recipe import Recipe
from mixlab.training.session import Session
from mixlab.training.setup import (
    check_model,
    open_data,
    pick_precision,
    resolve,
    with_absolute_paths,
)
from mixlab.training.small_sets import describe_absent, why_not_tested
from mixlab.training.splits import split_source
from mixlab.training.tracking import check_tracker

Decision = Callable[[Draft], Draft]


def _begin(request: Request, session: Session) -> Draft:
    """What follows from the data and the weights alone, with all examples read."""
    world, screen = session.world, session.screen
    autocast(session.device, request.recipe.precision)  # raises if this device does not have it
    check_tracker(session.tracker)
    recipe = with_absolute_weights(with_absolute_paths(request.recipe))
    initial = open_initial(recipe)
    source = open_data(recipe, download=request.download)
    splits = split_source(source, recipe)
    _say_of_splits(source, splits, session)
    if request.trials is not None:
        request.trials.check("val" in splits)
    if initial is not None:
        recipe, initial = fit_initial(recipe, initial, source.modality)
    may_choose = request.budget_seconds is not None and is_size_open(recipe)
    recipe = world.run_on_main(lambda: _resolved(recipe, splits["train"], source, session))
    # Before reading the examples, which may take long.
    check_model(recipe, len(source.class_names), len(splits["train"]), world.size)
    num_images = world.local_size * len(splits["train"])
    preparation = objective_module(recipe).begin(recipe, source.class_names, num_images)
    set_threads(recipe.threads)
    recipe, data = read_everywhere(world, partial(read_new, recipe, source, screen))
    return Draft(
        request=request,
        session=session,
        recipe=recipe,
        data=data,
        initial=initial,
        preparation=preparation,
        objective=labels_of(recipe.loss, data),
        may_choose_size=may_choose,
    )


def _say_of_splits(source: Source, splits: dict[str, Split], session: Session) -> None:
    untested = why_not_tested(source, splits)
    if untested is not None:
        session.screen.say(f"nothing will be tested: {untested}")
    for sentence in describe_absent(source, splits).values():
        session.screen.say(sentence)


def _resolved(recipe: Recipe, train: Split, source: Source, session: Session) -> Recipe:
    resolved = resolve(recipe, train, source.modality, session.world.local_size, len(source))
    return pick_precision(resolved, session.device, session.world.size)


def read_everywhere(world: World, read: Callable[[], tuple[Recipe, Prepared]]) -> tuple[Recipe, Prepared]:
    """What `read` gives, and that all ranks have the same training images."""
    world.now("reading the data set")
    recipe, data = read()
    train = data.train.split
    world.check_same(same_everywhere((len(train), train.names, train.labels.tolist())), "training images")
    return recipe, data


def decide_length(draft: Draft) -> Draft:
    """The draft with the number of steps that its recipe says, where no budget sets it."""
    recipe = draft.recipe
    if draft.request.budget_seconds is None:
        epochs = recipe.epochs or 10
        return draft.with_steps(recipe.steps or max(round(epochs * draft.steps_per_epoch), 1))
    # Views that are looked at before the length is known are drawn as those of a short training.
    return draft.with_augment(0) if draft.preparation.looks_at_views else draft


def decide_objective(draft: Draft) -> Draft:
    """The draft with what it minimises."""
    objective = draft.preparation.prepare(draft.recipe, draft.data, draft.session, draft.end)
    return replace(draft, objective=objective)


def decide_by_trials(draft: Draft) -> Draft:
    """The draft with what short trainings choose, where the request has some."""
    trials, num_steps = draft.request.trials, draft.num_steps
    return draft if trials is None or num_steps is None else trials.decide(draft, num_steps)


# In this order: each knows what those before it have decided.
DECISIONS: tuple[Decision, ...] = (
    decide_batch_size,
    decide_length,
    decide_objective,
    decide_model_size,
    decide_steps,
    decide_by_trials,
)


def make_plan(request: Request, session: Session, decisions: Sequence[Decision] = DECISIONS) -> Plan:
    """The plan of a request. UsageError, before anything is read, where it cannot be done.

    decisions: what is decided, each knowing what those before it have.
    """
    draft = _begin(request, session)
    for decide in decisions:
        draft = decide(draft)
    return draft.finished()
