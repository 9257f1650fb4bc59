"""Images as a modality: any image file to RGB pixels, to the model's size, to its input, and back to look at."""

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mixlab.data.images.augment import AugmentConfig, augment, crop_boxes, draw_crops, settled
from mixlab.data.images.decode import (
    GREY16_MAX,
    Reduction,
    decode,
    decode_deep,
    decode_opened,
    describe,
    grey_range,
)
from mixlab.data.images.formats import IMAGE_SUFFIXES, image_format
from mixlab.data.images.near import near_hash
from mixlab.data.images.permutation import PixelPermutation
from mixlab.data.images.preprocess import Box, ImagePreprocess
from mixlab.data.images.samples import sample_images
from mixlab.data.modality import BadFile, Look, Modality, Needs, Preprocess, Program, array_digest
from mixlab.data.reading import Examples
from mixlab.errors import ExampleError, UsageError

PHOTO_SIDE = 64  # model size for images of many sizes: what two cores can train on in minutes
SAMPLE_SIZE = 64  # images looked at to learn the most common size
_SUFFIX_OF_FORMAT = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif"}  # of others it is the name itself
_RAW_SUFFIXES = (".cr2", ".cr3", ".nef", ".arw", ".dng", ".raf", ".orf", ".rw2")


class Images(Modality):
    """Decoded: uint8 (H, W, 3), from arrays also (H, W, 1). Kept: uint8 (channels, height, width) at model size."""

    name, one, many = "images", "image", "images"
    suffixes = IMAGE_SUFFIXES
    # By name; no decoder here reads them.
    foreign_suffixes = frozenset(
        (".heic", ".heif", ".avif", ".jxl", ".jp2", ".psd", ".svg", ".ico", ".tga", *_RAW_SUFFIXES)
    )
    taken = "a PIL image, a uint8 array (H, W), (H, W, 1 or 3) or (N, H, W, 1 or 3)"
    column, column_names = "Image", ("image", "img", "picture", "jpg", "png")
    recipes = ("small_data", "small_images")
    program = Program("standalone.py", ("numpy", "onnxruntime", "pillow"), "photo.jpg")
    repair = (
        "the image itself is damaged: does it open in a viewer? Save it again as JPEG or PNG, and send that"
    )
    preprocess_type = ImagePreprocess

    def claims(self, start: bytes) -> bool:
        return image_format(start) is not None

    def decode(self, content: bytes, preprocess: Any = None) -> np.ndarray:
        return decode(content, grey_max=GREY16_MAX if preprocess is None else preprocess.grey_max)

    def look(self, content: bytes, preprocess: Any = None) -> Look:
        pixels, deep = decode_deep(
            content, grey_max=GREY16_MAX if preprocess is None else preprocess.grey_max
        )
        if deep is None:
            return Look(pixels, array_digest(pixels))
        return Look(pixels, array_digest(deep), int(deep.max()))

    def picture(self, example: np.ndarray) -> np.ndarray | None:
        return example

    def encode(self, example: np.ndarray) -> tuple[bytes, str]:
        buffer = io.BytesIO()
        Image.fromarray(example[..., 0] if example.shape[2] == 1 else example).save(buffer, "png")
        return buffer.getvalue(), "png"

    def probe(self, preprocess: Any) -> bytes:
        return self.encode(np.zeros((1, 1, 3), dtype=np.uint8))[0]

    def suffix_of(self, content: bytes) -> str:
        name = describe(content)[3]
        return _SUFFIX_OF_FORMAT.get(name, name.lower())

    def resolve(self, data: Any, settings: Any, train: Any, needs: Needs) -> tuple[Any, Any]:
        if data.channels not in (None, 1, 3):
            raise UsageError(f"channels must be 1 or 3, got {data.channels}", where="data.channels")
        sizes, channels = _look_at(train)
        image_size = data.image_size or _common_size(sizes, needs)
        return replace(data, image_size=image_size, channels=data.channels or channels), settings

    def preprocess(self, data: Any, settings: Any) -> ImagePreprocess:
        """Pixels go to [-1, 1], as the authors have it."""
        mean, std = data.mean or (0.5,), data.std or (0.5,)
        for key, values in (("mean", mean), ("std", std)):
            if len(values) not in (1, data.channels):
                raise UsageError(
                    f"{len(values)} values for {data.channels} channels",
                    where=f"data.{key}",
                    hint="give one for each",
                )
        permutation = None
        if data.permutation != "none":
            permutation = PixelPermutation(
                kind=data.permutation,
                patch_size=data.permutation_patch_size or 1,
                seed=data.permutation_seed,
            )
            permutation.index(data.image_size)  # raises if the patches do not divide such images
        return ImagePreprocess(
            image_size=data.image_size,
            channels=data.channels,
            permutation=permutation,
            fit=data.fit,
            crop_fraction=data.crop_fraction,
            interpolation=data.interpolation,
            mean=mean if len(mean) == data.channels else mean * data.channels,
            std=std if len(std) == data.channels else std * data.channels,
            grey_max=data.grey_max or GREY16_MAX,
        )

    def learn(self, data: Any, facts: Sequence[Any]) -> tuple[Any, str | None]:
        """How many bits 16-bit grey uses."""
        if data.grey_max is not None or not facts:
            return data, None
        peak = max(facts)
        data = replace(data, grey_max=grey_range(peak))
        bits = (data.grey_max or GREY16_MAX).bit_length()
        return data, (
            f"16-bit grey images: values up to {peak:,}, taken as {bits} bits (--grey-max sets what is white)"
        )

    def start_from(self, data: Any, settings: Any, preprocess: Preprocess) -> tuple[Any, Any]:
        data, settings = super().start_from(data, settings, preprocess)
        if isinstance(preprocess, ImagePreprocess):
            data = replace(
                data,
                mean=data.mean or _for_channels(preprocess.mean, data.channels),
                std=data.std or _for_channels(preprocess.std, data.channels),
            )
        return data, settings

    def settled(self, settings: Any, epochs: float) -> AugmentConfig:
        return settled(settings, epochs)

    def augment(self, kept: Tensor, settings: Any, *, seed: int, epoch: int, index: np.ndarray) -> Tensor:
        return augment(kept, settings, seed=seed, epoch=epoch, index=index)

    def drawn(
        self, examples: Examples, settings: Any, *, seed: int, epoch: int, index: np.ndarray
    ) -> tuple[Tensor, np.ndarray, list[BadFile]]:
        """A drawn crop is cut where an image is decoded, no larger than it needs to be."""
        if examples.kept is not None and not settings.cuts_boxes:
            kept, good, bad = examples.at(index), index, list[BadFile]()
        else:
            kept, good, bad = self._cut(examples, settings, seed, epoch, index)
        return self.augment(kept, settings, seed=seed, epoch=epoch, index=good), good, bad

    def _cut(
        self, examples: Examples, settings: AugmentConfig, seed: int, epoch: int, index: np.ndarray
    ) -> tuple[Tensor, np.ndarray, list[BadFile]]:
        """Decode (or take from memory), cut and scale each image; leave out those that fail."""
        preprocess: Any = examples.preprocess
        # Without a drawn box an image must be the same as where the set is kept in memory.
        cut = preprocess.cut_for_training if settings.cuts_boxes else preprocess.cut
        pixels, good, bad = [], [], list[BadFile]()
        for i, draws in zip(index, draw_crops(seed, epoch, index), strict=True):
            try:
                image, box = _read(examples, preprocess, settings, int(i), draws)
            except ExampleError as error:
                bad.append(examples.bad_file(i, error))
                continue
            pixels.append(cut(image, box))
            good.append(i)
        shape = (0, *preprocess.kept_shape)
        stacked = np.stack(pixels) if pixels else np.empty(shape, dtype=np.uint8)
        return torch.from_numpy(stacked), np.array(good, dtype=np.int64), bad

    def describe(self, content: bytes | None, look: Look) -> dict[str, Any]:
        if content is None:
            mode, format_name = {1: "L", 3: "RGB"}.get(look.example.shape[-1], "other"), "memory"
        else:
            _, _, mode, format_name = describe(content)
        height, width = look.example.shape[:2]
        return {"size": (width, height), "mode": mode, "format": format_name, "grey_peak": look.fact}

    def summarize(self, facts: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """sizes: min, median and max of width and height as decoded, and the most common [width, height].

        modes, formats: counts of what Pillow calls them; pixels in memory have the format `memory`. grey_peak: the
        largest value in 16-bit grey images, None without any; grey_max: what a training takes as white.
        """
        peak = max((fact["grey_peak"] for fact in facts if fact["grey_peak"] is not None), default=None)
        return {
            "sizes": _summary(Counter(fact["size"] for fact in facts)),
            "modes": dict(Counter(fact["mode"] for fact in facts).most_common()),
            "formats": dict(Counter(fact["format"] for fact in facts).most_common()),
            "grey_peak": peak,
            "grey_max": None if peak is None else grey_range(peak),
        }

    def samples(self, count: int, preprocess: Any) -> list[np.ndarray]:
        return sample_images(count, preprocess.image_size)

    def near_hash(self, example: np.ndarray) -> int | None:
        return near_hash(example)

    def takes(self, item: Any) -> bool:
        """An image of Pillow's, or an array uint8 (H, W), (H, W, 1 or 3) or (N, H, W, 1 or 3)."""
        return item.dtype == np.uint8 if isinstance(item, np.ndarray) else isinstance(item, Image.Image)

    def contents(self, item: Any, preprocess: Any) -> list[np.ndarray | ExampleError]:
        if isinstance(item, np.ndarray):
            return [_checked(array) for array in (item if item.ndim == 4 else [item])]
        try:
            return [decode_opened(item, grey_max=preprocess.grey_max)]
        except ExampleError as error:
            return [error]


IMAGES = Images()


def _checked(array: np.ndarray) -> np.ndarray | ExampleError:
    shaped = array[..., None] if array.ndim == 2 else array
    if shaped.ndim == 3 and shaped.shape[2] in (1, 3) and shaped.size:
        return shaped
    return ExampleError(f"an array must be uint8 (H, W), (H, W, 3) or (H, W, 1), got {array.shape}")


def _read(
    examples: Examples, preprocess: ImagePreprocess, settings: AugmentConfig, index: int, draws: np.ndarray
) -> tuple[np.ndarray, Box]:
    """An image and the part of it to take; decoded no larger than that part needs. draws: for its crop."""

    def drawn_box(height: int, width: int) -> Box:
        left, top, right, bottom = crop_boxes(draws[None], height, width, settings)[0].tolist()
        return left, top, right, bottom

    def reduction(height: int, width: int) -> float:
        left, top, right, bottom = drawn_box(height, width)
        return min((bottom - top) / preprocess.image_size[0], (right - left) / preprocess.image_size[1])

    is_drawn = settings.cuts_boxes
    if examples.kept is not None:
        image = examples.at([index])[0].numpy().transpose(1, 2, 0)
    else:
        image = read_image(examples.split, index, reduction if is_drawn else None, preprocess.grey_max)
    return image, (drawn_box if is_drawn else preprocess.box)(*image.shape[:2])


def read_image(
    split: Any, index: int, reduction: Reduction | None = None, grey_max: int = GREY16_MAX
) -> np.ndarray:
    """uint8 (H, W, channels): one decoded image of a split. reduction, grey_max: as for `decode`."""
    if split.arrays is not None:
        return split.arrays[index]
    return decode(split.read(index), reduction=reduction, grey_max=grey_max)


def _look_at(train: Any) -> tuple[list[tuple[int, int]], int]:
    """(height, width) of some images, and 1 if all of them are grey, else 3."""
    if train.arrays is not None:
        return [(train.arrays.shape[1], train.arrays.shape[2])], train.arrays.shape[3]
    sizes: list[tuple[int, int]] = []
    grey = True
    step = max(len(train) // SAMPLE_SIZE, 1)
    for index in range(0, len(train), step if train.encoded is None or not train.encoded.window else 1):
        if len(sizes) >= SAMPLE_SIZE:
            break  # the first ones of a stream, whose middle is far away
        try:
            width, height, mode, _ = describe(train.read(index))
        except ExampleError:
            continue
        sizes.append((height, width))
        grey = grey and mode in ("1", "L", "I;16", "I;16B", "I")
    return sizes, 1 if grey and sizes else 3


def _common_size(sizes: list[tuple[int, int]], needs: Needs) -> tuple[int, int]:
    if needs.side is not None and needs.is_fixed:
        return (needs.side, needs.side)
    if sizes and len(set(sizes)) == 1 and max(sizes[0]) <= PHOTO_SIDE:
        # Sides with a common divisor, so that there are patches to cut them into: 30 becomes 32, 28 stays.
        unit = needs.unit or (4 if min(sizes[0]) > 16 else 2)
        height, width = (max(unit, round(side / unit) * unit) for side in sizes[0])
        return height, width
    side = needs.side or PHOTO_SIDE
    return (side, side)


def _for_channels(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    return values if len(values) == channels else (sum(values) / len(values),) * channels


def _summary(sizes: Counter[tuple[int, int]]) -> dict[str, Any]:
    if not sizes:
        return {}
    counts = np.fromiter(sizes.values(), dtype=np.int64)
    summary: dict[str, Any] = {}
    for name, values in zip(("width", "height"), np.array(list(sizes)).T, strict=True):
        every = np.repeat(values, counts)
        summary[name] = {"min": int(every.min()), "median": float(np.median(every)), "max": int(every.max())}
    return {**summary, "most_common": list(sizes.most_common(1)[0][0])}
