r"""The slope of an error against a step, read off where it means something.

In log-log axes an error :math:`e(t) = c\,t^p + O(t^{p+1})` is a straight line of slope ``p``,
between the steps that are too large for the leading term and those where rounding takes over.
Looking for the straightest piece anywhere, as usual, overlooks an error that is small but of lower
order: a gradient that is wrong by 1% has slope 2 down to ``t = 0.01``. So the line is fitted at the
*lower end* of what stands out from rounding, and the rounding is measured: by the errors at steps
so small that nothing else is left in them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

__all__ = ["Slope", "fit_slope", "measure_slope"]

# Steps a decade, and how many of them a line is fitted to: one decade.
_DENSITY = 5
_WINDOW = _DENSITY + 1
# Below so many points over the rounding, the error counts as zero.
_FEWEST = 4
# How far the error has to stand out from the rounding, for a bias of a few percent at most.
_CLEARANCE = 20.0

Errors = Callable[[float], tuple[float, float]]
"""Error at a step, and the size of the numbers whose difference it is."""


@dataclass(frozen=True)
class Slope:
    """How fast an error falls with the step.

    Attributes:
        name: what is measured.
        expected: the order that a correct implementation has, or exceeds.
        tolerance: how far below ``expected`` the slope may be.
        found: the slope; ``nan`` where there is none.
        exact: the error is rounding at (nearly) every step, as that of a linear cost on a flat
            space is. It passes, since zero falls faster than any power.
        steps: the steps ``t``, descending.
        errors: the error at each step, the root mean square of those at ``t`` and ``-t``.
        rounding: what each error has to exceed to be more than rounding.
        window: first and last index of the fitted points; ``None`` where there is no fit.
    """

    name: str
    expected: float
    tolerance: float
    found: float
    exact: bool
    steps: tuple[float, ...]
    errors: tuple[float, ...]
    rounding: tuple[float, ...]
    window: tuple[int, int] | None

    @property
    def passed(self) -> bool:
        """Whether the error is zero, or falls at least as fast as expected."""
        return self.exact or self.found >= self.expected - self.tolerance

    @property
    def verdict(self) -> str:
        """The slope in a word or two."""
        if self.exact:
            return "exact"
        return "none" if math.isnan(self.found) else f"{self.found:.2f}"


def fit_slope(
    steps: Sequence[float], errors: Sequence[float], rounding: Sequence[float]
) -> tuple[float, tuple[int, int] | None, bool]:
    """Slope of the log-log line at the lower end of the errors that exceed the rounding.

    Of all windows of one decade that begin within a decade of that end, the straightest is taken.

    Args:
        steps: descending, evenly spaced in the logarithm.
        errors: one for each step; steps whose error is not finite are left out.
        rounding: one for each step.

    Returns:
        slope, the first and last index of its window, and whether the errors are all rounding.
        The slope is ``nan`` where too few errors are finite.
    """
    log_t, e = np.log10(np.asarray(steps)), np.asarray(errors)
    finite = np.isfinite(e)
    if finite.sum() < _FEWEST:
        return math.nan, None, False
    clear = finite & (e > np.asarray(rounding))
    kept = np.flatnonzero(clear)
    # A lone point over the rounding, among points below it, is rounding too.
    while kept.size >= _FEWEST and kept[-1] - kept[-_FEWEST] > _FEWEST:
        kept = kept[:-1]
    if kept.size < _FEWEST:
        return math.nan, None, True
    width = min(_WINDOW, kept.size)
    best, slope, window = math.inf, math.nan, (0, 0)
    for start in range(max(0, kept.size - width - _DENSITY), kept.size - width + 1):
        part = kept[start : start + width]
        line = np.polynomial.Polynomial.fit(log_t[part], np.log10(e[part]), 1)
        residual = float(np.sqrt(np.mean((line(log_t[part]) - np.log10(e[part])) ** 2)))
        if residual < best:
            coefficients = line.convert().coef
            slope = float(coefficients[1]) if coefficients.size > 1 else 0.0
            best, window = residual, (int(part[0]), int(part[-1]))
    return slope, window, False


def measure_slope(
    name: str, error: Errors, *, expected: float, dtype: torch.dtype, tolerance: float | None = None
) -> Slope:
    """Evaluate an error over a range of steps that suits the dtype, and fit its slope.

    The error at a step is the root mean square of those at ``t`` and ``-t``: where terms of even
    and odd order cancel on one side, they add up on the other, and no notch bends the line.

    Args:
        name: what is measured.
        error: ``t -> (error, size)``, the size being that of the numbers that cancel; for steps
            of both signs.
        expected: the order.
        dtype: of the numbers behind the error.
        tolerance: below ``expected``; by default 0.15, and 0.4 for less than double precision.
    """
    eps = torch.finfo(dtype).eps
    decades = -math.log10(eps) * 0.75
    count = int(decades * _DENSITY) + 1
    steps = [10.0 ** (-k / _DENSITY) for k in range(count)]

    def both(t: float) -> tuple[float, float]:
        (e, s), (mirrored, other) = error(t), error(-t)
        return math.hypot(e, mirrored) / math.sqrt(2), max(s, other)

    errors, sizes = zip(*map(both, steps), strict=True)
    # At these steps the truth is below rounding. What is left is the rounding of this very
    # computation, unless it is too large to be any: then it is an error at t = 0, and stays in.
    probes = [both(t) for t in (0.0, eps / 4, eps / 2, eps)]
    noise = max((e / max(s, 1e-300) for e, s in probes if math.isfinite(e)), default=0.0)
    unit = max(eps, noise if noise < eps**0.75 else 0.0)
    rounding = tuple(_CLEARANCE * unit * size for size in sizes)
    found, window, exact = fit_slope(steps, errors, rounding)
    if tolerance is None:
        tolerance = 0.15 if eps < 1e-10 else 0.4
    return Slope(
        name, expected, tolerance, found, exact, tuple(steps), tuple(errors), rounding, window
    )
