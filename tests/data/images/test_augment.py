"""Batched augmentation: what it may change, what it may not, and that an image's fate is its own."""

import numpy as np
import pytest
import torch

from mixlab.data.images.augment import (
    LONG,
    AugmentConfig,
    augment,
    crop_boxes,
    draw_crops,
    erase,
    settled,
    shift_crop,
)
from mixlab.data.mixing import mix
from mixlab.errors import UsageError

EVERYTHING = AugmentConfig(crop="pad", crop_padding=3, flip=True, policy="trivialaugment", erase_prob=0.5)


def pictures(number: int = 30) -> torch.Tensor:
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.integers(0, 256, (number, 3, 12, 10), dtype=np.uint8))


def test_a_picture_is_augmented_the_same_alone_and_in_any_batch():
    pixels, index = pictures(), np.arange(100, 130)
    together = augment(pixels, EVERYTHING, seed=1, epoch=2, index=index)
    for i in (0, 7, 29):
        alone = augment(pixels[i : i + 1], EVERYTHING, seed=1, epoch=2, index=index[i : i + 1])
        assert torch.equal(alone[0], together[i])
    assert not torch.equal(together, augment(pixels, EVERYTHING, seed=1, epoch=3, index=index))
    assert torch.equal(pixels, pictures())


def test_nothing_on_changes_nothing():
    assert torch.equal(augment(pictures(), AugmentConfig(), seed=0, epoch=0, index=np.arange(30)), pictures())


def test_shift_crop_is_a_window_of_the_padded_picture():
    pixels = pictures(4)
    offsets = np.array([[0, 0], [3, 3], [6, 1], [2, 5]])
    shifted = shift_crop(pixels, offsets, 3)
    padded = torch.nn.functional.pad(pixels, (3, 3, 3, 3))
    for i, (top, left) in enumerate(offsets):
        assert torch.equal(shifted[i], padded[i, :, top : top + 12, left : left + 10])
    assert torch.equal(shifted[1], pixels[1])


def test_alternating_flips_show_every_picture_both_ways():
    pixels = torch.randint(0, 256, (400, 3, 8, 8), dtype=torch.uint8)
    config = AugmentConfig(flip=True, flip_alternates=True)
    epochs = [augment(pixels, config, seed=0, epoch=epoch, index=np.arange(400)) for epoch in range(4)]
    same = (epochs[0] == pixels).flatten(1).all(dim=1)
    assert 0.4 < same.double().mean() < 0.6
    for epoch, found in enumerate(epochs):
        expected = same if epoch % 2 == 0 else ~same
        assert torch.equal(found, torch.where(expected[:, None, None, None], pixels, pixels.flip(3)))


def test_flips_mirror_half_of_the_pictures():
    pixels = pictures(400)
    flipped = augment(pixels, AugmentConfig(flip=True), seed=0, epoch=0, index=np.arange(400))
    same = (flipped == pixels).flatten(1).all(dim=1)
    mirrored = (flipped == pixels.flip(3)).flatten(1).all(dim=1)
    assert torch.all(same | mirrored)
    assert 160 < mirrored.sum() < 240


def test_erasing_touches_one_rectangle_of_the_stated_area():
    pixels = torch.zeros(500, 3, 32, 32, dtype=torch.uint8)
    erased = erase(pixels, np.random.default_rng(0).random((500, 5)), 0.4)
    share = (erased[:, 0] == 128).float().mean(dim=(1, 2))
    hit = share > 0
    assert 0.33 < hit.float().mean() < 0.47
    assert share[hit].min() > 0.01
    assert share[hit].max() < 0.36
    for mask in (erased[hit][:20, 0] == 128).numpy():
        rows, columns = mask.any(axis=1), mask.any(axis=0)
        assert mask.sum() == rows.sum() * columns.sum()


def test_resized_crops_lie_inside_and_have_the_stated_area_and_ratio():
    heights, widths = np.full(2000, 60), np.full(2000, 80)
    config = AugmentConfig(crop="resized", min_area=0.25)
    boxes = crop_boxes(draw_crops(0, 0, np.arange(2000)), heights, widths, config)
    left, top, right, bottom = boxes.T
    assert left.min() >= 0
    assert top.min() >= 0
    assert right.max() <= 80
    assert bottom.max() <= 60
    ratio = (right - left) / (bottom - top)
    assert ratio.min() > 0.74
    assert ratio.max() < 1.78  # a nearly whole image keeps its own 4:3
    area = (right - left) * (bottom - top) / 4800
    assert 0.2 < area.min() < 0.27
    assert area.max() > 0.9


def test_mixup_and_cutmix_targets_say_what_the_picture_holds():
    image = torch.stack([torch.full((3, 8, 8), float(i)) for i in range(6)])
    label, given = torch.arange(6), torch.eye(6)
    for step in range(20):
        mixed, target = mix(image, given, AugmentConfig(mixup_alpha=0.5), seed=0, step=step, shard=0)
        own = target[torch.arange(6), label]
        assert torch.allclose(target.sum(dim=1), torch.ones(6))
        assert own.min() >= 0.5
        partner = image.roll(1, dims=0)
        assert torch.allclose(mixed, own[0] * image + (1 - own[0]) * partner, atol=1e-5)
        cut, target = mix(image, given, AugmentConfig(cutmix_alpha=1.0), seed=0, step=step, shard=0)
        own_share = (cut == image).float().mean(dim=(1, 2, 3))
        assert torch.allclose(own_share, target[torch.arange(6), label])


def test_the_length_of_a_training_decides_an_open_policy_and_no_other():
    given = AugmentConfig(crop="pad", crop_padding=2, policy="auto")
    short, long = settled(given, LONG - 0.1), settled(given, LONG)
    assert (short.policy, short.crop_padding) == ("none", 2)
    assert (long.policy, long.policy_layers, long.policy_magnitude, long.crop_padding) == (
        "randaugment",
        1,
        5.0,
        4,
    )
    assert settled(EVERYTHING, 1000.0) == settled(EVERYTHING, 0.0) == EVERYTHING
    with pytest.raises(AssertionError, match="settled"):
        augment(pictures(), given, seed=0, epoch=0, index=np.arange(30))


def test_without_mixing_pictures_and_targets_stay():
    given, own = torch.randn(2, 1, 4, 4), torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    image, target = mix(given, own, AugmentConfig(), seed=0, step=0, shard=0)
    assert torch.equal(image, given)
    assert torch.equal(target, own)


@pytest.mark.parametrize("setting", [{"min_area": 0.0}, {"erase_prob": 1.5}, {"mixup_alpha": -1.0}])
def test_impossible_settings_are_refused(setting):
    with pytest.raises(UsageError, match=next(iter(setting))):
        AugmentConfig(**setting)
