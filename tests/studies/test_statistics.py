"""Means and intervals of a few seeds, against SciPy."""

import numpy as np
import pytest
import scipy.stats

from mixlab.studies.statistics import is_above_zero, mean_of


@pytest.mark.parametrize("n", [2, 3, 10])
def test_the_interval_is_students(n):
    values = np.random.default_rng(n).normal(0.8, 0.01, n)
    found = mean_of(list(values))
    low, high = scipy.stats.t.interval(0.95, n - 1, loc=values.mean(), scale=scipy.stats.sem(values))
    assert (found.low, found.high) == pytest.approx((low, high))
    assert (found.mean, found.deviation) == pytest.approx((values.mean(), values.std(ddof=1)))


def test_one_seed_has_no_interval_and_says_so():
    found = mean_of([0.5])
    assert found.text(100) == "50.0 (n=1)"
    assert mean_of([-1e-5]).text(100) == "0.0 (n=1)"
    assert found.text(100, unit="%", interval=True) == "50.0 % (n=1; no interval from one seed)"
    assert is_above_zero(found) == "open"
    with pytest.raises(ValueError, match="no values"):
        mean_of([])


def test_a_verdict_needs_an_interval_on_one_side_of_zero():
    assert is_above_zero(mean_of([0.1, 0.11, 0.12])) == "holds"
    assert is_above_zero(mean_of([-0.1, -0.11, -0.12])) == "does not hold"
    assert is_above_zero(mean_of([0.1, -0.11, 0.05])) == "open"
    assert mean_of([0.1, 0.2]).text(100, sign=True) == "+15.0 ± 7.1 (n=2)"
    whole = mean_of([0.1, 0.2]).text(100, unit="points", interval=True)
    assert whole == "15.0 ± 7.1 points (n=2; 95 % interval -48.5 to 78.5)"
