"""Preprocessing: what part of an image is used, how it is scaled, and that it survives storage."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from mixlab.data.images.preprocess import ImagePreprocess
from mixlab.errors import WeightsError


def gradient(height: int, width: int) -> np.ndarray:
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return np.stack([x, y, x], axis=-1).astype(np.uint8)


def test_a_picture_of_model_size_is_not_touched():
    picture = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    assert np.array_equal(ImagePreprocess(image_size=(8, 8)).keep(picture), picture.transpose(2, 0, 1))


def test_crop_keeps_the_shape_of_things_and_cuts_the_centre():
    preprocess = ImagePreprocess(image_size=(10, 10))
    assert preprocess.box(20, 40) == (10.0, 0.0, 30.0, 20.0)
    assert preprocess.box(40, 20) == (0.0, 10.0, 20.0, 30.0)
    assert ImagePreprocess(image_size=(10, 20)).box(40, 20) == (0.0, 15.0, 20.0, 25.0)
    assert ImagePreprocess(image_size=(7, 7), crop_fraction=0.875).box(16, 16) == (1.0, 1.0, 15.0, 15.0)


def test_stretch_uses_the_whole_picture():
    pixels = ImagePreprocess(image_size=(16, 16), fit="stretch").keep(gradient(40, 90))
    assert pixels.shape == (3, 16, 16)
    assert pixels[0, :, 0].max() < 16
    assert pixels[0, :, -1].min() > 239


def test_scaling_equals_pillow_on_the_usual_resize_then_centre_crop():
    picture = gradient(60, 90)
    ours = ImagePreprocess(image_size=(32, 32), crop_fraction=1.0).keep(picture)
    resized = Image.fromarray(picture).resize((48, 32), Image.Resampling.BICUBIC)
    theirs = np.asarray(resized.crop((8, 0, 40, 32))).transpose(2, 0, 1)
    assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1


def smooth(height: int, width: int) -> np.ndarray:
    """An image of waves of many pixels, on which filters agree but a shift or another shape shows."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / 9 + k) + np.cos(y / 7 - k) + np.sin((x + y) / 13) for k in range(3)]
    return np.stack([128 + 40 * wave for wave in waves], axis=-1).astype(np.uint8)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_resize_crop_is_torchvisions_resize_to_a_square_and_its_centre(interpolation):
    picture = smooth(120, 200)
    preprocess = ImagePreprocess(
        image_size=(56, 56), fit="resize-crop", crop_fraction=0.875, interpolation=interpolation
    )
    tensor = torch.from_numpy(picture).permute(2, 0, 1)
    resized = F.resize(tensor, [64, 64], InterpolationMode(interpolation), antialias=True)
    theirs = F.center_crop(resized, [56, 56]).numpy()
    ours = preprocess.keep(picture)
    assert np.abs(ours.astype(int) - theirs).max() <= 2
    others = [replace(preprocess, fit=fit).keep(picture).astype(int) for fit in ("crop", "stretch")]
    assert min(np.abs(other - theirs).max() for other in others) > 20
    whole = replace(preprocess, crop_fraction=1.0)
    assert np.array_equal(whole.keep(picture), replace(whole, fit="stretch").keep(picture))


def authors_resmall_crop(picture: np.ndarray, smaller: int, crop: int) -> np.ndarray:
    """resize_small and central_crop with the authors' rounding of sizes and places, scaled by Pillow."""
    factor = smaller / min(picture.shape[:2])
    height, width = (round(side * factor) for side in picture.shape[:2])
    image = Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - crop) // 2, (height - crop) // 2
    return np.asarray(image.crop((left, top, left + crop, top + crop))).transpose(2, 0, 1)


def test_crop_at_224_of_256_is_the_authors_resmall_crop_to_within_half_a_pixel():
    preprocess = ImagePreprocess(image_size=(56, 56), crop_fraction=0.875)
    exact = smooth(128, 192)  # 64 x 96 once scaled, cut at whole pixels
    ours = preprocess.keep(exact)
    assert np.abs(ours.astype(int) - authors_resmall_crop(exact, 64, 56)).max() <= 1
    odd = smooth(131, 187)  # 64 x 91.4: theirs rounds to 91 and cuts at 17, ours at 17.7
    moved = np.abs(preprocess.keep(odd).astype(int) - authors_resmall_crop(odd, 64, 56))
    slope = np.abs(np.diff(preprocess.keep(odd).astype(int), axis=2)).max()
    assert 1 < moved.max() <= slope


def test_a_fit_that_is_not_known_is_refused_and_old_ones_keep_their_meaning():
    values = ImagePreprocess(image_size=(56, 56), crop_fraction=0.875).to_json()
    with pytest.raises(WeightsError, match="unknown fit: 'squeeze'"):
        ImagePreprocess.from_json(values | {"fit": "squeeze"})
    stretched = ImagePreprocess.from_json(values | {"fit": "stretch"})
    assert stretched.box(100, 200) == (0.0, 0.0, 200.0, 100.0)  # whatever its crop_fraction
    assert ImagePreprocess.from_json(values | {"fit": "resize-crop"}).box(80, 160) == (10.0, 5.0, 150.0, 75.0)


def test_grey_models_and_colour_pictures_meet_both_ways():
    colour = np.zeros((4, 4, 3), dtype=np.uint8)
    colour[..., 1] = 200
    grey = ImagePreprocess(image_size=(4, 4), channels=1, mean=(0.5,), std=(0.5,)).keep(colour)
    assert grey.shape == (1, 4, 4)
    assert np.all(grey == round(200 * 0.587))
    assert ImagePreprocess(image_size=(4, 4)).keep(grey.transpose(1, 2, 0)).shape == (3, 4, 4)


def test_normalize_maps_black_and_white_to_minus_one_and_one_and_back():
    preprocess = ImagePreprocess(image_size=(16, 16))
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    image = preprocess.to_input(pixels)
    assert image.dtype == torch.float32
    assert image.min().item() == pytest.approx(-1)
    assert image.max().item() == pytest.approx(1)
    assert torch.equal(preprocess.denormalize(image), pixels)


def test_it_is_stored_and_read_back_equal_and_strange_keys_are_refused():
    preprocess = ImagePreprocess(image_size=(8, 12), fit="stretch", channels=1, mean=(0.1,), std=(0.3,))
    values = preprocess.to_json()
    assert (
        ImagePreprocess.from_json({k: list(v) if isinstance(v, tuple) else v for k, v in values.items()})
        == preprocess
    )
    with pytest.raises(WeightsError, match="sharpen"):
        ImagePreprocess.from_json(values | {"sharpen": 1})


@pytest.mark.parametrize("target", [8, 28, 64, 224])
def test_every_picture_size_has_a_box_inside_it(target):
    preprocess = ImagePreprocess(image_size=(target, target))
    for side in range(1, 1100):
        for height, width in ((side, side + 7), (side + 7, side)):
            left, top, right, bottom = preprocess.box(height, width)
            assert left >= 0
            assert top >= 0
            assert right <= width
            assert bottom <= height


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_cut_for_training_is_pillows_of_that_part_within_rounding(interpolation, channels):
    preprocess = ImagePreprocess(
        image_size=(32, 48), channels=channels, mean=(0.5,) * channels, std=(0.5,) * channels,
        interpolation=interpolation,
    )  # fmt: skip
    y, x = np.mgrid[0:300, 0:400]
    noise = np.random.default_rng(0).normal(0, 20, (300, 400, 3))
    picture = np.clip(np.stack([y / 2, x / 2, (x + y) / 3], axis=-1) + noise, 0, 255).astype(np.uint8)
    for box in ((0.0, 0.0, 400.0, 300.0), (17.0, 30.0, 217.0, 130.0), (300.0, 200.0, 400.0, 264.0)):
        left, top, right, bottom = map(int, box)
        part = picture[top:bottom, left:right]
        slow = preprocess.cut(part, (0.0, 0.0, right - left, bottom - top))
        fast = preprocess.cut_for_training(picture, box)
        assert fast.shape == slow.shape == (channels, 32, 48)
        assert fast.dtype == np.uint8
        assert np.abs(fast.astype(int) - slow).max() <= 2
    moved = preprocess.cut_for_training(picture, (17.4, 29.6, 217.4, 129.6))
    assert np.array_equal(moved, preprocess.cut_for_training(picture, (17.0, 30.0, 217.0, 130.0)))
    small = (10.3, 20.6, 50.2, 80.7)
    assert np.array_equal(preprocess.cut_for_training(picture, small), preprocess.cut(picture, small))
