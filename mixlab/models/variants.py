"""Token-mixing variants of the paper's Appendix A, and the blocks of its Appendix C: a Mixer with another token MLP.

Axes: B batch, S tokens, C channels, D hidden width of the token MLP, G groups, N independent MLPs.
Every token-mixing module maps (B, C, S) to (B, C, S) (`shrinking`: to fewer tokens). Hidden widths are those of the
configuration, absolute, also where a group is wider: the paper does not state its own.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixlab.errors import UsageError
from mixlab.models.layers import ACTIVATIONS, Gelu, Mlp, init_lecun_normal
from mixlab.models.mixer import Mixer, MixerBlock, MixerConfig

KINDS = ("untied", "grouped", "projected", "shrinking", "blocks")


@dataclass(frozen=True, kw_only=True)
class VariantConfig(MixerConfig):
    """Dimensions of a Mixer with another token mixing.

    token_mixing:
        `untied`: every channel has a token MLP of its own (Appendix A).
        `grouped`: token_groups neighbouring channels are mixed together: tokens and group make one axis of S G (A).
        `projected`: the same after a learned linear map of the channels, token_groups projections C -> C / G (A).
        `shrinking`: token_groups stages; each but the first starts with a token MLP from S to S / 4 tokens (A, where
            it is called a pyramid). The
            paper does not say what its skip connection is: here the mean over 2 x 2 neighbouring tokens.
        `blocks`: token_groups x token_groups sub-images, each with a token MLP of its own of `token_mlp_dim`
            hidden units (Appendix C, stored as blocks).
    """

    token_mixing: Literal["untied", "grouped", "projected", "shrinking", "blocks"]
    token_groups: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.token_mixing not in KINDS:
            raise UsageError(
                f"there is no token mixing {self.token_mixing!r}",
                where="model.token_mixing",
                hint="it is called shrinking now"
                if self.token_mixing == "pyramid"
                else f"one of {', '.join(KINDS)}",
            )
        if self.token_groups < 1:
            raise UsageError(f"must be at least 1, got {self.token_groups}", where="model.token_groups")
        divisors = {
            "grouped": (self.token_groups, self.hidden_dim),
            "projected": (self.token_groups, self.hidden_dim),
            "blocks": (self.token_groups, *self.grid),
            "shrinking": (2 ** (self.token_groups - 1), *self.grid),
        }
        divisor, *sizes = divisors.get(self.token_mixing, (1, 1))
        if any(size % divisor for size in sizes):
            what = "hidden_dim" if len(sizes) == 1 else "the grid of patches"
            raise UsageError(
                f"{self.token_mixing} with token_groups {self.token_groups} needs {what} to be a multiple of "
                f"{divisor}, it is {' x '.join(str(size) for size in sizes)}",
                where="model.token_groups",
            )
        if self.token_mixing == "shrinking" and self.token_groups > self.num_blocks:
            raise UsageError(
                f"{self.token_groups} stages for {self.num_blocks} blocks", where="model.token_groups"
            )

    def of_block(self, index: int) -> MixerConfig:
        """What a block sees: one that starts a later stage still sees the grid before it."""
        if self.token_mixing != "shrinking":
            return self
        scale = 2 ** (self.stage(index) - self.starts_stage(index))
        height, width = self.image_size
        shared = {key: getattr(self, key) for key in MixerConfig.__dataclass_fields__}
        return MixerConfig(**(shared | {"image_size": (height // scale, width // scale)}))

    def starts_stage(self, block: int) -> bool:
        """Whether a block is the first of a stage other than the first."""
        return block > 0 and self.stage(block - 1) < self.stage(block)

    def stage(self, block: int) -> int:
        """Which stage a block is in: as many blocks in each as divide evenly, the rest in the last."""
        return min(block // (self.num_blocks // self.token_groups), self.token_groups - 1)


class BatchedMlp(nn.Module):
    """N MLPs side by side: (..., N, S) -> (..., N, S)."""

    def __init__(self, number: int, width: int, hidden_dim: int, gelu_form: Gelu) -> None:
        super().__init__()
        self.gelu_form: Gelu = gelu_form
        self.fc1_weight = nn.Parameter(torch.empty(number, hidden_dim, width))
        self.fc1_bias = nn.Parameter(torch.empty(number, hidden_dim))
        self.fc2_weight = nn.Parameter(torch.empty(number, width, hidden_dim))
        self.fc2_bias = nn.Parameter(torch.empty(number, width))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.einsum("...ns,nds->...nd", x, self.fc1_weight) + self.fc1_bias
        hidden = ACTIVATIONS[self.gelu_form].function(hidden)
        return torch.einsum("...nd,nsd->...ns", hidden, self.fc2_weight) + self.fc2_bias


class GroupedMlp(nn.Module):
    """One MLP over the tokens of G channels together, after a map of the channels if `projected`."""

    def __init__(self, config: VariantConfig, *, projected: bool) -> None:
        super().__init__()
        self.groups = config.token_groups
        self.projection = nn.Linear(config.hidden_dim, config.hidden_dim) if projected else None
        self.mlp = Mlp(config.num_patches * self.groups, config.token_mlp_dim, config.gelu)

    def forward(self, x_BCS: Tensor) -> Tensor:
        if self.projection is not None:
            x_BCS = self.projection(x_BCS.transpose(1, 2)).transpose(1, 2)
        return self.mlp(x_BCS.unflatten(1, (-1, self.groups)).flatten(2)).view_as(x_BCS)


class BlocksMlp(BatchedMlp):
    """A token MLP for each of K x K sub-images, stored as blocks: the block-diagonal matrix without its zeros."""

    def __init__(self, config: VariantConfig) -> None:
        self.grid, self.factor = config.grid, config.token_groups
        number = self.factor**2
        super().__init__(number, config.num_patches // number, config.token_mlp_dim, config.gelu)

    def forward(self, x_BCS: Tensor) -> Tensor:
        batch, channels, tokens = x_BCS.shape
        k, height, width = self.factor, self.grid[0] // self.factor, self.grid[1] // self.factor
        parts = x_BCS.reshape(batch, channels, k, height, k, width).transpose(3, 4)
        mixed = super().forward(parts.reshape(batch, channels, k * k, height * width))
        return (
            mixed.reshape(batch, channels, k, k, height, width)
            .transpose(3, 4)
            .reshape(batch, channels, tokens)
        )


def block_order(grid: tuple[int, int], factor: int) -> Tensor:
    """(K * K, S): for each sub-image of a grid in raster order, the numbers of its tokens."""
    height, width = grid[0] // factor, grid[1] // factor
    numbers = torch.arange(grid[0] * grid[1], device="cpu").reshape(factor, height, factor, width)
    return numbers.transpose(1, 2).reshape(factor**2, height * width)


class ShrinkingBlock(MixerBlock):
    """The first block of a later stage: tokens (B, S, C) of a grid to a quarter of them."""

    def __init__(self, config: MixerConfig, drop_prob: float) -> None:
        super().__init__(config, drop_prob)
        self.grid = config.grid
        mlp = Mlp(config.num_patches, config.token_mlp_dim, config.gelu)
        mlp.fc2 = nn.Linear(config.token_mlp_dim, config.num_patches // 4)
        self.token_mixing = mlp

    def forward(self, x_BSC: Tensor, mask_BS: Tensor | None = None) -> Tensor:
        if mask_BS is not None:
            raise UsageError("a block that merges tokens takes no mask", where="model")
        skip = F.avg_pool2d(x_BSC.transpose(1, 2).unflatten(2, self.grid), 2).flatten(2).transpose(1, 2)
        mixed = self.token_mixing(self.token_norm(x_BSC).transpose(1, 2)).transpose(1, 2)
        x_BSC = skip + self.drop(mixed)
        return x_BSC + self.drop(self.channel_mixing(self.channel_norm(x_BSC)))


class VariantMixer(Mixer):
    """A Mixer that mixes tokens as `config.token_mixing` says: images (B, in_channels, H, W) to logits (B, K)."""

    config: VariantConfig

    def __init__(self, config: VariantConfig) -> None:
        super().__init__(config)

    def make_block(self, index: int, drop_prob: float) -> nn.Module:
        config = self.config
        if config.token_mixing == "shrinking":
            kind = ShrinkingBlock if config.starts_stage(index) else MixerBlock
            return kind(config.of_block(index), drop_prob)
        block = MixerBlock(config, drop_prob)
        if config.token_mixing == "blocks":
            block.token_mixing = BlocksMlp(config)
        elif config.token_mixing == "untied":
            block.token_mixing = BatchedMlp(
                config.hidden_dim, config.num_patches, config.token_mlp_dim, config.gelu
            )
        else:
            block.token_mixing = GroupedMlp(config, projected=config.token_mixing == "projected")
        return block

    @torch.no_grad()
    def init_weights(self) -> None:
        """The Mixer's initialisation; each of several MLPs side by side as if it were alone."""
        super().init_weights()
        for module in self.modules():
            if isinstance(module, BatchedMlp):
                for weight in (module.fc1_weight, module.fc2_weight):
                    init_lecun_normal(weight.flatten(0, 1))
                module.fc2_weight.mul_(self.config.branch_init_scale)
                nn.init.zeros_(module.fc1_bias)
                nn.init.zeros_(module.fc2_bias)
