"""MLP-Mixer as its authors wrote it (Tolstikhin et al. 2021, arXiv 2105.01601, section 2 and Table 1).

Axes: B batch, H W image, S patches (tokens), C hidden_dim, K classes.
Token mixing (eq. 1) acts on columns of the (S, C) table, channel mixing on its rows; both are
pre-norm residual MLPs. Tokens are numbered in raster order; there are no position embeddings.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mixlab.errors import UsageError
from mixlab.models.layers import ACTIVATIONS, Gelu, Mlp, StochasticDepth, init_lecun_normal

MAX_DIMENSION, MAX_BLOCKS = 10**7, 10_000  # more would only keep the machine busy


@dataclass(frozen=True, kw_only=True)
class MixerConfig:
    """Every dimension of a Mixer, absolute.

    image_size: (height, width) in pixels, both multiples of `patch_size`.
    stochastic_depth: drop probability of the last block; block i of N has this times i / (N - 1).
    head_bias: initial value of the classifier's bias (the authors use -6.9 with the sigmoid loss).
    branch_init_scale: factor on the initial second kernel of every MLP; the authors' is 1. A small one lets
        the first steps be larger, which short trainings gain from (LOG.md, 2026-11-22).
    gelu, layer_norm_eps: the authors' are `tanh` and 1e-6; weights trained by others may need `erf` or 1e-5.
    """

    image_size: tuple[int, int]
    patch_size: int
    hidden_dim: int
    token_mlp_dim: int
    channel_mlp_dim: int
    num_blocks: int
    num_classes: int
    in_channels: int = 3
    stochastic_depth: float = 0.0
    head_bias: float = 0.0
    branch_init_scale: float = 1.0
    gelu: Gelu = "tanh"
    layer_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("patch_size", "hidden_dim", "token_mlp_dim", "channel_mlp_dim", "num_blocks"):
            if getattr(self, name) < 1:
                raise UsageError(
                    f"{name} must be at least 1, got {getattr(self, name)}", where=f"model.{name}"
                )
            if getattr(self, name) > MAX_DIMENSION or self.num_blocks > MAX_BLOCKS:
                raise UsageError(
                    f"{name} is {getattr(self, name)}, which no model has", where=f"model.{name}"
                )
        for name in ("stochastic_depth", "layer_norm_eps"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise UsageError(
                    f"{name} must be in [0, 1), got {getattr(self, name)}", where=f"model.{name}"
                )
        if self.gelu not in ACTIVATIONS:
            known = " or ".join(ACTIVATIONS)
            raise UsageError(f"gelu must be {known}, got {self.gelu!r}", where="model.gelu")
        for side in self.image_size:
            if side < self.patch_size:
                raise UsageError(
                    f"image_size {_times(self.image_size)} is smaller than one patch of {self.patch_size} pixels",
                    where="model.patch_size",
                    hint="choose a larger image_size or a smaller patch_size: the number that ends the model's name",
                )
            if rest := side % self.patch_size:
                raise UsageError(
                    f"image_size {_times(self.image_size)} is not a multiple of patch_size {self.patch_size}",
                    where="data.image_size",
                    hint=f"use {side - rest} or {side - rest + self.patch_size} instead of {side}, or another patch "
                    "size: it is the number that ends the model's name",
                )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def num_patches(self) -> int:
        """S, the number of tokens."""
        return self.grid[0] * self.grid[1]

    @property
    def features_dim(self) -> int:
        """Width of what the head sees."""
        return self.hidden_dim

    def check_size(self, image_BCHW: Tensor) -> None:
        """UsageError for images of another size."""
        height, width = image_BCHW.shape[2:]
        if (height, width) != self.image_size:
            raise UsageError(
                f"this Mixer takes images of {_times(self.image_size)} pixels, got {height}x{width}",
                hint="its token mixing is tied to that grid; preprocess the images with the model's own Preprocess",
            )

    def of_block(self, index: int) -> "MixerConfig":
        """The dimensions of a block, whose grid and widths may be its own in other families."""
        return self


def _times(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


class MixerBlock(nn.Module):
    """One layer: token mixing, then channel mixing, each on a LayerNorm's output and added back."""

    def __init__(self, config: MixerConfig, drop_prob: float) -> None:
        super().__init__()
        self.token_norm = nn.LayerNorm(config.hidden_dim, eps=config.layer_norm_eps)
        self.token_mixing: nn.Module = Mlp(config.num_patches, config.token_mlp_dim, config.gelu)
        self.channel_norm = nn.LayerNorm(config.hidden_dim, eps=config.layer_norm_eps)
        self.channel_mixing = Mlp(config.hidden_dim, config.channel_mlp_dim, config.gelu)
        self.drop = StochasticDepth(drop_prob)  # called twice: independent draws for the two branches

    def forward(self, x_BSC: Tensor, mask_BS: Tensor | None = None) -> Tensor:
        y_BSC = self.token_norm(x_BSC)
        if mask_BS is not None:
            y_BSC = y_BSC.masked_fill(~mask_BS[..., None], 0.0)  # what is no token says nothing to the others
        x_BSC = x_BSC + self.drop(self.token_mixing(y_BSC.transpose(1, 2)).transpose(1, 2))
        return x_BSC + self.drop(self.channel_mixing(self.channel_norm(x_BSC)))


class Mixer(nn.Module):
    """Images (B, in_channels, H, W) to logits (B, K)."""

    checkpoint_blocks = False  # True: less memory in training, about a third more computation

    def __init__(self, config: MixerConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = nn.Conv2d(
            config.in_channels, config.hidden_dim, kernel_size=config.patch_size, stride=config.patch_size
        )
        last = max(config.num_blocks - 1, 1)
        self.blocks = nn.ModuleList(
            self.make_block(i, config.stochastic_depth * i / last) for i in range(config.num_blocks)
        )
        self.pre_head_norm = nn.LayerNorm(config.features_dim, eps=config.layer_norm_eps)
        self.head = nn.Linear(config.features_dim, config.num_classes)
        self.init_weights()

    def make_block(self, index: int, drop_prob: float) -> nn.Module:
        """Block `index`, from (B, S, C) to (B, S, C); variants of the Mixer override this."""
        return MixerBlock(self.config, drop_prob)

    def check_size(self, image_BCHW: Tensor) -> None:
        """UsageError for images of another size than the model's."""
        self.config.check_size(image_BCHW)

    def embed(self, image_BCHW: Tensor) -> Tensor:
        """Patches as tokens (B, S, C), in raster order."""
        self.check_size(image_BCHW)
        return self.stem(image_BCHW).flatten(2).transpose(1, 2)

    def run_block(self, index: int, x_BSC: Tensor, mask_BS: Tensor | None = None) -> Tensor:
        """Block `index` on tokens; computed again in the backward pass where `checkpoint_blocks` is set."""
        given = (x_BSC,) if mask_BS is None else (x_BSC, mask_BS)
        if self.checkpoint_blocks and torch.is_grad_enabled():
            return checkpoint(self.blocks[index], *given, use_reentrant=False)
        return self.blocks[index](*given)

    def trunk(self, x_BSC: Tensor, mask_BS: Tensor | None = None) -> Tensor:
        """All blocks and the last norm, on tokens (B, S, C) of whatever kind.

        mask_BS: bool (B, S), False where a token only fills the table up: the others do not see it. None for no such
        token. UsageError where blocks merge tokens (pyramids), which take no mask.
        """
        for index in range(len(self.blocks)):
            x_BSC = self.run_block(index, x_BSC, mask_BS)
        return self.pre_head_norm(x_BSC)

    def intermediates(self, image_BCHW: Tensor) -> list[Tensor]:
        """The stem's output and every block's: num_blocks + 1 tensors (B, S, C)."""
        outputs = [self.embed(image_BCHW)]
        for index in range(len(self.blocks)):
            outputs.append(self.run_block(index, outputs[-1]))
        return outputs

    def encode(self, image_BCHW: Tensor) -> Tensor:
        """Tokens (B, S, C) after the last norm."""
        return self.trunk(self.embed(image_BCHW))

    def pool(self, x_BSC: Tensor, mask_BS: Tensor | None = None) -> Tensor:
        """The mean over tokens, (B, C); with a mask over those that it leaves, at least one of each example."""
        if mask_BS is None:
            return x_BSC.mean(dim=1)
        counted_BSC = x_BSC.masked_fill(~mask_BS[..., None], 0.0)
        return counted_BSC.sum(dim=1) / mask_BS.sum(dim=1, keepdim=True)

    def features(self, image_BCHW: Tensor) -> Tensor:
        """The head's input (B, C), called pre_logits by the authors: the mean over tokens after the last norm."""
        return self.pool(self.encode(image_BCHW))

    def forward(self, image_BCHW: Tensor) -> Tensor:
        return self.head(self.features(image_BCHW))

    def reset_head(self, num_classes: int) -> None:
        """A new head for `num_classes`: kernel zero, bias `head_bias`, as at the start of a fine-tuning."""
        self.config = replace(self.config, num_classes=num_classes)
        old = self.head.weight
        self.head = nn.Linear(old.shape[1], num_classes, device=old.device, dtype=old.dtype)
        nn.init.zeros_(self.head.weight)
        nn.init.constant_(self.head.bias, self.config.head_bias)

    @torch.no_grad()
    def init_weights(self) -> None:
        """The authors' initialisation.

        Stem and MLP kernels: lecun normal (truncated, variance 1 / fan-in). All biases zero.
        LayerNorm scale one, bias zero. Head kernel zero, head bias `head_bias`. Not the authors': the second
        kernel of each MLP is multiplied by `branch_init_scale` where that is not 1.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                init_lecun_normal(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        for module in self.modules():
            if isinstance(module, Mlp):
                module.fc2.weight.mul_(self.config.branch_init_scale)
        nn.init.zeros_(self.head.weight)
        nn.init.constant_(self.head.bias, self.config.head_bias)


# Dimensions by size. S to H are the paper's Table 1; the small ones are ours, for 8 to 64 pixel images.
# Sound is as large as KW-MLP (0.42 million for 98 frames), for a token a frame.
# Nano has the dimensions of the best known open CIFAR Mixer (omihub777's), 1.13 million parameters at /4.
#              num_blocks, hidden_dim, token_mlp_dim, channel_mlp_dim
SIZES = {
    "pico": (4, 64, 32, 128),
    "micro": (4, 96, 64, 192),
    "mini": (4, 128, 64, 256),
    "nano": (8, 128, 64, 512),
    "sound": (9, 64, 64, 256),
    "s": (8, 512, 256, 2048),
    "b": (12, 768, 384, 3072),
    "l": (24, 1024, 512, 4096),
    "h": (32, 1280, 640, 5120),
}
