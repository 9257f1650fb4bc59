"""The door of the CPU engine: a model for inference, as fast as mixlab computes it."""

import warnings

import torch
from torch import nn

from mixlab.cpu.inference import copied
from mixlab.cpu.passes import why_not
from mixlab.device import multiplies_bf16
from mixlab.errors import UsageError, check_type

PRECISIONS = ("fp32", "bf16")


def accelerate(model: nn.Module, precision: str = "fp32") -> nn.Module:
    """A copy of `model` for inference on a CPU that gives the same logits (within 1e-4), several times faster.

    model: any; there is a copy of plain Mixers and of pyramids, in float32 on the CPU. It takes images
    (B, in_channels, H, W), float32, and gives logits (B, K); it has no parameters, keeps no gradients, is always in
    its mode for inference and cannot be pickled; later changes to `model` do not reach it. Where there is none, a
    UserWarning says why and `model` itself comes back.
    precision: `fp32`, or `bf16` for activations and products in bfloat16, where the processor multiplies it itself
    (logits then differ by about 1 in 100); where it does not, a UserWarning says so and the copy is in fp32.
    UsageError for any other precision, UsageTypeError for what is no model.
    """
    check_type(model, (nn.Module,), "model", "a model, such as mixlab.create_model gives")
    if precision not in PRECISIONS:
        raise UsageError(
            f"there is no precision {precision!r}",
            where="precision",
            hint=f"it is one of {', '.join(PRECISIONS)}",
        )
    if (reason := why_not(model, with_gradients=False)) is not None:
        warnings.warn(f"accelerate: torch computes this model, {reason}", stacklevel=2)
        return model
    is_bf16 = precision == "bf16"
    if is_bf16 and not multiplies_bf16():
        warnings.warn(
            "accelerate: this processor does not multiply bf16 itself, the copy is fp32", stacklevel=2
        )
        is_bf16 = False
    return copied(model, torch.bfloat16 if is_bf16 else torch.float32)
