"""The operations of a Mixer's or pyramid's fast passes on a CPU, each with its way back written out.

The tokens of all images stand as a table X of S rows and B x C columns, so that both mixings are products of whole
matrices and nothing is ever transposed: token mixing is W2 gelu(W1 X), channel mixing takes the same memory as
S x B rows of C. oneDNN computes the products; a residual sum, or the slope of the GELU, comes in the same pass.

X may be bfloat16: products, norms and GELUs then compute in float32 and round their results, and weights are rounded
as they come in. Their gradients are those of the rounded ones.

Axes as in mixer.py: B batch, S tokens, C hidden_dim; D the hidden width of an MLP.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mixlab.cpu.products import product, product_and
from mixlab.models.layers import Activation
from mixlab.models.pyramid import Merging, shift_groups


def patch_rows(image_BCHW: Tensor, side: int) -> Tensor:
    """The patches as rows (S x B, in_channels x side x side): the first patch of every image, then the second..."""
    num_images, channels, height, width = image_BCHW.shape
    patches = image_BCHW.reshape(num_images, channels, height // side, side, width // side, side)
    return patches.permute(2, 4, 0, 1, 3, 5).reshape(-1, channels * side * side)


def _through(
    activation: Activation,
    h: Tensor,
    kept: Tensor,
    x: Tensor,
    weight: Tensor,
    grid: tuple[int, int] | None = None,
) -> Tensor:
    """The gradient of h, where `product(x, weight)` is that of its activation, shifted where there is a grid."""
    slope, backward = activation.slope, activation.backward
    if slope is not None and grid is None:
        return product_and("mul", x, weight, slope(h, kept))
    gradient = _shifted(product(x, weight), grid, back=True)
    if slope is not None:
        return gradient.mul_(slope(h, kept))
    assert backward is not None
    return backward(gradient, h)


class Product(torch.autograd.Function):
    """x (rows, in) -> (rows, out)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        weight, bias = weight.to(x.dtype), bias.to(x.dtype)
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        x_grad = product(gradient, weight.t()) if ctx.needs_input_grad[0] else None
        return x_grad, product(gradient.t(), x.t()), gradient.sum(0)


def _shifted(x: Tensor, grid: tuple[int, int] | None, *, back: bool = False) -> Tensor:
    """`shift` of a table (S x B, D) over a grid, or x itself without one.

    back: from the gradient of the shifted, that of what was shifted.
    """
    if grid is None:
        return x
    height, width = grid
    whole, front, rear = slice(None), slice(0, -1), slice(1, None)
    moves = (  # where in the grid a group goes, and whence
        (rear, whole, front, whole),
        (front, whole, rear, whole),
        (whole, rear, whole, front),
        (whole, front, whole, rear),
        (whole, whole, whole, whole),
    )
    shape = (height, width, -1, x.shape[-1])
    out, x_HWBD = torch.zeros_like(x), x.view(shape)
    out_HWBD = out.view(shape)
    for group, (to_row, to_column, row, column) in zip(shift_groups(shape[-1]), moves, strict=True):
        at, source = (to_row, to_column, whole, group), (row, column, whole, group)
        if back:
            at, source = source, at
        out_HWBD[at] = x_HWBD[source]
    return out


class Mixing(torch.autograd.Function):
    """x (S, B x C) -> x + W2 activation(W1 norm(x) + b1) + b2 over its columns (token mixing) or its rows of C.

    grid: that of the tokens, where the activation's value is shifted. add: without it, the x in front is left out.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor,
        eps: float, activation: Activation, columns: bool, grid: tuple[int, int] | None, add: bool,
    ) -> Tensor:  # fmt: skip
        w1, b1, w2, b2 = (parameter.to(x.dtype) for parameter in (w1, b1, w2, b2))
        rows = x.view(-1, len(scale))
        normed, mean, rstd = torch.native_layer_norm(rows, scale.shape, scale, shift, eps)
        if columns:
            h = product(w1, normed.view_as(x).t()).add_(b1[:, None])
        else:
            h = product(normed, w1, b1)
        # What the way back needs beside h: the shifted value, or the gate that gives it again.
        gate = activation.gate
        kept = _shifted(activation.function(h), grid) if gate is None else gate(h)
        a = kept if gate is None else _shifted(h * kept, grid)
        if columns:
            y = (product_and("add", w2, a.t(), x) if add else product(w2, a.t())).add_(b2[:, None])
        else:
            y = product_and("add", a, w2, rows, b2) if add else product(a, w2, b2)
        ctx.save_for_backward(x, normed, mean, rstd, h, kept, scale, shift, w1, w2)
        ctx.activation, ctx.columns, ctx.grid, ctx.add = activation, columns, grid, add
        return y.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, normed, mean, rstd, h, kept, scale, shift, w1, w2 = ctx.saved_tensors
        gradient = gradient.contiguous()
        activation = ctx.activation
        a = kept if activation.gate is None else _shifted(h * kept, ctx.grid)
        if ctx.columns:
            w2_grad = product(gradient, a)
            h_grad = _through(activation, h, kept, w2.t(), gradient.t())
            w1_grad = product(h_grad, normed.view_as(x))
            normed_grad = product(w1.t(), h_grad.t())
            b1_grad, b2_grad = h_grad.sum(1), gradient.sum(1)
        else:
            rows = gradient.view_as(normed)
            w2_grad = product(rows.t(), a.t())
            h_grad = _through(activation, h, kept, rows, w2.t(), ctx.grid)
            # A transposed first argument is copied: let it be the narrow one.
            w1_grad = product(normed.t(), h_grad.t()).t().contiguous()
            normed_grad = product(h_grad, w1.t())
            b1_grad, b2_grad = h_grad.sum(0), rows.sum(0)
        x_grad = _through_norm(normed_grad, x, mean, rstd, scale, shift, gradient if ctx.add else None)
        return *x_grad, w1_grad, b1_grad, w2_grad, b2_grad, *[None] * 5


def _through_norm(
    normed_grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    scale: Tensor,
    shift: Tensor,
    more: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x (like x, plus `more`), scale and shift, where normed_grad is that of the norm's result."""
    rows = x.view(-1, len(scale))
    x_grad, scale_grad, shift_grad = torch.ops.aten.native_layer_norm_backward(
        normed_grad.view_as(rows), rows, scale.shape, mean, rstd, scale, shift, [True] * 3
    )
    x_grad = x_grad.view_as(x)
    return x_grad if more is None else x_grad.add_(more), scale_grad, shift_grad


class Axial(torch.autograd.Function):
    """x (S, B x C) -> x + the maps of its norm along both axes of the grid."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        shift: Tensor,
        columns: Tensor,
        rows: Tensor,
        eps: float,
        add: bool,
    ) -> Tensor:
        height, width = len(columns), len(rows)
        columns, rows = columns.to(x.dtype), rows.to(x.dtype)
        normed, mean, rstd = torch.native_layer_norm(x.view(-1, len(scale)), scale.shape, scale, shift, eps)
        tall = normed.view(height, -1).t()
        y = product_and("add", columns, tall, x.view(height, -1)) if add else product(columns, tall)
        y = y.view(height, width, -1)
        y.baddbmm_(rows.expand(height, width, width), normed.view_as(y))
        ctx.save_for_backward(x, normed, mean, rstd, scale, shift, columns, rows)
        ctx.add = add
        return y.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, normed, mean, rstd, scale, shift, columns, rows = ctx.saved_tensors
        height, width = len(columns), len(rows)
        gradient = gradient.contiguous()
        lines = gradient.view(height, width, -1)
        normed_grad = product(columns.t(), gradient.view(height, -1).t()).view_as(lines)
        normed_grad.baddbmm_(rows.t().expand(height, width, width), lines)
        columns_grad = product(gradient.view(height, -1), normed.view(height, -1))
        rows_grad = torch.bmm(lines, normed.view_as(lines).transpose(1, 2)).sum(0)
        x_grad = _through_norm(normed_grad, x, mean, rstd, scale, shift, gradient if ctx.add else None)
        return *x_grad, columns_grad, rows_grad, None, None


def merged(merging: Merging, x: Tensor, num_images: int) -> Tensor:
    """A quarter of the tokens, twice as wide."""
    height, width = merging.grid
    x = x.view(height // 2, 2, width // 2, 2, num_images, -1).permute(0, 2, 4, 1, 3, 5)
    x = merging.norm(x.reshape(-1, len(merging.norm.weight)))
    return Product.apply(x, merging.linear.weight, merging.linear.bias).view(height * width // 4, -1)
