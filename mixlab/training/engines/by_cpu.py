"""mixlab's own passes compute: plain Mixers and pyramids on a CPU, a core for each few images."""

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from mixlab.cpu.cores import Cores
from mixlab.cpu.passes import MODELS, is_plain, why_not_kind
from mixlab.device import multiplies_bf16
from mixlab.language import Sentence
from mixlab.models.mixer import Mixer
from mixlab.threads import one_core_each, seeded
from mixlab.training.objectives import Objective
from mixlab.training.recipe import Recipe


def dtype_of(recipe: Recipe, model: nn.Module) -> torch.dtype | None:
    """What these passes would compute the model in; None where torch has to."""
    if not recipe.fast or recipe.compile or not is_plain(model):
        return None
    if recipe.precision == "bf16":
        return torch.bfloat16 if multiplies_bf16() else None
    return torch.float32 if recipe.precision == "fp32" else None


def lost_kernels(recipe: Recipe, model: nn.Module) -> Sentence | None:
    """A sentence where a model that these passes were written for is not computed by them, because it was changed."""
    is_here = next(model.parameters()).device.type == "cpu"
    reason = why_not_kind(model) if is_here and recipe.fast and type(model) in MODELS else None
    return (
        None
        if reason is None
        else Sentence(
            "torch computed this training, slower than mixlab's own passes would: {reason}.", reason=reason
        )
    )


class CpuEngine:
    """The passes of `Cores`: threads or programs of one core each. dtype, timeout_seconds: as it has them."""

    def __init__(
        self, model: Mixer, objective: Objective, dtype: torch.dtype, timeout_seconds: float
    ) -> None:
        self.cores = Cores(model, dtype, timeout_seconds)
        self._objective = objective

    def stepping(self) -> AbstractContextManager[object]:
        return one_core_each()

    def backward(self, image: Tensor, target: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
        with seeded(seed):
            keep = self.cores.draw(len(image))
        return self.cores.backward(image, target, self._objective.loss, share, keep)

    def wait(self, seconds: float) -> None:
        self.cores.wait(seconds)

    def problem(self) -> Sentence | None:
        problem = self.cores.problem
        return (
            problem
            if problem is None
            else Sentence(
                "Threads computed this training, slower than programs beside it: {reason}.", reason=problem
            )
        )

    def close(self) -> None:
        self.cores.close()
