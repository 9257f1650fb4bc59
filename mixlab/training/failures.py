"""What can go wrong in a step, and what to do about it."""

import torch

from mixlab.errors import TrainingError, is_out_of_memory
from mixlab.training.recipe import Recipe
from mixlab.training.run_folder import NONFINITE_NAME


class NonFiniteError(TrainingError):
    """The loss or the gradient of a batch is NaN or infinite; no weight has changed. what: `loss` or `gradient`."""

    def __init__(self, what: str, message: str) -> None:
        super().__init__(
            message,
            where=f"the batch's examples are in {NONFINITE_NAME} of the run",
            hint="lower --optimizer.lr, or lengthen the warm-up; --skip-nonfinite N leaves out up to N such batches; "
            "the last checkpoint is from before",
        )
        self.what = what


class OutOfMemoryError(TrainingError):
    """A step found no more memory."""


def explain_out_of_memory(error: Exception, recipe: Recipe, device: torch.device) -> OutOfMemoryError | None:
    """What to do about `error`, if it says that memory ran out."""
    if not is_out_of_memory(error):
        return None
    parts = 2 * recipe.accumulate
    again = "" if recipe.checkpoint_blocks else "--checkpoint-blocks true keeps less of each block; "
    return OutOfMemoryError(
        f"memory ran out on {device} with batch_size {recipe.batch_size} in {recipe.accumulate} part(s)",
        where="batch_size",
        hint=f"--accumulate {parts} computes the same batch in {parts} parts; {again}or make --batch-size smaller; "
        "--resume goes on from the last checkpoint",
    )
