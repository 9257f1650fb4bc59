"""Whether kernels compute what a model's own code says: tried once in a process, on a tiny model of the same kind.

A kernel is a second writing of a function. If only the first one were changed, numbers would differ in silence; so
both are run, and where they differ the model's own code computes.
"""

from collections.abc import Callable
from dataclasses import fields, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from mixlab.models.mixer import MixerConfig
from mixlab.threads import seeded

# Of logits and gradients of about 1: rounding gives 1e-6, and the two forms of GELU differ by 1e-3.
TOLERANCE = 2e-4
ROUGH_TOLERANCE = 5e-2  # where torch may round factors to bfloat16
NUM_IMAGES, SEED = 3, 0
SMALL: dict[str, Any] = {
    "image_size": (8, 12),
    "patch_size": 2,
    "in_channels": 2,
    "num_classes": 3,
    "num_blocks": 2,
    "hidden_dim": 6,
    "token_mlp_dim": 5,
    "channel_mlp_dim": 10,
    "stochastic_depth": 0.5,
    "head_bias": 0.0,
    "branch_init_scale": 1.0,
}


def agree(
    kind: Any,
    config: MixerConfig,
    kernels: Callable[[Any], Callable[[Tensor], Tensor]],
    *,
    with_gradients: bool,
) -> bool:
    """Whether `kernels(model)` gives the logits of a `model` of this kind, and its gradients if they are wanted.

    Kernels that cannot compute the tiny model at all do not agree.
    """
    small = dict(SMALL)
    if hasattr(config, "stage_blocks"):
        small["stage_blocks"] = (1, 1) if len(config.stage_blocks) > 1 else (2,)
    known = {field.name for field in fields(config)}
    tolerance = TOLERANCE if _is_exact() else ROUGH_TOLERANCE
    try:
        tiny = replace(config, **{key: value for key, value in small.items() if key in known})
        return _agree(kind, tiny, kernels, with_gradients, tolerance)
    except Exception:  # of code that somebody changed: whatever it is, the model's own way is still there
        return False


def _is_exact() -> bool:
    """Whether torch multiplies float32 as such here."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set by torch's newer names, of which this one cannot speak
        return False


@cache
def _agree(kind: Any, config: MixerConfig, kernels: Any, with_gradients: bool, tolerance: float) -> bool:
    # The caller may be in the middle of anything: in inference mode, on another device by default, or one of
    # several threads that draw from torch's one generator.
    with (
        seeded(SEED, restores=True),
        torch.inference_mode(False),
        torch.set_grad_enabled(with_gradients),
        torch.autocast("cpu", enabled=False),
        torch.device("cpu"),
    ):
        model: nn.Module = kind(config).float()
        for parameter in model.parameters():
            width = parameter[0].numel() if parameter.ndim > 1 else 4
            nn.init.normal_(parameter, std=width**-0.5)
        model.train(with_gradients)
        image = torch.randn(NUM_IMAGES, config.in_channels, *config.image_size, dtype=torch.float32)
        own, other = (_tried(call, model, image, with_gradients) for call in (model, kernels(model)))
    return all(_is_near(a, b, tolerance) for a, b in zip(own, other, strict=True))


def _is_near(a: Tensor | None, b: Tensor | None, tolerance: float) -> bool:
    if a is None or b is None:  # a parameter that one of them does not know
        return a is b
    return bool(((a - b).abs() <= tolerance * (1 + a.abs())).all())


def _tried(
    call: Callable[[Tensor], Tensor], model: nn.Module, image: Tensor, with_gradients: bool
) -> list[Tensor | None]:
    torch.default_generator.manual_seed(SEED)  # of stochastic depth
    logits = call(image)
    if not with_gradients:
        return [logits]
    gradients = torch.autograd.grad(logits.square().sum(), list(model.parameters()), allow_unused=True)
    return [logits.detach(), *gradients]
