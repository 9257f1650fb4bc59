"""Training-time changes to whole batches of images; every draw is keyed by (seed, epoch, index, purpose).

Shapes: pixels uint8 (B, channels, H, W); epoch one integer; index int64 (B,), the images' numbers.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mixlab.data.images.policy import apply_policy
from mixlab.data.images.policy_tf import apply_policy_tf
from mixlab.data.random import Purpose, uniform
from mixlab.errors import UsageError
from mixlab.settings import setting

LONG = 15.0  # epochs: between a run of 10.6 without and one of 29.4 with it (LOG.md, 2026-11-27)


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """What training does to its images.

    crop: `pad` shifts by up to crop_padding pixels over a black border; `resized` cuts a random box of
        min_area to all of the image, with a side ratio of 3:4 to 4:3, and scales it; `inception` does so with the
        boxes that TensorFlow draws, as the authors did: smaller ones more often; `none`.
    flip: mirror left-right with probability 1/2; flip_alternates: by chance in the first epoch only, then every
        image in turns with itself (Jordan 2024, arXiv 2404.00498).
    policy: `randaugment` (policy_layers random operations at policy_magnitude of 10), `randaugment_tf` (the authors'
        variant of it, see data/images/policy_tf.py), `trivialaugment` (one operation at a random strength, Muller and
        Hutter 2021), or `none`; `auto`: by the length of the training, see `settled`.
    erase_prob: probability of a grey rectangle of 2 to 33 % of the image (Zhong et al. 2017).
    mixup_alpha, cutmix_alpha: Beta parameters; 0 is off; with both on, each batch draws one of the two.
    """

    crop: Literal["none", "pad", "resized", "inception"] = setting(
        "none",
        "Cuts: pad shifts over a border, resized cuts a random box, inception as TensorFlow does, none.",
        "common",
    )
    crop_padding: int = setting(4, "By how many pixels pad shifts at most.")
    min_area: float = setting(0.08, "Smallest share of an image that a box is.")
    flip: bool = setting(False, "Mirror left and right at random.", "common")
    flip_alternates: bool = setting(
        False, "Mirror at random in the first epoch only, then every image in turns.", "expert"
    )
    policy: Literal["none", "randaugment", "randaugment_tf", "trivialaugment", "auto"] = setting(
        "none", "Random changes of colour and form; auto by the length of the training.", "common"
    )
    policy_layers: int = setting(2, "Operations of RandAugment on each image.")
    policy_magnitude: float = setting(9.0, "Their strength, of 10.")
    erase_prob: float = setting(0.0, "Probability of a grey rectangle.")
    mixup_alpha: float = setting(0.0, "Mix pairs of images, Beta parameter; 0 is off.", "common")
    cutmix_alpha: float = setting(
        0.0, "Paste a rectangle of another image, Beta parameter; 0 is off.", "common"
    )

    def __post_init__(self) -> None:
        if not 0.0 < self.min_area <= 1.0:
            raise UsageError(f"min_area must be in (0, 1], got {self.min_area}", where="augment.min_area")
        if not 0.0 <= self.erase_prob <= 1.0:
            raise UsageError(
                f"erase_prob must be in [0, 1], got {self.erase_prob}", where="augment.erase_prob"
            )
        for key in ("crop_padding", "mixup_alpha", "cutmix_alpha", "policy_layers", "policy_magnitude"):
            if getattr(self, key) < 0:
                raise UsageError(
                    f"{key} cannot be negative, got {getattr(self, key)}", where=f"augment.{key}"
                )

    @property
    def cuts_boxes(self) -> bool:
        """Whether images are cut by `crop_boxes`, where they are decoded."""
        return self.crop in ("resized", "inception")


def settled(config: AugmentConfig, epochs: float) -> AugmentConfig:
    """`config` for a training of so many epochs: `auto` is no policy where images are seen only a few times.

    From LONG epochs on it is RandAugment of one layer at 5, and images are shifted by at least 4 pixels.
    """
    if config.policy != "auto":
        return config
    if epochs < LONG:
        return replace(config, policy="none")
    padding = max(config.crop_padding, 4)
    return replace(config, policy="randaugment", policy_layers=1, policy_magnitude=5.0, crop_padding=padding)


def augment(pixels: Tensor, config: AugmentConfig, *, seed: int, epoch: int, index: np.ndarray) -> Tensor:
    """uint8 (B, channels, H, W) -> the same shape, changed as `config` says.

    Boxes (`resized`, `inception`) are cut where an image is decoded (`crop_boxes`), so here they are already done.
    """
    num_images = len(pixels)
    if config.crop == "pad" and config.crop_padding:
        draws = uniform(seed, epoch, index, Purpose.CROP, 2)
        offsets = (draws * (2 * config.crop_padding + 1)).astype(np.int64)
        pixels = shift_crop(pixels, offsets, config.crop_padding)
    if config.flip:
        flipped = uniform(seed, 0 if config.flip_alternates else epoch, index, Purpose.FLIP, 1)[:, 0] < 0.5
        if config.flip_alternates and epoch % 2:
            flipped = ~flipped
        chosen = torch.from_numpy(np.flatnonzero(flipped))
        pixels = pixels.index_copy(0, chosen, pixels[chosen].flip(3))
    assert config.policy != "auto", "the length of the training decides it: settled()"
    if config.policy != "none":
        num_layers = 1 if config.policy == "trivialaugment" else config.policy_layers
        draws = uniform(seed, epoch, index, Purpose.POLICY, 3 * num_layers)
        draws = draws.reshape(num_images, num_layers, 3)
        if config.policy == "randaugment_tf":
            pixels = apply_policy_tf(pixels, draws, config.policy_magnitude)
        else:
            magnitude = config.policy_magnitude if config.policy == "randaugment" else None
            pixels = apply_policy(pixels, draws, magnitude)
    if config.erase_prob:
        pixels = erase(pixels, uniform(seed, epoch, index, Purpose.ERASE, 5), config.erase_prob)
    return pixels


def shift_crop(pixels: Tensor, offsets: np.ndarray, padding: int) -> Tensor:
    """Windows of the images in a black border: offsets int (B, 2), top and left in 0 ... 2 * padding."""
    height, width = pixels.shape[2:]
    padded = F.pad(pixels, (padding, padding, padding, padding))
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view: (B, C, 2p+1, 2p+1, H, W)
    top, left = torch.from_numpy(offsets).unbind(1)
    return windows[torch.arange(len(pixels)), :, top, left].contiguous()


def erase(pixels: Tensor, draws: np.ndarray, probability: float) -> Tensor:
    """A mid-grey rectangle in some images: draws (B, 5) for whether, area, side ratio, top, left."""
    num_images, _, height, width = pixels.shape
    area = height * width * (0.02 + 0.31 * draws[:, 1])
    ratio = np.exp(np.log(0.3) + draws[:, 2] * (np.log(3.3) - np.log(0.3)))
    box_height = np.clip(np.rint(np.sqrt(area * ratio)), 1, height)
    box_width = np.clip(np.rint(np.sqrt(area / ratio)), 1, width)
    top = np.floor(draws[:, 3] * (height - box_height + 1))
    left = np.floor(draws[:, 4] * (width - box_width + 1))
    rows, columns = np.arange(height), np.arange(width)
    in_rows = (rows >= top[:, None]) & (rows < (top + box_height)[:, None])
    in_columns = (columns >= left[:, None]) & (columns < (left + box_width)[:, None])
    hit = (draws[:, 0] < probability)[:, None, None] & in_rows[:, :, None] & in_columns[:, None, :]
    return torch.where(torch.from_numpy(hit).view(num_images, 1, height, width), 128, pixels)


def draw_crops(seed: int, epoch: int, index: np.ndarray) -> np.ndarray:
    """What decides the random resized crops of n images, whatever their sizes: (n, 4), for `crop_boxes`."""
    return uniform(seed, epoch, index, Purpose.CROP, 4)


def crop_boxes(draws: np.ndarray, heights: Any, widths: Any, config: AugmentConfig) -> np.ndarray:
    """Random resized crops of n images of these sizes: float (n, 4), left, top, right, bottom, in pixels."""
    if config.crop == "inception":
        return _inception_boxes(draws, heights, widths, config.min_area)
    area = heights * widths * (config.min_area + draws[:, 0] * (1 - config.min_area))
    ratio = np.exp((2 * draws[:, 1] - 1) * np.log(4 / 3))
    box_widths = np.minimum(np.sqrt(area * ratio), widths)
    box_heights = np.minimum(np.sqrt(area / ratio), heights)
    left = draws[:, 2] * (widths - box_widths)
    top = draws[:, 3] * (heights - box_heights)
    return np.stack([left, top, left + box_widths, top + box_heights], axis=1)


def _inception_boxes(draws: np.ndarray, heights: Any, widths: Any, min_area: float) -> np.ndarray:
    """Boxes as TensorFlow's `sample_distorted_bounding_box` draws them, in whole pixels.

    A side ratio evenly from 0.75 to 1.33, then a height evenly among those that fit: half of the boxes have less than
    30 % of the area, where `resized` draws the area evenly. No box touches the last row or column, unless it is as
    high or wide as the image, as there.
    """
    ratio = 0.75 + draws[:, 0] * (1.33 - 0.75)
    least = np.maximum(np.rint(np.sqrt(min_area * heights * widths / ratio)), 1)
    most = np.minimum(np.rint(np.sqrt(heights * widths / ratio)), heights)
    most = np.where(np.rint(most * ratio) > widths, np.floor((widths + 0.5 - 1e-7) / ratio), most)
    least = np.minimum(least, most)
    box_heights = least + np.floor(draws[:, 1] * (most - least + 1))
    box_widths = np.clip(np.rint(box_heights * ratio), 1, widths)
    left = np.floor(draws[:, 2] * (widths - box_widths))
    top = np.floor(draws[:, 3] * (heights - box_heights))
    return np.stack([left, top, left + box_widths, top + box_heights], axis=1)
