"""The part of a recipe that says which data, and how it is brought to the model's size."""

from dataclasses import dataclass
from typing import Literal

from mixlab.data.images.decode import GREY16_MAX
from mixlab.data.images.preprocess import MAX_SIDE, Fit
from mixlab.errors import UsageError
from mixlab.settings import setting

MAX_WORKERS = 256


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, and how they are brought to the model's size. None follows from the data.

    source: `digits`, a folder, a CSV file, a torchvision name, `wds:FOLDER` of shards, or `hf:NAME`. data_dir: where
        torchvision's files are. streaming: read an hf: set from front to back, without a copy on the disk; its
        images are then shuffled within windows only.
    image_size: model input (height, width). channels: 3 or 1. fit, crop_fraction, interpolation, mean, std: see
        Preprocess; mean and std are 0.5 unless the weights that training starts from had others.
    in_memory: keep all pixels in memory; None does so if they take less than a quarter of the machine's.
    val_fraction: share of train held out where there is no val split (at most 5,000 images); 0 for none.
    train_fraction: share of train that is used at all, by class, before anything is held out from it.
    split_seed: seed of every automatic split. max_bad_share: largest tolerated share of unreadable files.
    num_workers: decoding processes of a streamed set; None takes one a core.
    grey_max: the value of 16-bit grey images that counts as white; None measures how many bits train uses.
    permutation: move the pixels of every image in one and the same way after augmentation (images/permutation.py;
        paper, section 3.4), which the weights remember; of patches of permutation_patch_size (None: the model's).
    """

    source: str = setting(
        "digits",
        "The data set: digits, a folder, a CSV file, a torchvision name, wds:FOLDER or hf:NAME.",
        "common",
    )
    data_dir: str | None = setting(None, "Where torchvision's files are; by default ./data.")
    image_size: tuple[int, int] | None = setting(
        None, "Size of the model's input, a side or HxW; auto follows from the data.", "common"
    )
    channels: int | None = setting(None, "1 for grey, 3 for colour; auto follows from the data.")
    fit: Fit = setting("crop", "How an image is brought to that size: cropped, squashed or padded.")
    crop_fraction: float = setting(
        1.0, "Share of the shorter side that is kept when an image is cropped for evaluation."
    )
    interpolation: Literal["bicubic", "bilinear"] = setting("bicubic", "How images are scaled.", "expert")
    mean: tuple[float, ...] | None = setting(
        None,
        "Subtracted from pixels in [0, 1]; auto is 0.5, or what the weights to start from had.",
        "expert",
    )
    std: tuple[float, ...] | None = setting(
        None, "What pixels are divided by afterwards; auto as for mean.", "expert"
    )
    in_memory: bool | None = setting(
        None, "Keep all pixels in memory; auto does so if they take less than a quarter of it."
    )
    val_fraction: float = setting(
        0.1,
        "Share of train held out where there is no val split, at most 5,000 images; 0 for none.",
        "common",
    )
    train_fraction: float = setting(1.0, "Share of train that is used at all, by class.")
    split_seed: int = setting(0, "Seed of every split that is drawn.", "expert")
    max_bad_share: float = setting(0.05, "Largest share of unreadable files that is tolerated.")
    num_workers: int | None = setting(
        None, "Processes that read images of a set that is not in memory; auto is one a core."
    )
    grey_max: int | None = setting(
        None,
        "The value of 16-bit grey that counts as white; auto measures how many bits train uses.",
        "expert",
    )
    streaming: bool = setting(False, "Read an hf: set from front to back, without a copy on the disk.")
    permutation: Literal["none", "patches_and_pixels", "per_patch", "global"] = setting(
        "none", "Move the pixels of every image in one and the same way (paper, section 3.4).", "expert"
    )
    permutation_patch_size: int | None = setting(
        None, "Side of the patches that are permuted; auto is the model's.", "expert"
    )
    permutation_seed: int = setting(0, "Seed of the permutation.", "expert")

    def __post_init__(self) -> None:
        if not 0.0 <= self.val_fraction < 1.0:
            raise UsageError(
                f"val_fraction must be in [0, 1), got {self.val_fraction}", where="data.val_fraction"
            )
        for key in ("crop_fraction", "train_fraction"):
            if not 0.0 < getattr(self, key) <= 1.0:
                raise UsageError(f"{key} must be in (0, 1], got {getattr(self, key)}", where=f"data.{key}")
        for key in ("split_seed", "num_workers", "max_bad_share", "permutation_seed"):
            value = getattr(self, key)
            if value is not None and value < 0:
                raise UsageError(f"{key} cannot be negative, got {value}", where=f"data.{key}")
        if (self.num_workers or 0) > MAX_WORKERS:
            raise UsageError(
                f"num_workers is {self.num_workers}, and more than {MAX_WORKERS} processes would only wait",
                where="data.num_workers",
                hint="one a core is enough",
            )
        if self.image_size is not None and max(self.image_size) > MAX_SIDE:
            raise UsageError(
                f"image_size is {self.image_size[0]}x{self.image_size[1]}, and no side can be above {MAX_SIDE}",
                where="data.image_size",
            )
        if self.std is not None and not all(value > 0 for value in self.std):
            raise UsageError(f"std must be above 0, got {self.std}", where="data.std")
        if self.grey_max is not None and not 1 <= self.grey_max <= GREY16_MAX:
            raise UsageError(
                f"grey_max must be 1 to {GREY16_MAX}, got {self.grey_max}", where="data.grey_max"
            )
        if self.channels is not None and not 1 <= self.channels <= MAX_SIDE:
            raise UsageError(f"channels must be 1 to {MAX_SIDE}, got {self.channels}", where="data.channels")
