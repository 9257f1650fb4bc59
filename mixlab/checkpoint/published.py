"""The released Mixer weights, as a table: what there is, where, and what is known of it. Two are in the package."""

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mixlab.errors import UsageError
from mixlab.models.layers import Gelu

OFFICIAL_URL = "https://storage.googleapis.com/mixer_models"
SHIPPED = (
    Path(__file__).parent / "shipped"
)  # a weights folder, with its model card, for each entry without an address
NOT_VERIFIED = "not downloaded or run by mixlab's authors: facts are the publishers'"


@dataclass(frozen=True, kw_only=True)
class Published:
    """One released file (or timm folder) of Mixer weights.

    name: MODEL:TAG, or timm/NAME. url: of the file; for timm's, the name of the Hub repository; empty for a folder of
    SHIPPED. size_mib: of the file, two digits for the official ones. top1: on `data`, per cent, as its source
    reports it, or None. sha256: of the file (for timm's, of model.safetensors), where its publisher or somebody who
    had it from him has stated it; for none of these so far, so that each is called unverified when it is used.
    """

    name: str
    model: str
    url: str
    size_mib: float
    num_classes: int
    gelu: Gelu
    provenance: str
    top1: float | None = None
    data: str = "ImageNet"
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    crop_fraction: float = 0.875
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    not_verified: str = NOT_VERIFIED
    sha256: str | None = None

    @property
    def input_range(self) -> str:
        """What black and white become before the stem, the same for every channel."""
        low, high = (0 - self.mean[0]) / self.std[0], (1 - self.mean[0]) / self.std[0]
        return f"[{low:g}, {high:g}]"

    @property
    def is_hub(self) -> bool:
        return self.name.startswith("timm/")

    @property
    def is_shipped(self) -> bool:
        return not self.url


def _official(
    folder: str, size: str, mib: float, provenance: str, *, classes: int = 1000, **facts: Any
) -> Published:
    file = f"Mixer-{size[0].upper()}_{size[1:]}.npz"
    return Published(
        name=f"mixer_{size}:{folder}",
        model=f"mixer_{size}",
        url=f"{OFFICIAL_URL}/{folder}/{file}",
        size_mib=mib,
        num_classes=classes,
        gelu="tanh",
        provenance=provenance,
        **facts,
    )


def _timm(
    tag: str, model: str, mib: float, provenance: str, *, classes: int = 1000, **facts: Any
) -> Published:
    name = f"timm/{tag}"
    return Published(
        name=name,
        model=model,
        url=name,
        size_mib=mib,
        num_classes=classes,
        gelu="erf",
        provenance=provenance,
        **facts,
    )


def _shipped(name: str, model: str, mib: float, top1: float) -> Published:
    return Published(
        name=name,
        model=model,
        url="",
        size_mib=mib,
        num_classes=10,
        gelu="erf",
        provenance="mixlab's own, float16, in the package",
        top1=top1,
        data="CIFAR-10",
        crop_fraction=1.0,
        not_verified="",
    )


_I1K = "the authors', trained on ImageNet-1k from scratch"
_I21K = "the authors', trained on ImageNet-21k"
_SAM = "the authors' group, ImageNet-1k with SAM; its keys were not seen by us"
_GSAM = "the authors' group, ImageNet-1k with GSAM; its keys were not seen by us"
_NO_21K = "a paper author says that this is the ImageNet-1k-only model, whatever its name says"
_MIIL: dict[str, Any] = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "interpolation": "bilinear"}
PUBLISHED = {
    published.name: published
    for published in (
        _shipped("mixer_cifar:cifar10", "mixer_mini4", 0.59, 86.58),
        _shipped("mixer_pyramid_cifar:cifar10", "mixer_pyramid_mini2", 1.31, 89.18),
        _official("imagenet1k", "b16", 228.47, _I1K, top1=76.44),
        _official("imagenet1k", "l16", 794.29, _I1K, top1=71.76),
        _official("imagenet21k", "b16", 289.61, _I21K, classes=21843),
        _official("imagenet21k", "l16", 875.78, _I21K, classes=21843),
        _official("sam", "b16", 228.47, _SAM),
        _official("sam", "b32", 230.04, _SAM),
        _official("gsam", "b16", 228.47, _GSAM),
        _official("gsam", "b32", 230.04, _GSAM),
        _official("gsam", "s16", 70.71, _GSAM),
        _official("gsam", "s32", 72.91, _GSAM),
        _official("gsam", "s8", 78.79, _GSAM),
        _timm("mixer_b16_224.goog_in21k_ft_in1k", "mixer_b16", 228.4, _NO_21K + " (timm#651)", top1=76.616),
        _timm(
            "mixer_l16_224.goog_in21k_ft_in1k", "mixer_l16", 794.2,
            "probably the ImageNet-1k-only model, as its accuracy is that one's, whatever its name says", top1=72.084,
        ),
        _timm("mixer_b16_224.goog_in21k", "mixer_b16", 289.6, _I21K + ", converted by timm", classes=21843),
        _timm("mixer_l16_224.goog_in21k", "mixer_l16", 875.7, _I21K + ", converted by timm", classes=21843),
        _timm("mixer_b16_224.miil_in21k", "mixer_b16", 258.4, "MIIL, ImageNet-21k-P", classes=11221, **_MIIL),
        _timm(
            "mixer_b16_224.miil_in21k_ft_in1k", "mixer_b16", 228.4,
            "MIIL, ImageNet-21k-P, then ImageNet-1k", top1=82.314, **_MIIL,
        ),
    )
}  # fmt: skip


def find_published(name: str) -> Published:
    """The entry of that name; UsageError with the nearest one and what there is of that model."""
    if name in PUBLISHED:
        return PUBLISHED[name]
    same = [known for known in PUBLISHED if known.split(":")[0] == name.split(":")[0]]
    close = difflib.get_close_matches(name, PUBLISHED, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    hint += f"there are {', '.join(same)}" if same else "`mixlab models --pretrained` lists them"
    raise UsageError(f"there are no published weights {name!r}", where="pretrained", hint=hint)
