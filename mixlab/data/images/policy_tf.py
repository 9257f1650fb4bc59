"""The authors' RandAugment, `randaug(layers, magnitude)` of big_vision: TensorFlow's variant, over whole batches.

It differs from the paper's and torchvision's (policy.py): 16 operations, with inversion, cutout and an added
solarization and without an identity; grey (128) where an image is moved away; strengths that are not symmetric
around no change (an enhancement has the factor 1.8 m / 10 + 0.1, a larger m posterizes less); and one strength for
all images, m of 10, beyond which it extrapolates (the Mixer's recipes have 15 and 20).

Source: big_vision, pp/archive/autoaugment.py, itself from tensorflow/tpu; the results of their functions, run in
TensorFlow, are the reference of the tests. Shapes: pixels uint8 (B, channels, H, W).
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mixlab.data.images.policy import matrix_of, rotation, torchvision_functional, warp

OPERATIONS = (
    "autocontrast",
    "equalize",
    "invert",
    "rotate",
    "posterize",
    "solarize",
    "color",
    "contrast",
    "brightness",
    "sharpness",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "cutout",
    "solarize_add",
)
FILL = 128
# At magnitude 10. Rotate: degrees. Shear: tangent. Translate: pixels of 224; cutout: half a side, of 224. Theirs are
# pixels of an image of any size; here they shrink with it, so that small images are not moved out of sight.
ROTATE, SHEAR, TRANSLATE, CUTOUT, SIDE = 30, 0.3, 100, 40, 224


def argument(name: str, magnitude: float, side: int = SIDE) -> float:
    """The strength of an operation, without its sign. side: of the image, in pixels."""
    share = magnitude / 10
    match name:
        case "rotate":
            return share * ROTATE
        case "shear_x" | "shear_y":
            return share * SHEAR
        case "translate_x" | "translate_y":
            return share * TRANSLATE * side / SIDE
        case "cutout":
            return int(share * CUTOUT * side / SIDE)
        case "posterize":  # bits that are kept
            return int(share * 4)
        case "solarize":
            # Their threshold passes through a byte: 384, at magnitude 15, is 128, and 256 and 512 are 0.
            return int(share * 256) % 256
        case "solarize_add":
            return int(share * 110)
        case "color" | "contrast" | "brightness" | "sharpness":
            return share * 1.8 + 0.1
    return 0.0  # the rest have no strength


def apply_policy_tf(pixels: Tensor, draws: np.ndarray, magnitude: float) -> Tensor:
    """Apply one operation per layer: draws (B, layers, 3) choose operation, and sign or place."""
    pixels = pixels.clone()
    for layer in range(draws.shape[1]):
        chosen = (draws[:, layer, 0] * len(OPERATIONS)).astype(np.int64)
        for number, name in enumerate(OPERATIONS):
            members = np.flatnonzero(chosen == number)
            if len(members):
                rows = torch.from_numpy(members)
                pixels[rows] = apply_operation_tf(name, pixels[rows], magnitude, draws[members, layer, 1:])
    return pixels


def apply_operation_tf(name: str, pixels: Tensor, magnitude: float, draws: np.ndarray) -> Tensor:
    """One operation on uint8 (B, channels, H, W); draws (B, 2): the first half of the second one is a minus sign."""
    height, width = pixels.shape[2:]
    side = {"translate_x": width, "translate_y": height}.get(name, min(height, width))
    value = argument(name, magnitude, side)
    match name:
        case "rotate" | "shear_x" | "shear_y" | "translate_x" | "translate_y":
            signed = torch.from_numpy(np.where(draws[:, 1] < 0.5, -value, value)).float()
            return warp(pixels, _geometric(name, signed, height, width), FILL)
        case "autocontrast":
            return torchvision_functional().autocontrast(pixels)
        case "equalize":
            return torchvision_functional().equalize(pixels)
        case "invert":
            return 255 - pixels
        case "posterize":
            shift = min(max(8 - int(value), 0), 7)
            return pixels >> shift << shift
        case "solarize":
            return torch.where(pixels < value, pixels, 255 - pixels)
        case "solarize_add":
            return torch.where(
                pixels < 128, (pixels.int() + int(value)).clamp(max=255).to(torch.uint8), pixels
            )
        case "color":
            return _blend(_grey(pixels), pixels, value)
        case "contrast":
            # Meant is the mean grey; what they compute is the number of pixels / 256, whatever the image.
            constant = float(min(height * width // 256, 255))
            return _blend(torch.full((), constant), pixels, value)
        case "brightness":
            return _blend(torch.zeros(()), pixels, value)
        case "sharpness":
            return _blend(_smooth(pixels), pixels, value)
    return _cutout(pixels, int(value), draws)


def _geometric(name: str, value: Tensor, height: int, width: int) -> Tensor:
    """Matrix (B, 2, 3) of `warp`; shears turn about the middle of the top left pixel."""
    match name:
        case "rotate":
            return rotation(value, height, width)
        case "shear_x":
            return matrix_of([[1.0, value, value * (height - 1) / 2], [0.0, 1.0, 0.0]], value)
        case "shear_y":
            return matrix_of([[1.0, 0.0, 0.0], [value, 1.0, value * (width - 1) / 2]], value)
        case "translate_x":
            return matrix_of([[1.0, 0.0, value], [0.0, 1.0, 0.0]], value)
    return matrix_of([[1.0, 0.0, 0.0], [0.0, 1.0, value]], value)


def _blend(other: Tensor, pixels: Tensor, factor: float) -> Tensor:
    return (other + factor * (pixels.float() - other)).clamp(0, 255).to(torch.uint8)


def _grey(pixels: Tensor) -> Tensor:
    """(B, 1, H, W), whole numbers, as TensorFlow rounds them."""
    if pixels.shape[1] == 1:
        return pixels.float()
    weights = torch.tensor([0.2989, 0.587, 0.114]).view(1, 3, 1, 1)
    return ((pixels / 255 * weights).sum(dim=1, keepdim=True) * 255.5).floor()


def _smooth(pixels: Tensor) -> Tensor:
    """3x3 mean with a heavier centre, cut to whole numbers; borders kept as they are."""
    smooth = pixels.float()
    if min(pixels.shape[2:]) < 3:
        return smooth
    kernel = torch.ones(3, 3)
    kernel[1, 1] = 5
    kernel = kernel.expand(pixels.shape[1], 1, 3, 3)
    inner = F.conv2d(pixels.float(), kernel, groups=pixels.shape[1])  # whole numbers: exact in any order
    smooth[:, :, 1:-1, 1:-1] = (inner / 13).floor()
    return smooth


def _cutout(pixels: Tensor, half: int, draws: np.ndarray) -> Tensor:
    """A grey square of 2 * half pixels a side around any pixel, cut off at the borders."""
    height, width = pixels.shape[2:]
    row, column = np.floor(draws * (height, width)).T[..., None]
    rows, columns = np.arange(height), np.arange(width)
    in_rows = (rows >= row - half) & (rows < row + half)
    in_columns = (columns >= column - half) & (columns < column + half)
    hit = torch.from_numpy(in_rows[:, :, None] & in_columns[:, None, :])
    return torch.where(hit[:, None], FILL, pixels)
