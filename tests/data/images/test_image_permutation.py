"""Permutations of images: what moves where, the same for every image, and carried by the preprocessing."""

import numpy as np
import pytest
import torch

from mixlab.data.images.permutation import KINDS, PixelPermutation
from mixlab.data.images.preprocess import ImagePreprocess
from mixlab.errors import UsageError, WeightsError

SIZE = (8, 12)


def numbered(size=SIZE) -> torch.Tensor:
    """An image whose pixels say where they stood, in two channels of which one is negative."""
    number = torch.arange(size[0] * size[1], dtype=torch.float32).view(1, 1, *size)
    return torch.cat([number, -number], dim=1)


@pytest.mark.parametrize("kind", KINDS)
def test_every_pixel_moves_to_one_place_and_back_and_channels_stay_together(kind):
    permutation = PixelPermutation(kind=kind, patch_size=4, seed=5)
    image = numbered()
    moved = permutation.apply(image)
    assert sorted(moved[0, 0].flatten().tolist()) == list(range(96))
    assert torch.equal(moved[:, 1], -moved[:, 0])
    assert torch.equal(permutation.undo(moved), image)
    assert (moved != image).float().mean() > 0.8


def patches(image: torch.Tensor) -> list[set[int]]:
    cut = image[0, 0].unfold(0, 4, 4).unfold(1, 4, 4).reshape(-1, 16)
    return [set(patch.int().tolist()) for patch in cut]


def test_each_kind_keeps_what_it_promises():
    before = patches(numbered())
    after = {k: patches(PixelPermutation(kind=k, patch_size=4, seed=5).apply(numbered())) for k in KINDS}
    assert after["per_patch"] == before
    assert after["patches_and_pixels"] != before
    assert sorted(map(sorted, after["patches_and_pixels"])) == sorted(map(sorted, before))
    assert not any(patch in before for patch in after["global"])


def test_patches_and_pixels_moves_the_pixels_of_every_patch_in_the_same_way():
    permutation = PixelPermutation(kind="patches_and_pixels", patch_size=4, seed=5)
    moved = permutation.apply(numbered())[0, 0]
    for place, source in enumerate(permutation.patch_order(SIZE)):
        row, column = divmod(place, 3)
        old_row, old_column = divmod(int(source), 3)
        old = numbered()[0, 0, 4 * old_row : 4 * old_row + 4, 4 * old_column : 4 * old_column + 4].flatten()
        new = moved[4 * row : 4 * row + 4, 4 * column : 4 * column + 4].flatten()
        assert torch.equal(new, old[torch.from_numpy(permutation.pixel_order())])


def test_the_permutation_follows_from_the_seed_alone():
    same = [PixelPermutation(kind="global", patch_size=4, seed=s).index(SIZE) for s in (1, 1, 2)]
    assert np.array_equal(same[0], same[1])
    assert not np.array_equal(same[0], same[2])


def test_preprocessing_carries_it_and_stored_files_without_one_still_load():
    permutation = PixelPermutation(kind="patches_and_pixels", patch_size=4, seed=5)
    plain = ImagePreprocess(image_size=SIZE)
    permuted = ImagePreprocess(image_size=SIZE, permutation=permutation)
    pixels = torch.randint(0, 256, (2, 3, *SIZE), dtype=torch.uint8)
    assert torch.equal(permuted.to_input(pixels), permutation.apply(plain.to_input(pixels)))
    assert torch.equal(permuted.denormalize(permuted.to_input(pixels)), pixels)
    assert ImagePreprocess.from_json(permuted.to_json()) == permuted
    stored = plain.to_json()
    del stored["permutation"]
    assert ImagePreprocess.from_json(stored) == plain


@pytest.mark.parametrize("stored", [{}, 3, {"kind": "none", "patch_size": 4, "seed": 1}, {"kind": "global"}])
def test_a_stored_permutation_that_is_none_is_refused(stored):
    with pytest.raises(WeightsError, match="permutation"):
        ImagePreprocess.from_json(ImagePreprocess(image_size=SIZE).to_json() | {"permutation": stored})


def test_sizes_without_whole_patches_are_refused():
    with pytest.raises(UsageError, match="8x12"):
        PixelPermutation(kind="per_patch", patch_size=5, seed=0).apply(numbered())
    with pytest.raises(UsageError, match="at least 1"):
        PixelPermutation(kind="global", patch_size=0, seed=0)
