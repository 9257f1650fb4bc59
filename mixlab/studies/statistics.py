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

    def text(
        self,
        scale: float = 1.0,
        digits: int = 1,
        *,
        sign: bool = False,
        unit: str = "",
        interval: bool = False,
    ) -> str:
        """`81.3 ± 0.4 % (n=3; 95 % interval 80.3 to 82.3)`, multiplied by `scale`; unit and interval if wanted."""
        mean = round(scale * self.mean, digits) + 0.0  # which makes a zero of a negative one
        parts = [f"{mean:{'+' if sign else ''}.{digits}f}"]
        if self.deviation is not None:
            parts.append(f"± {scale * self.deviation:.{digits}f}")
        parts += [unit] if unit else []
        notes = f"n={self.n}"
        if interval:
            bounds = [f"{scale * bound:.{digits}f}" for bound in (self.low, self.high) if bound is not None]
            notes += f"; 95 % interval {' to '.join(bounds)}" if bounds else "; no interval from one seed"
        return f"{' '.join(parts)} ({notes})"


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
