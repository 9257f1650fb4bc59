"""The parts every Mixer is made of.

Shapes: B batch, S patches (tokens), C channels of a token, D hidden width of an MLP; `...` any axes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Standard deviation of a unit normal truncated at two standard deviations. Dividing by it gives the
# truncated samples the target variance, as flax's lecun_normal does.
TRUNCATED_STD = 0.87962566103423978


@dataclass(frozen=True)
class Activation:
    """What stands between the two layers of an MLP: `function` of x, by torch.

    The rest is for mixlab's own passes on a CPU (cpu/); where there is neither of the first two, torch computes.
    backward: the gradient of x from that of the value, which may be written over, and x.
    gate: that by which x is multiplied, slope: the derivative from x and its gate; for a function that has a gate.
    fused: oneDNN's name of the function and of its algorithm, if it computes it in the same pass as a product.
    """

    function: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor] | None = None
    gate: Callable[[Tensor], Tensor] | None = None
    slope: Callable[[Tensor, Tensor], Tensor] | None = None
    fused: tuple[str, str] | None = None

    @property
    def has_kernel(self) -> bool:
        """Whether the passes can compute it."""
        return self.backward is not None or (self.gate is not None and self.slope is not None)


def gelu_tanh(x: Tensor) -> Tensor:
    """The approximation of GELU that the authors' `nn.gelu` computes."""
    if x.requires_grad and x.device.type == "cpu":
        return _TrainingGelu.apply(x)
    return F.gelu(x, approximate="tanh")


# Of z = LINEAR x + CUBIC x^3 below. LINEAR is a tensor so that it is added in the same pass as a multiple of another.
LINEAR = torch.tensor(2 * math.sqrt(2 / math.pi), dtype=torch.float64, device="cpu")
CUBIC = 2 * math.sqrt(2 / math.pi) * 0.044715


def gelu_gate(x: Tensor) -> Tensor:
    """sigmoid(z), by which x is multiplied for the tanh form of its GELU: tanh itself is slow on a CPU."""
    return torch.add(LINEAR, x * x, alpha=CUBIC).mul_(x).sigmoid_()


def gelu_slope(x: Tensor, gate: Tensor) -> Tensor:
    """The derivative of the tanh form at x: gate (1 + x z' (1 - gate))."""
    x_times_slope_of_z = torch.add(LINEAR, x * x, alpha=3 * CUBIC).mul_(x)
    return torch.ops.aten.sigmoid_backward(x_times_slope_of_z, gate).add_(gate)


class _TrainingGelu(torch.autograd.Function):
    """The same function as x * sigmoid(z), z = 2 sqrt(2 / pi) (x + 0.044715 x^3).

    Equal to torch's to rounding; a training step of Mixer-Micro/4 is about a tenth faster (LOG.md, 2026-11-22).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        gate = gelu_gate(x)
        ctx.save_for_backward(x, gate)
        return x * gate

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gelu_slope(*ctx.saved_tensors).mul_(gradient)


# By the name that a configuration's key `gelu` gives. Another one: an entry here, and its name in `Gelu`.
ACTIVATIONS = {
    "tanh": Activation(gelu_tanh, gate=gelu_gate, slope=gelu_slope, fused=("gelu", "tanh")),
    "erf": Activation(
        F.gelu, backward=torch.ops.aten.gelu_backward, fused=("gelu", "none")
    ),  # exact, as timm's
}
Gelu = Literal["tanh", "erf"]


def init_lecun_normal(weight: Tensor) -> None:
    """Fill `weight` (fan-out, fan-in...) from a truncated normal of variance 1 / fan-in."""
    std = math.sqrt(1.0 / weight[0].numel()) / TRUNCATED_STD
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


class Mlp(nn.Module):
    """Two linear layers with a GELU between, over the last axis: (..., width) -> (..., width)."""

    def __init__(self, width: int, hidden_dim: int, gelu_form: Gelu = "tanh") -> None:
        super().__init__()
        self.gelu_form: Gelu = gelu_form
        self.fc1 = nn.Linear(width, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(ACTIVATIONS[self.gelu_form].function(self.fc1(x)))

    def extra_repr(self) -> str:
        return f"gelu={self.gelu_form}"


class StochasticDepth(nn.Module):
    """Drop a residual branch for whole images while training, each with probability `drop_prob`.

    Kept branches are not divided by the keep probability: the authors' code does not rescale, unlike
    timm's DropPath. Draws come from torch's global generator, which the training step seeds.
    """

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, branch_BSC: Tensor) -> Tensor:
        if not self.training or self.drop_prob == 0.0:
            return branch_BSC
        keep_B11 = torch.rand(branch_BSC.shape[0], 1, 1, device=branch_BSC.device) >= self.drop_prob
        return branch_BSC * keep_B11

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob}"
