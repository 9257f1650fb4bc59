"""From a decoded picture to the model's input: the one place where size, crop, mean and std are known."""

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mixlab.data.permutation import PixelPermutation
from mixlab.errors import WeightsError

Fit = Literal["crop", "stretch", "resize-crop"]
Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels
LARGE = 64  # pixels of a side, from which on half a pixel does not matter
_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """How any picture becomes the model's input. Saved with the weights; predict and export use that one.

    image_size: (height, width) in pixels.
    channels: 3 (RGB) or 1 (grey: ITU-R 601 luma of the RGB picture).
    fit: `crop` scales the picture, keeping its shape, until it covers image_size / crop_fraction, and cuts
        the centre out; `stretch` scales each side on its own and cuts nothing, whatever crop_fraction is;
        `resize-crop` scales each side on its own to image_size / crop_fraction and cuts the centre out. The
        paper's "resmall-crop" and "resize-crop" are `crop` and `resize-crop` at 224 / 256.
    crop_fraction: share of the scaled picture (of `crop`, of its shorter side) that is kept, in (0, 1].
    interpolation: `bicubic` or `bilinear`, antialiased.
    mean, std: per channel, on the scale of pixels / 255.
    permutation: moves the pixels of the finished input, for models that learnt on permuted pictures.
    """

    image_size: tuple[int, int]
    channels: int = 3
    fit: Fit = "crop"
    crop_fraction: float = 1.0
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    permutation: PixelPermutation | None = None

    def box(self, height: int, width: int) -> Box:
        """The part of an (height, width) picture that is scaled to image_size: left, top, right, bottom."""
        if self.fit == "stretch":
            return (0.0, 0.0, float(width), float(height))
        if self.fit == "resize-crop":
            box_height, box_width = self.crop_fraction * height, self.crop_fraction * width
        else:
            target_height, target_width = self.image_size
            scale = self.crop_fraction * min(height / target_height, width / target_width)
            # min: rounding may make the box one ulp larger than the picture, which Pillow refuses.
            box_height, box_width = min(target_height * scale, height), min(target_width * scale, width)
        left, top = (width - box_width) / 2, (height - box_height) / 2
        return (left, top, left + box_width, top + box_height)

    def pixels(self, picture: np.ndarray) -> np.ndarray:
        """uint8 (H, W, 3 or 1) -> uint8 (channels, height, width) at model size."""
        return self.cut(picture, self.box(*picture.shape[:2]))

    def cut(self, picture: np.ndarray, box: Box) -> np.ndarray:
        """The part `box` of `picture`, scaled to image_size: uint8 (channels, height, width)."""
        picture = self._match_channels(picture)
        height, width = self.image_size
        if picture.shape[:2] != (height, width) or box != (0.0, 0.0, float(width), float(height)):
            image = Image.fromarray(picture[..., 0] if self.channels == 1 else picture)
            image = image.resize((width, height), _FILTERS[self.interpolation], box=box)
            picture = np.asarray(image).reshape(height, width, self.channels)
        return np.ascontiguousarray(picture.transpose(2, 0, 1))

    def cut_for_training(self, picture: np.ndarray, box: Box) -> np.ndarray:
        """As `cut`, several times sooner where `box` is large: rounded to whole pixels, of which none
        outside is looked at, and otherwise the same to within 2 of 255."""
        left, top, right, bottom = (round(side) for side in box)
        if min(right - left, bottom - top) < LARGE:
            return self.cut(picture, box)
        part = torch.tensor(self._match_channels(picture)[top:bottom, left:right]).permute(2, 0, 1)
        # Pillow takes five times as long for the same kernel.
        scaled = F.interpolate(part[None], self.image_size, mode=self.interpolation, antialias=True)
        return scaled[0].contiguous().numpy()

    def normalize(self, pixels: Tensor) -> Tensor:
        """uint8 (B, channels, H, W) -> float32 (B, channels, H, W), (x / 255 - mean) / std, then permuted."""
        scale = torch.tensor([1 / (255 * s) for s in self.std], device=pixels.device)
        shift = torch.tensor([m / s for m, s in zip(self.mean, self.std, strict=True)], device=pixels.device)
        image = pixels.float().mul_(scale.view(-1, 1, 1)).sub_(shift.view(-1, 1, 1))
        return image if self.permutation is None else self.permutation.apply(image)

    def denormalize(self, image: Tensor) -> Tensor:
        """The inverse of `normalize`, rounded and clipped to uint8."""
        if self.permutation is not None:
            image = self.permutation.undo(image)
        mean = torch.tensor(self.mean, device=image.device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=image.device).view(-1, 1, 1)
        return ((image * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)

    def _match_channels(self, picture: np.ndarray) -> np.ndarray:
        if picture.shape[2] == self.channels:
            return picture
        if self.channels == 3:
            return np.repeat(picture, 3, axis=2)
        return np.asarray(Image.fromarray(picture).convert("L"))[..., None]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Preprocess":
        """The inverse of `to_json`; WeightsError if a key, or the fit, is missing or unknown."""
        names = {field.name for field in fields(cls)}
        values = {"permutation": None} | values
        if set(values) != names:
            wrong = ", ".join(sorted(set(values) ^ names))
            raise WeightsError(
                f"the stored preprocess has missing or unknown keys: {wrong}", where="config.json"
            )
        if values["fit"] not in get_args(Fit):
            raise WeightsError(
                f"the stored preprocess has an unknown fit: {values['fit']!r}", where="config.json"
            )
        known: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
        if known["permutation"] is not None:
            known["permutation"] = PixelPermutation.from_json(known["permutation"])
        return cls(**known)
