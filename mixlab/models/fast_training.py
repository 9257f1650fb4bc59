"""A Mixer's or pyramid's passes for training on a CPU: the same gradients within rounding, faster."""

from collections.abc import Iterable
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mixlab.models.fast_functions import Axial, Mixing, Product, merged, patch_rows
from mixlab.models.layers import Mlp
from mixlab.models.mixer import Mixer, MixerBlock
from mixlab.models.pyramid import AxialMixing, PyramidBlock, PyramidMixer, ShiftMlp


def has_fast_passes() -> bool:
    """Whether this torch has what the fast passes are made of."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def is_plain_kind(model: nn.Module) -> TypeGuard[Mixer]:
    """Whether `model` is a Mixer as its authors wrote it, or a pyramid, and this torch has the fast passes."""
    if type(model) not in (Mixer, PyramidMixer) or not has_fast_passes():
        return False
    kinds = (MixerBlock, PyramidBlock), (Mlp, AxialMixing), (Mlp, ShiftMlp)
    blocks: Iterable[Any] = model.blocks  # type: ignore[assignment]
    return all(
        type(part) in kind
        for block in blocks
        for part, kind in zip((block, block.token_mixing, block.channel_mixing), kinds, strict=True)
    )


def is_plain(model: nn.Module) -> TypeGuard[Mixer]:
    """Whether `model` is such a model in float32 on the CPU."""
    tensors = (p.device.type == "cpu" and p.dtype == torch.float32 for p in model.parameters())
    return is_plain_kind(model) and all(tensors)


class FastTraining(nn.Module):
    """The plain Mixer `model`, with its own parameters, computed as above.

    dtype: of activations and products; float32 or, faster where the processor multiplies it itself, bfloat16. The
    last norm and the head stay float32.
    """

    def __init__(self, model: Mixer, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def draw(self, num_images: int) -> list[Tensor | None]:
        """Which images keep each residual branch, (B, 1, 1) or None where all do, as `model` itself draws them."""
        drops: list[Any] = [block.drop for block in self.model.blocks for _ in range(2)]
        return [
            torch.rand(num_images, 1, 1) >= drop.drop_prob if drop.training and drop.drop_prob else None
            for drop in drops
        ]

    def forward(self, image_BCHW: Tensor, keep: list[Tensor | None] | None = None) -> Tensor:
        """Images (B, in_channels, H, W) to logits (B, K); keep: what `draw` gave for these images."""
        model, config = self.model, self.model.config
        model.check_size(image_BCHW)
        num_images = len(image_BCHW)
        keep = self.draw(num_images) if keep is None else keep
        x = Product.apply(
            patch_rows(image_BCHW.to(self.dtype), config.patch_size),
            model.stem.weight.flatten(1),
            model.stem.bias,
        )
        x = x.view(config.num_patches, num_images * config.hidden_dim)
        for block, *kept in zip(model.blocks, keep[::2], keep[1::2], strict=True):
            if model.checkpoint_blocks and torch.is_grad_enabled():
                # What was drawn is handed in, and the generator belongs to all threads: it is left alone.
                x = checkpoint(
                    self._block, block, x, num_images, kept, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x = self._block(block, x, num_images, kept)
        x = model.pre_head_norm(x.view(-1, num_images, config.features_dim).float())
        logits: Tensor = model.head(x.mean(dim=0))
        return logits

    def _block(self, block: Any, x: Tensor, num_images: int, keep: list[Tensor | None]) -> Tensor:
        if getattr(block, "merging", None) is not None:
            x = merged(block.merging, x, num_images)
        for branch, kept in zip((self._token_mixing, self._channel_mixing), keep, strict=True):
            if kept is None:
                x = branch(block, x, True)
            else:
                x_SBC = branch(block, x, False).view(len(x), num_images, -1) * kept.transpose(0, 1)
                x = x + x_SBC.view_as(x)
        return x

    def _token_mixing(self, block: Any, x: Tensor, add: bool) -> Tensor:
        mixing, eps = block.token_mixing, self.model.config.layer_norm_eps
        norm = block.token_norm.weight, block.token_norm.bias
        if isinstance(mixing, AxialMixing):
            return Axial.apply(x, *norm, mixing.columns.weight, mixing.rows.weight, eps, add)
        return Mixing.apply(x, *norm, *mixing.parameters(), eps, mixing.gelu_form, True, None, add)

    def _channel_mixing(self, block: Any, x: Tensor, add: bool) -> Tensor:
        mixing, eps = block.channel_mixing, self.model.config.layer_norm_eps
        norm = block.channel_norm.weight, block.channel_norm.bias
        grid = mixing.grid if isinstance(mixing, ShiftMlp) else None
        return Mixing.apply(x, *norm, *mixing.parameters(), eps, mixing.gelu_form, False, grid, add)
