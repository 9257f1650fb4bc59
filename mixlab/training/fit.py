"""The one loop of training: whatever trains a model, for good or to learn something from it, is a `fit`."""

from collections.abc import Iterable, Iterator
from typing import Any

from mixlab.data.loader import Batch, TrainingDataset, training_batches
from mixlab.data.modality import BadFile
from mixlab.errors import TrainingError
from mixlab.evaluation.metrics import Predictions
from mixlab.training.clock import Clock
from mixlab.training.distributed import classify_shared
from mixlab.training.failures import NonFiniteError, explain_out_of_memory
from mixlab.training.plan import Plan
from mixlab.training.small_sets import explain_one_image
from mixlab.training.step import StepResult, TrainState, train_step

FOREVER = 1 << 40  # steps


class Course:
    """What goes with the steps of a fit, and when it ends. This one does nothing, for a model that is thrown away."""

    doing = "computing"

    def is_over(self) -> bool:
        """Whether to end, called before each step."""
        return False

    def leaves_out(self, batch: Batch, error: NonFiniteError) -> bool:
        """Whether to go on without a batch that is not finite; if not, `error` is raised."""
        return False

    def after_step(self, result: StepResult | None) -> bool:
        """Called after each step, which the clock counts already; True ends. result: None if it was left out."""
        return False

    def on_bad(self, file: BadFile) -> None:
        """Called for each file that cannot be read any more."""


def batches(
    plan: Plan,
    state: TrainState,
    clock: Clock,
    course: Course,
    *,
    augment: Any = None,
    num_workers: int | None = None,
) -> Iterator[Batch]:
    """The training batches of `plan` from the clock's step on, of which `state` takes its shards.

    augment, num_workers: others than the plan's.
    """
    recipe = plan.recipe
    last = clock.last_known_step
    return training_batches(
        TrainingDataset(
            examples=plan.data.train,
            augment=plan.augment if augment is None else augment,
            batch_size=recipe.batch_size,
            seed=recipe.seed,
            num_shards=state.exchange.num_shards,
            shards=state.shards,
            views=plan.objective.num_views,
        ),
        first_step=clock.step,
        num_steps=FOREVER if last is None else last,
        num_workers=plan.num_workers if num_workers is None else num_workers,
        on_bad=course.on_bad,
        timeout_seconds=recipe.timeout_seconds,
    )


def validate(plan: Plan, state: TrainState, course: Course) -> Predictions:
    """What `state` says of the validation split, with the logits, by all ranks together."""
    return classify_shared(
        state.world,
        state.eval_model,
        plan.data.validation,
        plan.recipe.batch_size,
        state.device,
        on_bad=course.on_bad,
        equally_often=state.exchange.needs_all_ranks,
        keep_logits=True,
    )


def fit(state: TrainState, batches: Iterable[Batch], clock: Clock, course: Course) -> None:
    """Train `state`, a batch a step, until the batches or the clock's steps are over or `course` has enough.

    TrainingError that says what to do where memory runs out, or a batch is too small for the model.
    """
    state.model.train()
    state.world.now(f"reading the batch of step {clock.step + 1}")
    for batch in batches:
        if course.is_over():
            return
        state.world.now(f"{course.doing} step {clock.step + 1}")
        result = None
        try:
            result = train_step(state, batch, clock)
        except NonFiniteError as error:
            if not course.leaves_out(batch, error):
                raise
        except (MemoryError, RuntimeError, ValueError) as error:
            _raise_explained(error, state)
            raise
        clock.step += 1
        if course.after_step(result) or clock.step >= clock.num_steps:
            return
        state.world.now(f"reading the batch of step {clock.step + 1}")


def _raise_explained(error: Exception, state: TrainState) -> None:
    """TrainingError that says what to do about `error`, where that is known."""
    explained: TrainingError | None = explain_out_of_memory(error, state.recipe, state.device)
    explained = explained or explain_one_image(error, state.recipe, state.world.size)
    try:
        if explained is not None:
            raise explained from error
    finally:
        del explained  # it and this frame would hold each other, and with them all memory of the step
