"""SGD whose momentum is kept in bfloat16, as the authors published their fine-tuning (optax `accumulator_dtype`)."""

from collections.abc import Callable, Iterable
from typing import Any

import torch


class Bf16MomentumSgd(torch.optim.Optimizer):
    """v <- momentum * v + gradient; weight <- weight - lr * v. v is rounded to bfloat16 after every step.

    As in JAX, the factor is rounded to bfloat16 as well (0.9 is 0.8984 there, which is most of the difference from
    fp32 momentum: 2e-3 in the loss after ten steps), and so is the product; the step is taken with the unrounded sum.
    """

    def __init__(
        self, params: Iterable[Any], *, lr: float, momentum: float = 0.9, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            momentum = torch.tensor(group["momentum"], dtype=torch.bfloat16)
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                gradient = parameter.grad
                if group["weight_decay"]:
                    gradient = gradient.add(parameter, alpha=group["weight_decay"])
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
                # A loaded state comes in the weights' type; nothing is lost on the way there and back.
                kept = state["momentum_buffer"].to(torch.bfloat16)
                step = gradient + (kept * momentum.to(kept.device)).to(gradient.dtype)
                parameter.add_(step, alpha=-group["lr"])
                state["momentum_buffer"] = step.to(torch.bfloat16)
