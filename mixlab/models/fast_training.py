"""A Mixer's forward and backward pass for training on a CPU: the same gradients within rounding, sooner.

The tokens of all images stand as a table X of S rows and B x C columns, so that both mixings are products of whole
matrices and nothing is ever transposed: token mixing is W2 gelu(W1 X), channel mixing takes the same memory as
S x B rows of C. oneDNN computes the products; a residual sum, or the slope of the GELU, comes in the same pass.

Axes as in mixer.py: B batch, S tokens, C hidden_dim; D the hidden width of an MLP.
"""

from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from mixlab.models.layers import Gelu, Mlp, gelu_gate, gelu_slope
from mixlab.models.mixer import Mixer, MixerBlock


def has_fast_passes() -> bool:
    """Whether this torch has what the fast passes are made of."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def is_plain_kind(model: nn.Module) -> TypeGuard[Mixer]:
    """Whether `model` is a Mixer as its authors wrote it, no variant, and this torch has the fast passes."""
    if type(model) is not Mixer or not has_fast_passes():
        return False
    return all(type(block) is MixerBlock and type(block.token_mixing) is Mlp for block in model.blocks)


def is_plain(model: nn.Module) -> TypeGuard[Mixer]:
    """Whether `model` is such a Mixer in float32 on the CPU."""
    tensors = (p.device.type == "cpu" and p.dtype == torch.float32 for p in model.parameters())
    return is_plain_kind(model) and all(tensors)


def patch_rows(image_BCHW: Tensor, side: int) -> Tensor:
    """The patches as rows (S x B, in_channels x side x side): the first patch of every image, then the second..."""
    num_images, channels, height, width = image_BCHW.shape
    patches = image_BCHW.reshape(num_images, channels, height // side, side, width // side, side)
    return patches.permute(2, 4, 0, 1, 3, 5).reshape(-1, channels * side * side)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (rows, in) times the transpose of weight (out, in), plus bias (out,): (rows, out), by oneDNN.

    Both may be transposed views. It is what torch's compiler calls; there is no public name for it.
    """
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def product_and(kind: str, x: Tensor, weight: Tensor, other: Tensor, bias: Tensor | None = None) -> Tensor:
    """`product`, and `other` (rows, out) added to it or multiplied by it (kind add, mul) in the same pass."""
    return torch.ops.mkldnn._linear_pointwise.binary(x, other, weight, bias, kind)


def _gelu(h: Tensor, form: Gelu) -> tuple[Tensor, Tensor]:
    """GELU of h, and what to keep for the way back: the gate of the tanh form, the result of the exact one."""
    if form == "erf":
        a = F.gelu(h)
        return a, a
    gate = gelu_gate(h)
    return h * gate, gate


def _gelu_again(h: Tensor, kept: Tensor, form: Gelu) -> Tensor:
    return kept if form == "erf" else h * kept


def _through_gelu(h: Tensor, kept: Tensor, form: Gelu, x: Tensor, weight: Tensor) -> Tensor:
    """The gradient of h, where `product(x, weight)` is that of its GELU."""
    if form == "erf":
        return torch.ops.aten.gelu_backward(product(x, weight), h)
    return product_and("mul", x, weight, gelu_slope(h, kept))


class _Mixing(torch.autograd.Function):
    """x (S, B x C) -> x + W2 gelu(W1 norm(x) + b1) + b2 over its columns (token mixing) or its rows of C.

    add: without it, the x in front is left out.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor,
        eps: float, form: Gelu, columns: bool, add: bool,
    ) -> Tensor:  # fmt: skip
        rows = x.view(-1, len(scale))
        normed, mean, rstd = torch.native_layer_norm(rows, scale.shape, scale, shift, eps)
        if columns:
            h = product(w1, normed.view_as(x).t()).add_(b1[:, None])
        else:
            h = product(normed, w1, b1)
        a, kept = _gelu(h, form)
        if columns:
            y = (product_and("add", w2, a.t(), x) if add else product(w2, a.t())).add_(b2[:, None])
        else:
            y = product_and("add", a, w2, rows, b2) if add else product(a, w2, b2)
        ctx.save_for_backward(x, normed, mean, rstd, h, kept, scale, shift, w1, w2)
        ctx.form, ctx.columns, ctx.add = form, columns, add
        return y.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, normed, mean, rstd, h, kept, scale, shift, w1, w2 = ctx.saved_tensors
        gradient = gradient.contiguous()
        a = _gelu_again(h, kept, ctx.form)
        if ctx.columns:
            w2_grad = product(gradient, a)
            h_grad = _through_gelu(h, kept, ctx.form, w2.t(), gradient.t())
            w1_grad = product(h_grad, normed.view_as(x))
            normed_grad = product(w1.t(), h_grad.t())
            b1_grad, b2_grad = h_grad.sum(1), gradient.sum(1)
        else:
            rows = gradient.view_as(normed)
            w2_grad = product(rows.t(), a.t())
            h_grad = _through_gelu(h, kept, ctx.form, rows, w2.t())
            # A transposed first argument is copied: let it be the narrow one.
            w1_grad = product(normed.t(), h_grad.t()).t().contiguous()
            normed_grad = product(h_grad, w1.t())
            b1_grad, b2_grad = h_grad.sum(0), rows.sum(0)
        x_grad, scale_grad, shift_grad = torch.ops.aten.native_layer_norm_backward(
            normed_grad.view_as(normed), x.view_as(normed), scale.shape, mean, rstd, scale, shift, [True] * 3
        )
        x_grad = x_grad.view_as(x)
        if ctx.add:
            x_grad = x_grad.add_(gradient)
        return x_grad, scale_grad, shift_grad, w1_grad, b1_grad, w2_grad, b2_grad, *[None] * 4


class FastTraining(nn.Module):
    """The plain Mixer `model`, with its own parameters, computed as above."""

    def __init__(self, model: Mixer) -> None:
        super().__init__()
        self.model = model

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
        x = F.linear(patch_rows(image_BCHW, config.patch_size), model.stem.weight.flatten(1), model.stem.bias)
        x = x.view(config.num_patches, num_images * config.hidden_dim)
        for block, *kept in zip(model.blocks, keep[::2], keep[1::2], strict=True):
            if model.checkpoint_blocks and torch.is_grad_enabled():
                # What was drawn is handed in, and the generator belongs to all threads: it is left alone.
                x = checkpoint(self._block, block, x, kept, use_reentrant=False, preserve_rng_state=False)
            else:
                x = self._block(block, x, kept)
        x = model.pre_head_norm(x.view(config.num_patches, num_images, config.hidden_dim))
        logits: Tensor = model.head(x.mean(dim=0))
        return logits

    def _block(self, block: Any, x: Tensor, keep: list[Tensor | None]) -> Tensor:
        config = self.model.config
        for columns, norm, mlp, kept in (
            (True, block.token_norm, block.token_mixing, keep[0]),
            (False, block.channel_norm, block.channel_mixing, keep[1]),
        ):
            y = _Mixing.apply(
                x, norm.weight, norm.bias, mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias,
                config.layer_norm_eps, config.gelu, columns, kept is None,
            )  # fmt: skip
            if kept is None:
                x = y
            else:
                branch = y.view(config.num_patches, -1, config.hidden_dim) * kept.transpose(0, 1)
                x = x + branch.view_as(x)
        return x
