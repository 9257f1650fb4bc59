"""Muon in fp32: momentum whose matrices are made nearly orthogonal before each update (Jordan et al. 2024).

torch's own Muon computes in bfloat16, which most CPUs do slowly. This one takes all matrices of one shape at
once, and bfloat16 only if wanted. Biases, norms, the stem and the head are left to AdamW, of which it is a subclass.
"""

import math
from collections import defaultdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mixlab.threads import num_sharing, shared

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the published quintic iteration
ITERATIONS = 5
WIDE = 128  # sides from which bfloat16 is the faster one where a CPU multiplies it; measured (LOG.md)
MOMENTUM = 0.95


def orthogonalize(matrices: Tensor) -> Tensor:
    """(N, rows, columns) -> the same with all singular values between about 0.7 and 1.2, by Newton-Schulz."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.transpose(1, 2) if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.transpose(1, 2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.transpose(1, 2) if tall else x


class Muon(torch.optim.AdamW):
    """AdamW, except that parameter groups with `orthogonal=True` hold matrices and follow Muon.

    Such a group's update is lr * sqrt(max(1, rows / columns)) times the orthogonalised Nesterov momentum, after
    decoupled weight decay, as in the published code. Its `wide_dtype` is what wide matrices are orthogonalised
    in, None for their own.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # A fused AdamW by itself leaves out an update that fp16's scaler found not to be finite; this one does not.
        self._step_supports_amp_scaling = False

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update of all groups."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group.get("orthogonal")]
        try:
            result = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group.get("orthogonal"):
                self._step_matrices(group)
        return result

    def _step_matrices(self, group: dict[str, Any]) -> None:
        by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is not None:
                by_shape[parameter.shape].append(parameter)
                state = self.state[parameter]
                state.setdefault("momentum", torch.zeros_like(parameter))
                state.setdefault("step", torch.zeros(()))  # AdamW looks for it in everything it loads
        pieces = [
            parameters[start :: num_sharing()]
            for parameters in by_shape.values()
            for start in range(min(num_sharing(), len(parameters)))
        ]
        pieces.sort(key=lambda piece: -len(piece) * piece[0].numel() * min(piece[0].shape))
        shared(partial(self._step_piece, group), pieces)

    @torch.no_grad()
    def _step_piece(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        """Matrices of one shape at once."""
        rows, columns = parameters[0].shape
        momenta = [self.state[parameter]["momentum"] for parameter in parameters]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        ahead = torch.lerp(torch.stack(gradients), torch.stack(momenta), MOMENTUM)
        dtype = group["wide_dtype"] if min(rows, columns) >= WIDE else None
        updates = orthogonalize(ahead.to(dtype or ahead.dtype)).to(ahead.dtype)
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        scale = group["lr"] * math.sqrt(max(1.0, rows / columns))
        torch._foreach_add_(parameters, list(updates.unbind()), alpha=-scale)
