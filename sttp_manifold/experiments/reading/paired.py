"""Differences of two methods seed by seed, and how far they can be trusted."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

__all__ = ["LEVEL", "Paired", "interval", "paired"]

LEVEL = 0.95
_ROUNDING = 1e-12


class Paired(NamedTuple):
    """Mean difference over the seeds that two methods share, and its interval.

    Attributes:
        mean: of the differences, first minus second.
        low: lower end of the 95 % interval of that mean.
        high: its upper end.
        seeds: how many seeds both have.
    """

    mean: float
    low: float
    high: float
    seeds: int

    @property
    def apart(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0


def paired(
    first: Mapping[int, float], second: Mapping[int, float], resolution: float | None = None
) -> Paired | None:
    """Compare two methods on the seeds that both have; None where those are fewer than two.

    Of one seed both have the initial weight, the order of data, and the problem: what a seed draws
    falls out of their difference. The interval is Student's (1908), for differences that are about
    normal; with two seeds it is 12.7 standard errors wide to each side, with three 4.3, with ten
    2.3, and says so little where so little is known.

    Differences that are all equal have no spread, and their interval would have no width: that is
    how coarse the values are, and no certainty. It is then as wide as the resolution to each side;
    where none is known, it reaches to zero, and the two are not told apart.

    Args:
        first: values by seed.
        second: values by seed.
        resolution: the least difference that two values can have, as one test example has in an
            accuracy; None where there is no such thing.
    """
    shared = [seed for seed in first if seed in second]
    differences = [first[seed] - second[seed] for seed in shared]
    count = len(differences)
    if count < 2:
        return None
    mean, spread = statistics.fmean(differences), statistics.stdev(differences)
    reach = _student(count - 1) * spread / math.sqrt(count)
    if spread <= _ROUNDING * max(abs(first[seed]) + abs(second[seed]) for seed in shared):
        # A difference of exactly one example is not told apart, whatever rounding makes of it.
        reach = abs(mean) if resolution is None else resolution * (1 + 1e-9)
    return Paired(mean, mean - reach, mean + reach, count)


def interval(values: Sequence[float]) -> float | None:
    """Half the width of the 95 % interval of a mean (Student's); None for fewer than two values."""
    if len(values) < 2:
        return None
    return _student(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


@functools.cache
def _student(freedom: int) -> float:
    """Standard errors from the mean to the end of its interval."""
    from scipy.stats import t

    return float(t.ppf(0.5 + LEVEL / 2, freedom))
