"""The authors' RandAugment and crops against their own functions in TensorFlow (randaugment_reference.py)."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from mixlab.data.images.augment import AugmentConfig, augment, crop_boxes, draw_crops
from mixlab.data.images.policy_tf import OPERATIONS, apply_operation_tf, apply_policy_tf, argument
from mixlab.data.random import Purpose, uniform

REFERENCE = np.load(Path(__file__).with_name("randaugment_reference.npz"))
NAMES = {
    theirs: re.sub(r"(?<!^)(?=[A-Z])", "_", theirs).lower().replace("auto_", "auto")
    for theirs in REFERENCE["names"].tolist()
}


def test_there_are_the_authors_sixteen_operations():
    assert sorted(NAMES.values()) == sorted(OPERATIONS)
    assert len(OPERATIONS) == 16


@pytest.mark.parametrize("name", NAMES)
def test_an_operation_is_handed_the_authors_strength_at_224_pixels(name):
    row = REFERENCE["names"].tolist().index(name)
    for magnitude, theirs in zip(REFERENCE["magnitudes"], REFERENCE["arguments"][row], strict=True):
        if name == "Solarize":
            theirs %= 256  # as their comparison with bytes does; the pixels below show it
        assert argument(NAMES[name], float(magnitude)) == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize("case", REFERENCE["cases"])
def test_an_operation_gives_the_authors_pixels(case):
    name, magnitude, sign = case.split("/")
    pixels = torch.from_numpy(REFERENCE["picture"].transpose(2, 0, 1).copy())[None]
    # The middle of pixel (6, 21) of 24 x 32 for a cutout, a sign for others.
    draws = [6.5 / 24, 21.5 / 32] if name == "Cutout" else [0.0, 0.25 if sign == "-1" else 0.75]
    ours = apply_operation_tf(NAMES[name], pixels, float(magnitude), np.array([draws]))
    ours = ours[0].permute(1, 2, 0).reshape(-1, 3)[REFERENCE["positions"]].int()
    theirs = torch.from_numpy(REFERENCE["pixels"][REFERENCE["cases"].tolist().index(case)]).int()
    difference = (ours - theirs).abs()
    if name in ("Rotate", "ShearX", "ShearY"):
        # A source point half-way between two pixels may fall either way.
        assert (difference > 0).float().mean() <= 0.04
    else:
        # Where floats end just below a whole number and are cut off; sharpening multiplies that one grey level.
        assert difference.max() <= {"AutoContrast": 1, "Sharpness": 3}.get(name, 0)
        assert (difference > 0).float().mean() <= 0.03
    before = torch.from_numpy(REFERENCE["picture"].reshape(-1, 3))[REFERENCE["positions"]]
    assert torch.equal(ours, before.int()) == (case == "Posterize/20/1")  # which keeps all eight bits


@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_gets_the_same_result_alone_and_in_a_batch(channels):
    rng = np.random.default_rng(1)
    pixels = torch.from_numpy(rng.integers(0, 256, (200, channels, 12, 14), dtype=np.uint8))
    draws = rng.random((200, 2, 3))
    assert len(np.unique((draws[:, 0, 0] * 16).astype(int))) == 16
    together = apply_policy_tf(pixels, draws, 15.0)
    alone = torch.cat([apply_policy_tf(pixels[i : i + 1], draws[i : i + 1], 15.0) for i in range(200)])
    assert torch.equal(together, alone)
    assert not torch.equal(together, pixels)


def test_the_policy_is_chosen_by_its_name_and_has_two_layers():
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (9, 3, 16, 16), dtype=np.uint8))
    config = AugmentConfig(policy="randaugment_tf", policy_layers=2, policy_magnitude=15.0)
    changed = augment(pixels, config, seed=0, epoch=0, index=np.arange(9))
    draws = uniform(0, 0, np.arange(9), Purpose.POLICY, 6).reshape(9, 2, 3)
    assert torch.equal(changed, apply_policy_tf(pixels, draws, 15.0))


def test_inception_crops_have_the_sizes_that_tensorflow_draws():
    config = AugmentConfig(crop="inception", min_area=0.05)
    number = 20_000
    heights, widths = np.full(number, 375), np.full(number, 500)
    boxes = crop_boxes(draw_crops(0, 0, np.arange(number)), heights, widths, config)
    left, top, right, bottom = boxes.T
    assert min(left.min(), top.min()) == 0
    assert right.max() <= 500
    assert bottom.max() <= 375
    assert np.array_equal(boxes, boxes.astype(int))
    shares = np.column_stack([(bottom - top) / 375, (right - left) / 500])
    shares = np.column_stack([shares, shares.prod(axis=1)])
    ours = np.quantile(shares, np.linspace(0.05, 0.95, 19), axis=0)
    # Both are samples of 20,000, whose quantiles are within 0.01 of the truth; `resized` is 0.24 off.
    assert np.abs(ours - REFERENCE["crop_quantiles"]).max() < 0.015


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 90), (90, 3), (8, 8)])
def test_inception_crops_of_odd_pictures_lie_inside_them(height, width):
    draws = draw_crops(0, 0, np.arange(500))
    config = AugmentConfig(crop="inception", min_area=0.05)
    left, top, right, bottom = crop_boxes(draws, np.full(500, height), np.full(500, width), config).T
    assert (left >= 0).all() and (top >= 0).all()  # noqa: PT018
    assert (right <= width).all() and (bottom <= height).all()  # noqa: PT018
    assert (right > left).all() and (bottom > top).all()  # noqa: PT018


def test_inception_crops_of_one_picture_and_of_many_are_the_same():
    draws, config = draw_crops(3, 1, np.arange(5)), AugmentConfig(crop="inception", min_area=0.05)
    together = crop_boxes(draws, np.full(5, 40), np.full(5, 60), config)
    alone = np.concatenate([crop_boxes(draws[i : i + 1], 40, 60, config) for i in range(5)])
    assert np.array_equal(together, alone)
