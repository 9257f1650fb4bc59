"""Copies: digests, drawn splits that keep them together, what is said of them, and images nearly alike."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from mixlab.data.check import check
from mixlab.data.copies import copy_groups, find_copies, near_pairs
from mixlab.data.images.near import near_hash
from mixlab.data.modality import array_digest
from mixlab.data.sources import open_source
from mixlab.data.splits import hold_out, stratified_split


def sides(parts: list[np.ndarray], groups: np.ndarray) -> int:
    """The most parts that one group has images in."""
    return max(
        len({number for number, part in enumerate(parts) if (groups[part] == g).any()}) for g in groups
    )


def test_no_copy_is_on_two_sides_and_classes_have_their_shares_for_a_hundred_seeds():
    labels, groups = np.repeat([0, 1], 80), np.arange(160) // 2  # every image twice
    for seed in range(100):
        parts = stratified_split(labels, (0.8, 0.1, 0.1), seed, groups)
        assert sides(parts, groups) == 1
        counts = [np.bincount(labels[part], minlength=2).tolist() for part in parts]
        assert counts == [[64, 64], [8, 8], [8, 8]]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**30), st.integers(20, 200), st.floats(0, 0.6))
def test_groups_of_any_size_stay_together_even_across_classes(seed, n, share):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, n)
    groups = np.where(rng.random(n) < share, rng.integers(0, max(n // 6, 1), n), 1000 + np.arange(n))
    largest = np.unique(groups, return_counts=True)[1].max()
    parts = stratified_split(labels, (0.8, 0.1, 0.1), seed, groups)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(n))
    assert sides(parts, groups) == 1
    alone = stratified_split(labels, (0.8, 0.1, 0.1), seed)
    for part, other in zip(parts, alone, strict=True):
        assert abs(len(part) - len(other)) <= 2 * largest
    rest, held = hold_out(labels, 0.1, 50, seed, groups)
    assert np.array_equal(np.sort(np.concatenate([rest, held])), np.arange(n))
    assert sides([rest, held], groups) == 1


def test_without_copies_the_split_is_the_one_it_always_was():
    labels = np.arange(60) % 3
    assert copy_groups([str(i) for i in range(60)]) is None
    for ours, plain in zip(
        stratified_split(labels, (0.8, 0.1, 0.1), 5, None),
        stratified_split(labels, (0.8, 0.1, 0.1), 5),
        strict=True,
    ):
        assert np.array_equal(ours, plain)


def test_a_digest_is_of_the_pixels_whatever_the_file(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (20, 24, 3), dtype=np.uint8)
    for name in ("a/1.png", "a/2.bmp", "b/3.tif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / name)
    result = check(open_source(str(tmp_path)))
    assert result.num_duplicates_within == 2
    assert result.conflicts[0]["labels"] == ["a", "a", "b"]
    assert array_digest(pixels) != array_digest(pixels.reshape(24, 20, 3))
    assert array_digest(pixels) != array_digest(pixels.astype(np.uint16))


def test_what_a_person_should_know_of_copies_is_said():
    copies = find_copies(
        {"train": ["t0", "t1", "t2"], "test": ["s0", "s1"]},
        {"train": ["a", "a", "b"], "test": ["a", "b"]},
        {"train": ["x", "x", "y"], "test": ["x", ""]},
    )
    assert (copies.num_in_train, copies.num_within, copies.num_conflicts, copies.num_unknown) == (
        {"test": 1},
        1,
        0,
        1,
    )
    assert copies.examples == [
        {"paths": ["t0", "t1", "s0"], "splits": ["train", "train", "test"], "labels": ["a"] * 3}
    ]
    assert "also in train: 1 image of the test split" in copies.sentences()[0]
    conflict = find_copies({"train": ["p", "q"]}, {"train": ["a", "b"]}, {"train": ["x", "x"]})
    assert conflict.num_conflicts == 2
    assert "under more than one label: 2 images (such as p = q)" in conflict.sentences()[0]
    assert find_copies({"train": ["p"]}, {"train": ["a"]}, {"train": ["x"]}).sentences() == []


def photo(seed: int, side: int = 64) -> Image.Image:
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8))
    return small.resize((side, side), Image.Resampling.BICUBIC)


def test_pictures_saved_again_are_counted_as_near_copies_and_others_are_not(tmp_path):
    for seed in range(12):
        path = tmp_path / "train" / "ab"[seed % 2] / f"{seed}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(seed).save(path)
    (tmp_path / "test" / "a").mkdir(parents=True)
    photo(0).save(tmp_path / "test" / "a" / "again.jpg", quality=70)
    photo(2).resize((48, 48)).filter(ImageFilter.GaussianBlur(0.5)).save(
        tmp_path / "test" / "a" / "small.png"
    )
    result = check(open_source(str(tmp_path)))
    assert result.num_near_copies == 4
    assert [pair["splits"] for pair in result.near_copies] == [["train", "test"]] * 2
    assert result.duplicates == []


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**30), st.integers(2, 60))
def test_near_pairs_are_all_and_only_those_that_differ_in_few_bits(seed, n):
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2**63, n, dtype=np.uint64)
    for i in range(1, n, 3):  # some near others
        hashes[i] = hashes[i - 1] ^ np.uint64(
            sum(1 << int(bit) for bit in rng.choice(64, rng.integers(0, 6), False))
        )
    expected = {
        (i, j) for i in range(n) for j in range(i + 1, n) if 0 < int(hashes[i] ^ hashes[j]).bit_count() <= 3
    }
    assert {tuple(pair) for pair in near_pairs(hashes).tolist()} == expected


@pytest.mark.parametrize("pixels", [np.zeros((32, 32, 3), np.uint8), np.zeros((8, 64, 1), np.uint8)])
def test_a_plain_or_tiny_picture_has_no_hash(pixels):
    assert near_hash(pixels) is None
