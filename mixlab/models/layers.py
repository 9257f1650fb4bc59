"""The parts every Mixer is made of.

Shapes: B batch, S patches (tokens), C channels of a token, D hidden width of an MLP; `...` any axes.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Standard deviation of a unit normal truncated at two standard deviations. Dividing by it gives the
# truncated samples the variance that was asked for, as flax's lecun_normal does.
TRUNCATED_STD = 0.87962566103423978


def gelu(x: Tensor) -> Tensor:
    """GELU in the tanh approximation, which is what the authors' `nn.gelu` computes."""
    return F.gelu(x, approximate="tanh")


def init_lecun_normal(weight: Tensor) -> None:
    """Fill `weight` (fan-out, fan-in...) from a truncated normal of variance 1 / fan-in."""
    std = math.sqrt(1.0 / weight[0].numel()) / TRUNCATED_STD
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


class Mlp(nn.Module):
    """Two linear layers with a GELU between, over the last axis: (..., width) -> (..., width)."""

    def __init__(self, width: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(gelu(self.fc1(x)))


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
