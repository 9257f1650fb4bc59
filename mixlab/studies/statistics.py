"""Means over seeds, and intervals that say how little a few seeds tell."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Mean:
    """A mean of n values with its standard deviation (None for one value) and the 95 % interval of the mean.

    low, high: by Student's t, for values that are drawn alike and independently; None for one value.
    """

    mean: float
    deviation: float | None
    low: float | None
    high: float | None
    n: int

    def text(self, scale: float = 1.0, digits: int = 1, sign: bool = False) -> str:
        """`81.3 +- 0.4 (n=3)`, all multiplied by `scale`."""
        form = f"{'+' if sign else ''}.{digits}f"
        spread = "" if self.deviation is None else f" ± {scale * self.deviation:.{digits}f}"
        return f"{scale * self.mean:{form}}{spread} (n={self.n})"

    def interval(self, scale: float = 1.0, digits: int = 1) -> str:
        """`-0.3 to 1.2`, or that there is none."""
        if self.low is None or self.high is None:
            return "no interval from one seed"
        return f"{scale * self.low:.{digits}f} to {scale * self.high:.{digits}f}"


def mean_of(values: Sequence[float]) -> Mean:
    """The mean of values, one a seed; ValueError if there is none."""
    if not values:
        raise ValueError("no values")
    mean, n = statistics.fmean(values), len(values)
    if n == 1:
        return Mean(mean, None, None, None, 1)
    from scipy.stats import t  # slow to import

    deviation = statistics.stdev(values)
    half = float(t.ppf(0.975, n - 1)) * deviation / math.sqrt(n)
    return Mean(mean, deviation, mean - half, mean + half, n)


def is_above_zero(gain: Mean) -> Literal["holds", "does not hold", "open"]:
    """The verdict on a statement that something is above zero: open where the interval has zero in it."""
    if gain.low is None or gain.high is None or gain.low <= 0 <= gain.high:
        return "open"
    return "holds" if gain.low > 0 else "does not hold"
