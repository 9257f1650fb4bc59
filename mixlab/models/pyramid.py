"""A hierarchical Mixer: stages of fewer and wider tokens, axial token mixing, shifted channel mixing.

Nothing but products of matrices and shifts: no convolution beyond the patch stem, no attention. Three switches lead
from the flat Mixer to it: one stage, `stage_mixing="full"` and `local="none"` is exactly `mixer.Mixer`. The parts are
known: axial linear maps (ViP, Hou et al. 2021; sMLP, Tang et al. 2021), shifts of groups of channels (S2-MLP, Yu et
al. 2021), 2 x 2 merging by a linear map (Swin, Liu et al. 2021); putting the shift between the two layers of channel
mixing, where it costs no product of its own, is ours.

Axes: B batch, H W grid of tokens, S = H W, C channels of a token, D hidden width of channel mixing.
"""

import itertools
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixlab.errors import UsageError
from mixlab.models.layers import ACTIVATIONS, Mlp
from mixlab.models.mixer import Mixer, MixerBlock, MixerConfig


@dataclass(frozen=True, kw_only=True)
class PyramidConfig(MixerConfig):
    """Dimensions of a pyramid; `num_blocks` is the sum of `stage_blocks`.

    stage_blocks: how many blocks each stage has. Every stage after the first begins by merging 2 x 2 tokens into
        one, and has twice the hidden_dim and channel_mlp_dim of the one before.
    stage_mixing: `full`, the Mixer's MLP over all tokens (of `token_mlp_dim`), or `axial`, a linear map of every
        column of tokens plus one of every row.
    local: `shift` moves four fifths of channel mixing's hidden units by one token, a fifth each way, zeros coming in.
    """

    stage_blocks: tuple[int, ...]
    stage_mixing: Literal["full", "axial"] = "axial"
    local: Literal["none", "shift"] = "shift"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.stage_blocks or min(self.stage_blocks) < 1 or sum(self.stage_blocks) != self.num_blocks:
            raise UsageError(
                f"stages of {self.stage_blocks} blocks do not make {self.num_blocks}",
                where="model.stage_blocks",
                hint="give each stage at least one block, such as 2,2,2",
            )
        factor = 2 ** (len(self.stage_blocks) - 1)
        if any(side % factor for side in self.grid):
            raise UsageError(
                f"{len(self.stage_blocks)} stages need a grid whose sides are multiples of {factor}, "
                f"it is {self.grid[0]}x{self.grid[1]}",
                where="model.stage_blocks",
                hint="choose another image_size or patch_size, or fewer stages",
            )

    @property
    def features_dim(self) -> int:
        return self.hidden_dim * 2 ** (len(self.stage_blocks) - 1)

    def stage(self, block: int) -> int:
        """Which stage a block is in."""
        return next(
            stage for stage in range(len(self.stage_blocks)) if block < sum(self.stage_blocks[: stage + 1])
        )

    def of_block(self, index: int) -> "PyramidConfig":
        return self.of_stage(self.stage(index))

    def of_stage(self, stage: int) -> "PyramidConfig":
        """The same with the image size and widths that make the grid and the blocks of a stage."""
        factor = 2**stage
        height, width = self.image_size
        return replace(
            self,
            image_size=(height // factor, width // factor),
            hidden_dim=factor * self.hidden_dim,
            channel_mlp_dim=factor * self.channel_mlp_dim,
            stage_blocks=(self.num_blocks,),
        )


def shift_groups(width: int) -> list[slice]:
    """The channels that come from the token above, below, left, right: a fifth each; and the rest, which stays."""
    edges = [width // 5 * number for number in range(5)] + [width]
    return [slice(*pair) for pair in itertools.pairwise(edges)]


def shift(x_BHWC: Tensor) -> Tensor:
    """Four groups of channels moved by one token, each its own way; zeros come in, what leaves the grid is lost."""
    down, up, right, left, stay = (x_BHWC[..., group] for group in shift_groups(x_BHWC.shape[-1]))
    return torch.cat(
        [
            F.pad(down[:, :-1], (0, 0, 0, 0, 1, 0)),
            F.pad(up[:, 1:], (0, 0, 0, 0, 0, 1)),
            F.pad(right[:, :, :-1], (0, 0, 1, 0)),
            F.pad(left[:, :, 1:], (0, 0, 0, 1)),
            stay,
        ],
        dim=-1,
    )


class AxialMixing(nn.Module):
    """A linear map along each axis of the grid, their sum: (B, C, S) -> (B, C, S).

    No biases: they would add one number to all channels of a token, which every LayerNorm over them takes out again.
    """

    def __init__(self, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.columns = nn.Linear(grid[0], grid[0], bias=False)
        self.rows = nn.Linear(grid[1], grid[1], bias=False)

    def forward(self, x_BCS: Tensor) -> Tensor:
        x_BCHW = x_BCS.unflatten(2, self.grid)
        return (self.columns(x_BCHW.transpose(2, 3)).transpose(2, 3) + self.rows(x_BCHW)).flatten(2)


class ShiftMlp(Mlp):
    """Channel mixing whose hidden units come from a token and its four neighbours: (B, S, C) -> (B, S, C)."""

    def __init__(self, config: PyramidConfig) -> None:
        super().__init__(config.hidden_dim, config.channel_mlp_dim, config.gelu)
        self.grid = config.grid

    def forward(self, x_BSC: Tensor) -> Tensor:
        hidden = ACTIVATIONS[self.gelu_form].function(self.fc1(x_BSC))
        return self.fc2(shift(hidden.unflatten(1, self.grid)).flatten(1, 2))


class Merging(nn.Module):
    """2 x 2 neighbouring tokens to one of twice the width: (B, S, C) -> (B, S / 4, 2 C)."""

    def __init__(self, config: PyramidConfig) -> None:
        super().__init__()
        self.grid = config.grid
        self.norm = nn.LayerNorm(4 * config.hidden_dim, eps=config.layer_norm_eps)
        self.linear = nn.Linear(4 * config.hidden_dim, 2 * config.hidden_dim)

    def forward(self, x_BSC: Tensor) -> Tensor:
        height, width = self.grid
        # Not by len(), which an export would write down as the number of images.
        x = x_BSC.unflatten(1, (height // 2, 2, width // 2, 2)).transpose(2, 3)
        return self.linear(self.norm(x.flatten(3).flatten(1, 2)))


class PyramidBlock(MixerBlock):
    """A Mixer's block with the switches of its configuration; `merging` comes first where a stage begins."""

    def __init__(self, config: PyramidConfig, drop_prob: float, merging: Merging | None) -> None:
        super().__init__(config, drop_prob)
        self.merging = merging
        if config.stage_mixing == "axial":
            self.token_mixing = AxialMixing(config.grid)
        if config.local == "shift":
            self.channel_mixing = ShiftMlp(config)

    def forward(self, x_BSC: Tensor, mask_BS: Tensor | None = None) -> Tensor:
        if mask_BS is not None:
            raise UsageError("the blocks of a pyramid know a grid of tokens and take no mask", where="model")
        return super().forward(x_BSC if self.merging is None else self.merging(x_BSC))


class PyramidMixer(Mixer):
    """Images (B, in_channels, H, W) to logits (B, K)."""

    config: PyramidConfig

    def __init__(self, config: PyramidConfig) -> None:
        super().__init__(config)

    def make_block(self, index: int, drop_prob: float) -> nn.Module:
        stage = self.config.stage(index)
        merging = None
        if index > 0 and self.config.stage(index - 1) < stage:
            merging = Merging(self.config.of_stage(stage - 1))
        return PyramidBlock(self.config.of_block(index), drop_prob, merging)

    @torch.no_grad()
    def init_weights(self) -> None:
        """The Mixer's initialisation; an axial map counts as the second kernel of its branch."""
        super().init_weights()
        for module in self.modules():
            if isinstance(module, AxialMixing):
                module.columns.weight.mul_(self.config.branch_init_scale)
                module.rows.weight.mul_(self.config.branch_init_scale)


# Ours, for 32 pixels in patches of 2 and for 224 pixels in patches of 4.
#                 stage_blocks, hidden_dim, token_mlp_dim, channel_mlp_dim
PYRAMID_SIZES = {
    "micro": ((2, 2, 2), 32, 64, 96),
    "mini": ((2, 2, 2), 48, 64, 144),
    "nano": ((2, 2, 2), 64, 64, 192),
    "t": ((2, 2, 4, 2), 64, 128, 192),
    "s": ((2, 2, 10, 2), 96, 128, 288),
}
