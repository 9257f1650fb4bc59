import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixlab.data.splits import hold_out, stratified_split
from mixlab.errors import UsageError

LABELS = st.lists(st.integers(0, 6), min_size=1, max_size=120).map(lambda v: np.array(v, dtype=np.int64))
FRACTIONS = st.sampled_from(
    [(0.6, 0.2, 0.2), (0.9, 0.1), (0.8, 0.1, 0.1), (1.0,), (0.5, 0.0, 0.5), (0.34, 0.66)]
)


@settings(deadline=None, max_examples=60)
@given(LABELS, FRACTIONS, st.integers(0, 2**40))
def test_every_image_is_in_one_part_and_every_class_has_its_share(labels, fractions, seed):
    parts = stratified_split(labels, fractions, seed)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(labels)))
    used = sum(f > 0 for f in fractions)
    for part in parts:
        assert np.array_equal(part, np.sort(part))
    for c in np.unique(labels):
        n = (labels == c).sum()
        sizes = [(labels[part] == c).sum() for part in parts]
        assert sizes[0] >= 1
        for size, fraction in zip(sizes, fractions, strict=True):
            assert size == 0 if fraction == 0 else size >= (n >= used)
            assert abs(size - fraction * n) <= 1 + 1e-9 or n < 2 * used / min(f for f in fractions if f)


def test_totals_are_exact_where_the_shares_are_whole_numbers():
    labels = np.repeat(np.arange(3), 100)
    assert [len(p) for p in stratified_split(labels, (0.29, 0.01, 0.7), 0)] == [87, 3, 210]


FIRST = [1, 3, 4, 6, 8, 11]


def test_the_same_seed_gives_the_same_split_on_every_machine():
    first, second = stratified_split(np.arange(12) % 2, (0.5, 0.5), 7)
    assert first.tolist() == FIRST
    assert second.tolist() == [i for i in range(12) if i not in FIRST]
    assert stratified_split(np.arange(12) % 2, (0.5, 0.5), 8)[0].tolist() != FIRST


def test_a_class_with_one_image_goes_to_the_first_part():
    assert stratified_split(np.array([0, 1, 1, 1]), (0.1, 0.9), 3)[0].tolist()[0] == 0


def test_fractions_that_do_not_sum_to_one_are_refused():
    with pytest.raises(UsageError, match="sum to 1"):
        stratified_split(np.zeros(4, np.int64), (0.5, 0.6), 0)


@settings(deadline=None, max_examples=60)
@given(LABELS, st.floats(0, 1), st.integers(0, 50), st.integers(0, 2**40))
def test_held_out_images_are_as_many_as_asked_and_leave_every_class_one(labels, fraction, at_most, seed):
    rest, held = hold_out(labels, fraction, at_most, seed)
    assert np.array_equal(np.sort(np.concatenate([rest, held])), np.arange(len(labels)))
    assert set(labels[rest]) == set(labels)
    assert len(held) == min(round(fraction * len(labels)), at_most, len(labels) - len(set(labels.tolist())))


def test_holding_out_is_stratified():
    labels = np.repeat(np.arange(4), [400, 200, 100, 100])
    _, held = hold_out(labels, 0.1, 1000, 0)
    assert np.bincount(labels[held]).tolist() == [40, 20, 10, 10]


def test_fewer_held_images_than_classes_do_not_all_come_from_the_first_classes():
    labels = np.repeat(np.arange(100), 10)
    _, held = hold_out(labels, 1.0, 20, 0)
    assert len(np.unique(labels[held])) == 20
    assert labels[held].max() > 50
