"""RandAugment and TrivialAugment over whole batches: each image its own operations and strengths.

The operations are torchvision's (`transforms.v2.functional`), here with one strength per image, so that a
batch needs one call per operation and not one per image. Shapes: pixels uint8 (B, channels, H, W).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# RandAugment's 14 operations (Cubuk et al. 2020, Table 6). Each takes pixels and a float32 (B,) strength.
OPERATIONS = (
    "identity",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "rotate",
    "brightness",
    "color",
    "contrast",
    "sharpness",
    "posterize",
    "solarize",
    "autocontrast",
    "equalize",
)
# Largest strength of each: for RandAugment at magnitude 10, and for TrivialAugment's "wide" space.
# Shear: tangent. Translate: share of the side. Rotate: degrees. Enhancements: deviation of the factor
# from 1. Posterize: bits taken away. Solarize: how far the threshold falls from 256.
RANDAUGMENT_STRENGTH = (0, 0.3, 0.3, 0.45, 0.45, 30, 0.9, 0.9, 0.9, 0.9, 4, 256, 0, 0)
TRIVIALAUGMENT_STRENGTH = (0, 0.99, 0.99, 1.0, 1.0, 135, 0.99, 0.99, 0.99, 0.99, 6, 256, 0, 0)
TRIVIALAUGMENT_SHIFT = 32  # pixels, at most the side
UNSIGNED = {"identity", "posterize", "solarize", "autocontrast", "equalize"}


def torchvision_functional() -> Any:
    """Its functions on tensors; imported by the two operations that need it, since that takes a second."""
    from torchvision.transforms.v2 import functional

    return functional


def apply_policy(pixels: Tensor, draws: np.ndarray, magnitude: float | None) -> Tensor:
    """Apply one operation per layer: draws (B, layers, 3) choose operation, strength and sign.

    magnitude: RandAugment's, 10 being full strength; None is TrivialAugment, where the strength is drawn.
    """
    pixels = pixels.clone()
    table = np.array(TRIVIALAUGMENT_STRENGTH if magnitude is None else RANDAUGMENT_STRENGTH)
    for layer in range(draws.shape[1]):
        chosen = (draws[:, layer, 0] * len(OPERATIONS)).astype(np.int64)
        share = draws[:, layer, 1] if magnitude is None else np.full(len(draws), magnitude / 10)
        strength = share * table[chosen]
        sign = np.where(draws[:, layer, 2] < 0.5, -1.0, 1.0)
        for number in range(1, len(OPERATIONS)):
            members = np.flatnonzero(chosen == number)
            if not len(members):
                continue
            name = OPERATIONS[number]
            values = strength[members] if name in UNSIGNED else (strength * sign)[members]
            if name.startswith("translate"):
                side = pixels.shape[3] if name == "translate_x" else pixels.shape[2]
                limit = side if magnitude is not None else min(TRIVIALAUGMENT_SHIFT, side)
                values = np.trunc(values * limit)
            rows = torch.from_numpy(members)
            pixels[rows] = apply_operation(name, pixels[rows], torch.from_numpy(values).float())
    return pixels


def apply_operation(name: str, pixels: Tensor, strength: Tensor) -> Tensor:
    """One operation on uint8 (B, channels, H, W), with its own float32 (B,) strength for each image."""
    if name in _GEOMETRIC:
        return warp(pixels, _GEOMETRIC[name](strength, *pixels.shape[2:]))
    match name:
        case "brightness":
            return _blend(pixels, torch.zeros(()), strength)
        case "color":
            return _blend(pixels, _grey(pixels), strength)
        case "contrast":
            return _blend(pixels, _grey(pixels).floor().mean(dim=(1, 2, 3), keepdim=True), strength)
        case "sharpness":
            return _blend(pixels, _smooth(pixels), strength)
        case "posterize":
            mask = (256 - 2 ** strength.round().clamp(0, 8)).to(torch.uint8)
            return pixels & mask.view(-1, 1, 1, 1)
        case "solarize":
            return torch.where(pixels >= (256 - strength).view(-1, 1, 1, 1), 255 - pixels, pixels)
        case "autocontrast":
            return torchvision_functional().autocontrast(pixels)
        case "equalize":
            return torchvision_functional().equalize(pixels)
    return pixels


def _blend(pixels: Tensor, other: Tensor, deviation: Tensor) -> Tensor:
    factor = (1 + deviation).view(-1, 1, 1, 1)
    return (pixels * factor + other * (1 - factor)).clamp(0, 255).to(torch.uint8)


def _grey(pixels: Tensor) -> Tensor:
    if pixels.shape[1] == 1:
        return pixels.float()
    weights = torch.tensor([0.2989, 0.587, 0.114]).view(1, 3, 1, 1)
    return (pixels * weights).sum(dim=1, keepdim=True)


def _smooth(pixels: Tensor) -> Tensor:
    """3x3 mean with a heavier centre, borders kept as they are (PIL's SMOOTH filter)."""
    if min(pixels.shape[2:]) < 3:
        return pixels.float()
    channels = pixels.shape[1]
    kernel = torch.ones(3, 3)
    kernel[1, 1] = 5
    kernel = (kernel / 13).expand(channels, 1, 3, 3)
    smooth = pixels.float()
    smooth[:, :, 1:-1, 1:-1] = F.conv2d(pixels.float(), kernel, groups=channels).round()
    return smooth


def warp(pixels: Tensor, matrix: Tensor, fill: int = 0) -> Tensor:
    """Nearest-pixel warp, `fill` outside. matrix (B, 2, 3): from output to input position, origin centred."""
    height, width = pixels.shape[2:]
    x = torch.arange(width) - (width - 1) / 2
    y = torch.arange(height) - (height - 1) / 2
    # One operation after the other: a matrix product's last bit, which decides where a point lies half-way between
    # two pixels, would depend on how many images there are.
    a, b, c = matrix[:, None, None].unbind(dim=-1)  # (B, 1, 1, 2) each
    source = a * x[:, None] + b * y[:, None, None] + c
    grid = source / torch.tensor([width / 2, height / 2])
    # What lies outside is read as zero: hence the shift.
    shifted = pixels.float() - fill
    warped = F.grid_sample(shifted, grid, mode="nearest", padding_mode="zeros", align_corners=False)
    return (warped + fill).to(torch.uint8)


def matrix_of(rows: list[list[Tensor | float]], like: Tensor) -> Tensor:
    cells = [[torch.as_tensor(cell, dtype=like.dtype).expand_as(like) for cell in row] for row in rows]
    return torch.stack([torch.stack(row, dim=-1) for row in cells], dim=-2)


def rotation(degrees: Tensor, height: int, width: int) -> Tensor:
    cos, sin = torch.cos(torch.deg2rad(degrees)), torch.sin(torch.deg2rad(degrees))
    return matrix_of([[cos, -sin, 0.0], [sin, cos, 0.0]], degrees)


# Shears turn about the top left corner, as AutoAugment's do; hence the shift by half a side.
_GEOMETRIC: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "shear_x": lambda t, height, width: matrix_of([[1.0, t, t * height / 2], [0.0, 1.0, 0.0]], t),
    "shear_y": lambda t, height, width: matrix_of([[1.0, 0.0, 0.0], [t, 1.0, t * width / 2]], t),
    "translate_x": lambda t, height, width: matrix_of([[1.0, 0.0, -t], [0.0, 1.0, 0.0]], t),
    "translate_y": lambda t, height, width: matrix_of([[1.0, 0.0, 0.0], [0.0, 1.0, -t]], t),
    "rotate": rotation,
}
