"""Fixed permutations of an image's pixels, the same for every image, as in the paper's section 3.4."""

from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mixlab.data.random import Purpose, uniform
from mixlab.errors import UsageError, WeightsError
from mixlab.records import take

KINDS = ("patches_and_pixels", "per_patch", "global")


@dataclass(frozen=True, kw_only=True)
class PixelPermutation:
    """A permutation that follows from the seed and the image's size alone; channels stay together.

    kind: `patches_and_pixels` moves the patches, and the pixels inside every patch in the same way; `per_patch`
        moves the pixels of each patch in a way of its own; `global` moves all pixels.
    patch_size: side of the patches in pixels (not used by `global`).
    """

    kind: Literal["patches_and_pixels", "per_patch", "global"]
    patch_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(
                f"there is no permutation {self.kind!r}",
                where="kind",
                hint=f"it is one of {', '.join(KINDS)}",
            )
        if self.patch_size < 1:
            raise UsageError(f"patch_size must be at least 1, got {self.patch_size}", where="patch_size")

    def patch_order(self, image_size: tuple[int, int]) -> np.ndarray:
        """int64 (S,): patch i of the permuted image is patch order[i] of the original (raster numbers)."""
        rows, columns = self._grid(image_size)
        if self.kind != "patches_and_pixels":
            return np.arange(rows * columns)
        return self._order(rows * columns, 0)

    def pixel_order(self) -> np.ndarray:
        """int64 (P * P,): pixel i of a permuted patch is pixel order[i] of the original patch."""
        return self._order(self.patch_size**2, 1)

    def index(self, image_size: tuple[int, int]) -> np.ndarray:
        """int64 (H * W,): pixel i of the permuted image is pixel index[i] of the original."""
        height, width = image_size
        if self.kind == "global":
            return self._order(height * width, 2)
        rows, columns = self._grid(image_size)
        side = self.patch_size
        number = np.arange(height * width).reshape(rows, side, columns, side).transpose(0, 2, 1, 3)
        patches = number.reshape(rows * columns, side * side)
        if self.kind == "patches_and_pixels":
            patches = patches[self.patch_order(image_size)][:, self.pixel_order()]
        else:
            orders = np.stack([self._order(side**2, 3 + patch) for patch in range(len(patches))])
            patches = np.take_along_axis(patches, orders, axis=1)
        return patches.reshape(rows, columns, side, side).transpose(0, 2, 1, 3).reshape(-1)

    def apply(self, image: Tensor) -> Tensor:
        """(B, C, H, W) with its pixels moved."""
        return self._take(image, inverse=False)

    def undo(self, image: Tensor) -> Tensor:
        """The inverse of `apply`."""
        return self._take(image, inverse=True)

    def _take(self, image: Tensor, *, inverse: bool) -> Tensor:
        index = torch.from_numpy(_index(self, tuple(image.shape[2:]), inverse)).to(image.device)
        return image.flatten(2)[:, :, index].view(image.shape)

    def _grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        height, width = image_size
        if height % self.patch_size or width % self.patch_size:
            raise UsageError(
                f"an image of {height}x{width} has no whole patches of {self.patch_size} pixels",
                where="patch_size",
            )
        return height // self.patch_size, width // self.patch_size

    def _order(self, size: int, number: int) -> np.ndarray:
        draws = uniform(self.seed, number, np.arange(size), Purpose.PERMUTATION, 1)[:, 0]
        return np.argsort(draws, kind="stable")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Any) -> "PixelPermutation":
        """The inverse of `to_json`; WeightsError if it is none."""
        where = "config.json, permutation"
        kind = take(values, "kind", str, where)
        side = take(values, "patch_size", int, where, low=1, high=2**16)
        seed = take(values, "seed", int, where, low=0, high=2**63 - 1)
        try:
            return cls(kind=kind, patch_size=side, seed=seed)
        except UsageError as error:
            raise WeightsError(f"the stored permutation is none: {error}", where=where) from error


@lru_cache(maxsize=8)
def _index(permutation: PixelPermutation, image_size: tuple[int, ...], inverse: bool) -> np.ndarray:
    index = permutation.index((image_size[0], image_size[1]))
    return np.argsort(index) if inverse else index
