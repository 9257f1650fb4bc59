"""Products of matrices on a CPU, with what follows them in the same pass.

oneDNN's operations are what torch's compiler calls; torch has no public name for them. They are looked up here, once,
and where this torch has none of them its public operations compute the same in two passes.
"""

from typing import Any

import torch
from torch import Tensor

from mixlab.models.layers import Activation


def _operation(name: str, kind: str = "default") -> Any:
    """One of oneDNN's operations in this torch, or None."""
    if not torch.backends.mkldnn.is_available():
        return None
    return getattr(getattr(torch.ops.mkldnn, name, None), kind, None)


# Where a processor has no AVX-512, MKL's products are the faster ones, measured (LOG.md, 2026-11-26).
_BY_MKL = torch.backends.mkl.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX2"
_LINEAR = _operation("_linear_pointwise")
_LINEAR_AND = _operation("_linear_pointwise", "binary")
_PACKED = _operation("_reorder_linear_weight")
HAS_ONEDNN = _LINEAR is not None and _LINEAR_AND is not None
IS_FUSED = HAS_ONEDNN and not _BY_MKL


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (rows, in) times the transpose of weight (out, in), plus bias (out,): (rows, out).

    Both may be transposed views, and weight may be what `packed` gave.
    """
    if not IS_FUSED:
        return torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())
    found: Tensor = _LINEAR(x, weight, bias, "none", [], "")
    return found


def product_by_onednn(x: Tensor, weight: Tensor) -> Tensor:
    """`product` without a bias by oneDNN wherever this torch has it, also where another library is the faster one."""
    if not HAS_ONEDNN:
        return product(x, weight)
    found: Tensor = _LINEAR(x, weight, None, "none", [], "")
    return found


def product_and(kind: str, x: Tensor, weight: Tensor, other: Tensor, bias: Tensor | None = None) -> Tensor:
    """`product`, and `other` (rows, out) added to it or multiplied by it (kind add, mul) in the same pass."""
    if IS_FUSED:
        found: Tensor = _LINEAR_AND(x, other, weight, bias, kind)
        return found
    if kind == "mul":
        return product(x, weight, bias).mul_(other)
    result = torch.addmm(other, x, weight.t())
    return result if bias is None else result.add_(bias)


def product_then(activation: Activation, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The activation of `product`, in the same pass where oneDNN has it."""
    if IS_FUSED and activation.fused is not None:
        kind, algorithm = activation.fused
        found: Tensor = _LINEAR(x, weight, bias, kind, [], algorithm)
        return found
    h = product(x, weight, bias)
    return activation.function(h) if activation.gate is None else h.mul_(activation.gate(h))


def packed(weight: Tensor, rows: int) -> Tensor:
    """A weight for `product` as oneDNN reads it fastest, for an x of about so many rows."""
    if not IS_FUSED or _PACKED is None:
        return weight
    found: Tensor = _PACKED(weight, rows)
    return found
