"""From a decoded image to the model's input: the one place where size, crop, mean and std are known."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mixlab.data.images.decode import GREY16_MAX
from mixlab.data.images.permutation import PixelPermutation
from mixlab.data.modality import Preprocess, grid_places
from mixlab.errors import UsageError, WeightsError
from mixlab.records import take, take_list

Fit = Literal["crop", "stretch", "resize-crop"]
Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels
MAX_SIDE = 4096  # pixels of a model's input; what is larger would fill the memory with a few images
MAX_PATCHES = 2**16
LARGEST_MEAN, SMALLEST_STD = 1e6, 1e-6  # on the scale of pixels / 255
GREY = 128  # what hides a part
LARGE = 64  # pixels of a side, from which on half a pixel does not matter
_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@dataclass(frozen=True, kw_only=True)
class ImagePreprocess(Preprocess):
    """How any image becomes the model's input. Saved with the weights; predict and export use that one.

    image_size: (height, width) in pixels.
    channels: 3 (RGB) or 1 (grey: ITU-R 601 luma of the RGB image).
    fit: `crop` scales the image, keeping its shape, until it covers image_size / crop_fraction, and cuts
        the centre out; `stretch` scales each side on its own and cuts nothing, whatever crop_fraction is;
        `resize-crop` scales each side on its own to image_size / crop_fraction and cuts the centre out. The
        paper's "resmall-crop" and "resize-crop" are `crop` and `resize-crop` at 224 / 256.
    crop_fraction: share of the scaled image (of `crop`, of its shorter side) that is kept, in (0, 1].
    interpolation: `bicubic` or `bilinear`, antialiased.
    mean, std: per channel, on the scale of pixels / 255.
    permutation: moves the pixels of the finished input, for models that learnt on permuted images.
    grey_max: the value of 16-bit grey images that counts as white, 65535 where they use their whole range.
    """

    image_size: tuple[int, int]
    channels: int = 3
    fit: Fit = "crop"
    crop_fraction: float = 1.0
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    permutation: PixelPermutation | None = None
    grey_max: int = GREY16_MAX

    modality_name: ClassVar[str] = "images"
    graph_input: ClassVar[str] = "pixels"

    @property
    def input_size(self) -> tuple[int, int]:
        return self.image_size

    @property
    def kept_shape(self) -> tuple[int, ...]:
        return (self.channels, *self.image_size)

    def with_size(self, size: tuple[int, int]) -> "ImagePreprocess":
        return replace(self, image_size=size)

    def box(self, height: int, width: int) -> Box:
        """The part of an (height, width) image that is scaled to image_size: left, top, right, bottom."""
        if self.fit == "stretch":
            return (0.0, 0.0, float(width), float(height))
        if self.fit == "resize-crop":
            box_height, box_width = self.crop_fraction * height, self.crop_fraction * width
        else:
            target_height, target_width = self.image_size
            scale = self.crop_fraction * min(height / target_height, width / target_width)
            # min: rounding may make the box one ulp larger than the image, which Pillow refuses.
            box_height, box_width = min(target_height * scale, height), min(target_width * scale, width)
        left, top = (width - box_width) / 2, (height - box_height) / 2
        return (left, top, left + box_width, top + box_height)

    def keep(self, example: np.ndarray) -> np.ndarray:
        """uint8 (H, W, 3 or 1) -> uint8 (channels, height, width) at model size."""
        return self.cut(example, self.box(*example.shape[:2]))

    def keep_all(self, examples: np.ndarray) -> np.ndarray | None:
        """uint8 (n, H, W, channels) at model size already -> (n, channels, H, W)."""
        height, width = examples.shape[1:3]
        whole = (0.0, 0.0, float(width), float(height))
        is_model_size = (
            (height, width) == self.image_size
            and examples.shape[3] == self.channels
            and self.box(height, width) == whole
        )
        if not is_model_size:
            return None
        kept = np.empty((len(examples), *self.kept_shape), dtype=np.uint8)
        kept[:] = examples.transpose(0, 3, 1, 2)  # a view of one channel has the strides of channels last
        return kept

    def cut(self, decoded: np.ndarray, box: Box) -> np.ndarray:
        """The part `box` of `decoded`, scaled to image_size: uint8 (channels, height, width)."""
        decoded = self._match_channels(decoded)
        height, width = self.image_size
        if decoded.shape[:2] != (height, width) or box != (0.0, 0.0, float(width), float(height)):
            image = Image.fromarray(decoded[..., 0] if self.channels == 1 else decoded)
            image = image.resize((width, height), _FILTERS[self.interpolation], box=box)
            decoded = np.asarray(image).reshape(height, width, self.channels)
        return np.ascontiguousarray(decoded.transpose(2, 0, 1))

    def cut_for_training(self, decoded: np.ndarray, box: Box) -> np.ndarray:
        """As `cut`, several times faster where `box` is large: rounded to whole pixels, of which none
        outside is looked at, and otherwise the same to within 2 of 255."""
        left, top, right, bottom = (round(side) for side in box)
        if min(right - left, bottom - top) < LARGE:
            return self.cut(decoded, box)
        part = torch.tensor(self._match_channels(decoded)[top:bottom, left:right]).permute(2, 0, 1)
        # Pillow takes five times as long for the same kernel.
        scaled = F.interpolate(part[None], self.image_size, mode=self.interpolation, antialias=True)
        return scaled[0].contiguous().numpy()

    def to_input(self, kept: Tensor) -> Tensor:
        """uint8 (B, channels, H, W) -> float32 (B, channels, H, W), (x / 255 - mean) / std, then permuted."""
        scale = torch.tensor([1 / (255 * s) for s in self.std], device=kept.device)
        shift = torch.tensor([m / s for m, s in zip(self.mean, self.std, strict=True)], device=kept.device)
        image = kept.float().mul_(scale.view(-1, 1, 1)).sub_(shift.view(-1, 1, 1))
        return image if self.permutation is None else self.permutation.apply(image)

    def denormalize(self, image: Tensor) -> Tensor:
        """The inverse of `to_input`, rounded and clipped to uint8."""
        if self.permutation is not None:
            image = self.permutation.undo(image)
        mean = torch.tensor(self.mean, device=image.device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=image.device).view(-1, 1, 1)
        return ((image * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)

    def render(self, kept: Tensor) -> list[np.ndarray]:
        return list(kept.cpu().numpy().transpose(0, 2, 3, 1))

    def render_input(self, inputs: Tensor) -> list[np.ndarray]:
        # Permuted pixels stay where they are: this is what the model sees.
        return self.render(replace(self, permutation=None).denormalize(inputs))

    def facts(self) -> dict[str, Any]:
        return {
            "image_size": list(self.image_size),
            "channels": self.channels,
            "fit": self.fit,
            "crop_fraction": self.crop_fraction,
        }

    def hidden(self, kept: Tensor, parts: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Grey, before pixels are permuted: a part is one of the image."""
        pixels = kept[None].repeat_interleave(len(parts), 0)
        for one, place in zip(pixels, grid_places(self.view(kept).grid, self.image_size, parts), strict=True):
            one[place] = GREY
        return self.to_input(pixels), None

    def to_graph(self, kept: np.ndarray) -> np.ndarray:
        """(n, channels, height, width) -> (n, height, width, channels), as image libraries have them."""
        return np.ascontiguousarray(kept.transpose(0, 2, 3, 1))

    def _match_channels(self, decoded: np.ndarray) -> np.ndarray:
        if decoded.shape[2] == self.channels:
            return decoded
        if self.channels == 3:
            return np.repeat(decoded, 3, axis=2)
        return np.asarray(Image.fromarray(decoded).convert("L"))[..., None]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any], where: str = "config.json") -> "ImagePreprocess":
        """The inverse of `to_json`; WeightsError, with the place `where`, if a value is none that can be."""
        names = {field.name for field in fields(cls)}
        values = {"permutation": None, "grey_max": GREY16_MAX} | values  # older weights have neither
        if set(values) != names:
            wrong = ", ".join(sorted(set(values) ^ names))
            raise WeightsError(
                f"the stored preprocess has missing or unknown keys: {wrong[:200]}", where=where
            )
        channels = take(values, "channels", int, where, low=1, high=MAX_SIDE)
        per_channel = {
            key: take_list(values, key, float, where, low=-LARGEST_MEAN, high=LARGEST_MEAN)
            for key in ("mean", "std")
        }
        for key in ("fit", "interpolation"):
            take(values, key, str, where)
        size = take_list(values, "image_size", int, where, low=1, high=MAX_SIDE)
        permutation = take(values, "permutation", dict, where, optional=True)
        found = cls(
            image_size=size,  # its length is looked at by `check`
            channels=channels,
            fit=values["fit"],
            crop_fraction=take(values, "crop_fraction", float, where),
            interpolation=values["interpolation"],
            permutation=None if permutation is None else PixelPermutation.from_json(permutation),
            grey_max=take(values, "grey_max", int, where, low=1, high=GREY16_MAX),
            mean=per_channel["mean"],
            std=per_channel["std"],
        )
        found.check(where)
        return found

    def check(self, where: str) -> None:
        """WeightsError, with the place `where`, for values that no image can be brought to a model with."""
        sides = self.image_size
        if len(sides) != 2 or not all(1 <= side <= MAX_SIDE for side in sides):
            raise WeightsError(f"image_size is {list(sides)}, not two sides of 1 to {MAX_SIDE}", where=where)
        for key, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.channels or not all(math.isfinite(value) for value in values):
                raise WeightsError(
                    f"{key} is {list(values)[:9]}, not a finite number for each of {self.channels} channels",
                    where=where,
                )
        if not all(value >= SMALLEST_STD for value in self.std):
            raise WeightsError(f"std must be above 0, got {list(self.std)[:9]}", where=where)
        if not 0.0 < self.crop_fraction <= 1.0:
            raise WeightsError(f"crop_fraction must be in (0, 1], got {self.crop_fraction}", where=where)
        for key, value, known in (
            ("fit", self.fit, get_args(Fit)),
            ("interpolation", self.interpolation, _FILTERS),
        ):
            if value not in known:
                raise WeightsError(f"the stored preprocess has an unknown {key}: {value[:60]!r}", where=where)
        if self.permutation is not None:
            side = self.permutation.patch_size
            if self.permutation.kind != "global" and any(length % side for length in sides):
                raise WeightsError(f"image_size {list(sides)} has no whole patches of {side}", where=where)
            if self.permutation.kind == "per_patch" and sides[0] * sides[1] // side**2 > MAX_PATCHES:
                raise WeightsError(f"it permutes more than {MAX_PATCHES} patches one by one", where=where)


def for_images(preprocess: Preprocess, what: str, where: str | None = None) -> ImagePreprocess:
    """`preprocess`, if it takes images; else UsageError that `what` is for images only."""
    if not isinstance(preprocess, ImagePreprocess):
        raise UsageError(
            f"{what} is for images, and these weights take {preprocess.modality.many}", where=where
        )
    return preprocess
