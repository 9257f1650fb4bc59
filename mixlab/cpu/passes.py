"""A Mixer's or pyramid's passes for training on a CPU: the same gradients within rounding, faster."""

from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mixlab.cpu.agreement import agree
from mixlab.cpu.functions import Axial, Mixing, Product, merged, patch_rows
from mixlab.models.layers import ACTIVATIONS, Mlp, StochasticDepth
from mixlab.models.mixer import Mixer, MixerBlock
from mixlab.models.pyramid import AxialMixing, Merging, PyramidBlock, PyramidMixer, ShiftMlp


def _of(norm: nn.LayerNorm, mixing: Any) -> tuple[Tensor, ...]:
    fc1, fc2 = mixing.fc1, mixing.fc2
    return norm.weight, norm.bias, fc1.weight, fc1.bias, fc2.weight, fc2.bias


def _columns(norm: nn.LayerNorm, mixing: Any, x: Tensor, add: bool) -> Tensor:
    return Mixing.apply(x, *_of(norm, mixing), norm.eps, ACTIVATIONS[mixing.gelu_form], True, None, add)


def _rows(norm: nn.LayerNorm, mixing: Any, x: Tensor, add: bool) -> Tensor:
    grid = getattr(mixing, "grid", None)
    return Mixing.apply(x, *_of(norm, mixing), norm.eps, ACTIVATIONS[mixing.gelu_form], False, grid, add)


def _axial(norm: nn.LayerNorm, mixing: Any, x: Tensor, add: bool) -> Tensor:
    return Axial.apply(x, norm.weight, norm.bias, mixing.columns.weight, mixing.rows.weight, norm.eps, add)


# Kinds of models, blocks and modules, exactly these, and what computes a branch of a block: from the table x
# (S, B x C) to the branch's, with x in front if `add`. A kind that stands in none of them is computed by torch.
Kernel = Callable[[nn.LayerNorm, Any, Tensor, bool], Tensor]
MODELS: tuple[type[nn.Module], ...] = (Mixer, PyramidMixer)
BLOCKS: tuple[type[nn.Module], ...] = (MixerBlock, PyramidBlock)
TOKEN_MIXING: dict[type[nn.Module], Kernel] = {Mlp: _columns, AxialMixing: _axial}
CHANNEL_MIXING: dict[type[nn.Module], Kernel] = {Mlp: _rows, ShiftMlp: _rows}


PARTS: dict[str, type[nn.Module]] = {  # of a model or a block, by name, where it has such a part
    "stem": nn.Conv2d,
    "pre_head_norm": nn.LayerNorm,
    "head": nn.Linear,
    "token_norm": nn.LayerNorm,
    "channel_norm": nn.LayerNorm,
    "drop": StochasticDepth,
    "merging": Merging,
    "fc1": nn.Linear,
    "fc2": nn.Linear,
    "norm": nn.LayerNorm,
    "linear": nn.Linear,
    "columns": nn.Linear,
    "rows": nn.Linear,
}


def why_not_kind(model: nn.Module, *, with_gradients: bool = True) -> str | None:
    """Why the passes cannot compute a model of this kind, as a part of a sentence; None where they can.

    with_gradients: to train it too.
    """
    if type(model) not in MODELS:
        return f"there are no kernels for a {type(model).__name__}"
    parts: Any = model
    for block in parts.blocks:
        for part, known in (
            (block, BLOCKS),
            (block.token_mixing, TOKEN_MIXING),
            (block.channel_mixing, CHANNEL_MIXING),
        ):
            if type(part) not in known:
                return f"there are no kernels for its {type(part).__name__}"
    if (reason := _why_not_parts(model)) is not None:
        return reason
    if not ACTIVATIONS[parts.config.gelu].has_kernel:
        return f"there is no kernel for its activation {parts.config.gelu}"
    if not agree(type(model), parts.config, Passes, with_gradients=with_gradients):
        return "its code computes another function than the kernels"
    return None


def _why_not_parts(model: Any) -> str | None:
    """Why not, if somebody has changed parts of this very model."""
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            return f"there is a hook on its {name or 'forward pass'}"
        kind = PARTS.get(name.rpartition(".")[2])
        if kind is not None and type(module) is not kind:
            return f"its {name} is a {type(module).__name__}"
        is_map = isinstance(module, nn.Linear | nn.Conv2d) and not name.endswith(("columns", "rows"))
        if is_map and module.bias is None:
            return f"its {name} has no bias"
    side = (model.config.patch_size,) * 2
    stem, patches = model.stem, (side, side, (0, 0), (1, 1), 1)
    if (stem.kernel_size, stem.stride, stem.padding, stem.dilation, stem.groups) != patches:
        return "its stem is no cut into patches"
    return None


def why_not(model: nn.Module, *, with_gradients: bool = True) -> str | None:
    """The same for this very model, with the numbers and the device that it has."""
    for parameter in model.parameters():
        if parameter.device.type != "cpu":
            return f"it is on {parameter.device.type}, not on the CPU"
        if parameter.dtype != torch.float32:
            return f"its numbers are {str(parameter.dtype).removeprefix('torch.')}, not float32"
    return why_not_kind(model, with_gradients=with_gradients)


def is_plain_kind(model: nn.Module) -> TypeGuard[Mixer]:
    """Whether the passes can compute models of this kind."""
    return why_not_kind(model) is None


def is_plain(model: nn.Module) -> TypeGuard[Mixer]:
    """Whether the passes can compute `model` as it is."""
    return why_not(model) is None


class Passes(nn.Module):
    """The Mixer or pyramid `model`, with its own parameters, computed as above.

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
            torch.rand(num_images, 1, 1, device="cpu") >= drop.drop_prob
            if drop.training and drop.drop_prob
            else None
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
        branches = (
            (TOKEN_MIXING[type(block.token_mixing)], block.token_norm, block.token_mixing),
            (CHANNEL_MIXING[type(block.channel_mixing)], block.channel_norm, block.channel_mixing),
        )
        for (kernel, norm, mixing), kept in zip(branches, keep, strict=True):
            if kept is None:
                x = kernel(norm, mixing, x, True)
            else:
                x_SBC = kernel(norm, mixing, x, False).view(len(x), num_images, -1) * kept.transpose(0, 1)
                x = x + x_SBC.view_as(x)
        return x
