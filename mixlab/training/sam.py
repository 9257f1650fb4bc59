"""Sharpness-aware minimisation: the gradient where the loss of the neighbourhood is largest, instead of here.

SAM (Foret et al. 2021, "Sharpness-aware minimization for efficiently improving generalization") climbs from the
weights by a radius rho along their gradient and descends with the gradient found there. GSAM (Zhuang et al. 2022,
"Surrogate gap minimization improves sharpness-aware training") also takes away alpha times that part of the first
gradient which is at right angles to the second, and lets rho fall with the learning rate. Both take two passes a
step, whose gradient is clipped after all that, as in the authors' code.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mixlab.errors import UsageError
from mixlab.training.exchanges import Exchange
from mixlab.training.recipe import Recipe

EPS = 1e-12  # as in the authors' code


def check_sam(recipe: Recipe, exchange: Exchange) -> None:
    """UsageError where gradients are exchanged within each pass: no shard could climb by itself."""
    if recipe.optimizer.sam_rho and exchange.is_within_passes:
        raise UsageError(
            "on several processes sharpness-aware minimisation goes shard by shard",
            where="optimizer.sam_rho",
            hint=f"--virtual-shards {exchange.num_shards} or more: each climbs by itself, as the authors' devices do",
        )


def sam_radius(recipe: Recipe, factor: float) -> float | None:
    """rho at a step whose learning rate is `factor` times the base; None where steps are plain ones.

    It goes from sam_rho at the highest rate to sam_rho_end at the lowest that decay leads to. Warm-up begins with a
    lower rate, and so a little below sam_rho_end, as in the authors' code.
    """
    config, schedule = recipe.optimizer, recipe.schedule
    if not config.sam_rho:
        return None
    end_factor = {"linear": schedule.end_factor, "cosine": 0.0, "constant": 1.0}[schedule.decay]
    if config.sam_rho_end is None or end_factor == 1.0:
        return config.sam_rho
    height = (factor - end_factor) / (1 - end_factor)
    return config.sam_rho_end + (config.sam_rho - config.sam_rho_end) * height


def sharp_backward(
    model: nn.Module, backward: Callable[[], Tensor], radius: float | None, alpha: float
) -> Tensor:
    """Run `backward` here and at `radius` from here, and leave the gradient of SAM, or GSAM where alpha is not 0.

    backward: adds the gradient to the parameters', which have none yet, and draws the same both times. Returned is
    what it gave here. Weights and buffers (running statistics) end as the first run left them, to the bit. Without a
    radius it is run once, and nothing else.
    """
    result = backward()
    if radius is None:
        return result
    moved: list[Tensor] = [p for p in model.parameters() if p.grad is not None]
    here = [p.grad for p in moved if p.grad is not None]
    norm = nn.utils.get_total_norm(here)
    kept = [*moved, *model.buffers()]
    values = [tensor.detach().clone() for tensor in kept]
    with torch.no_grad():
        torch._foreach_add_(moved, list(torch._foreach_mul(here, radius / (norm + EPS))))
    for parameter in moved:
        parameter.grad = None
    try:
        backward()
    finally:
        with torch.no_grad():
            for tensor, value in zip(kept, values, strict=True):
                tensor.copy_(value)
    if alpha:
        _widen(moved, here, alpha)
    return result


@torch.no_grad()
def _widen(moved: list[Tensor], here: list[Tensor], alpha: float) -> None:
    """Gradient g of `moved` -> g - alpha * (the part of `here` at right angles to g)."""
    there = [p.grad for p in moved if p.grad is not None]
    dots = torch.stack([(a * b).sum() for a, b in zip(here, there, strict=True)]).sum()
    norm = nn.utils.get_total_norm(there)
    along = (dots / norm / norm).nan_to_num(0.0)  # without a gradient there is no direction either
    torch._foreach_mul_(there, 1 + alpha * along)
    torch._foreach_sub_(there, list(torch._foreach_mul(here, alpha)))
