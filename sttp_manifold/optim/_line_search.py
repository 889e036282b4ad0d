r"""A line search for the strong Wolfe conditions that still works where the cost is all rounding.

Along a retraction, :math:`\varphi(\alpha) = f(R_x(\alpha d))` and
:math:`\varphi'(\alpha) \approx \langle \operatorname{grad} f(y), T d\rangle` with the transport of
the manifold (exact at zero, and of the retraction's order beyond). A step is accepted if

.. math::

    \varphi(\alpha) \le \varphi(0) + c_1 \alpha \varphi'(0), \qquad
    |\varphi'(\alpha)| \le c_2 |\varphi'(0)|,

or, when values cannot be told apart, by the slopes alone (the approximate Wolfe conditions of
Hager & Zhang 2005, *A new conjugate gradient method with guaranteed descent*, eq. 4.1):

.. math::

    \varphi(\alpha) \le \varphi(0) + \epsilon, \qquad
    -c_2 |\varphi'(0)| \le \varphi'(\alpha) \le (1 - 2\delta) |\varphi'(0)|.

Trials interpolate: values and slopes by a cubic, slopes alone where values are noise, a parabola
where the trial is so bad that its gradient was not computed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sttp_manifold.manifolds.cost import Evaluation
from sttp_manifold.optim._objective import Iterate, Objective

__all__ = ["LineSearch", "Trial"]

_DELTA = 0.1  # of Hager & Zhang


@dataclass
class Trial:
    """A point on the line."""

    step: float
    value: float
    slope: float = math.nan
    grad_norm: float = math.nan
    evaluation: Evaluation | None = None
    direction: Tensor | None = None

    def iterate(self) -> Iterate:
        """The trial as a point that was accepted."""
        assert self.evaluation is not None
        return Iterate(self.evaluation, self.value, self.evaluation.gradient(), self.grad_norm)


class LineSearch:
    """Searches along one direction after another.

    Args:
        objective: what to lower.
        decrease: ``c_1``.
        curvature: ``c_2``.
        max_trials: after so many, the best point found so far is taken.
    """

    def __init__(
        self, objective: Objective, decrease: float, curvature: float, max_trials: int
    ) -> None:
        self.objective = objective
        self.decrease = decrease
        self.curvature = curvature
        self.max_trials = max_trials

    def search(self, at: Iterate, d: Tensor, slope: float, first: float) -> Trial | None:
        """A step along ``d`` that satisfies the conditions, or None if there is no decrease.

        Args:
            at: where from.
            d: a descent direction.
            slope: the slope along it, negative.
            first: the first step to try.
        """
        resolution = self.objective.resolution(at.value)
        start = low = Trial(0.0, at.value, slope)
        before: Trial | None = None  # the last low end, while nothing bounds the step from above
        high: Trial | None = None
        step = first
        for _ in range(self.max_trials):
            if not math.isfinite(step) or not low.step < step or (high and step >= high.step):
                break
            trial = self._value(at, d, step)
            decreased = trial.value <= at.value + self.decrease * step * slope
            unclear = trial.value <= at.value + resolution
            higher = trial.value > low.value + resolution
            if not math.isfinite(trial.value) or not (decreased or unclear) or higher:
                high = trial
            else:
                self._slope(at, d, trial)
                if not math.isfinite(trial.slope):
                    high = Trial(step, math.inf)
                elif self._accepts(trial, slope, decreased, resolution):
                    return trial
                elif trial.slope >= 0:
                    high = trial
                else:
                    before, low = low, trial
            step = _between(low, high, resolution) if high else _beyond(before or start, low)
        # Not flat enough yet, but lower beyond doubt: better than nothing.
        return low if low.value < at.value + self.decrease * low.step * slope else None

    def _accepts(self, trial: Trial, slope: float, decreased: bool, resolution: float) -> bool:
        flat = self.curvature * abs(slope)
        if decreased and abs(trial.slope) <= flat:
            return True
        # By slopes only where the decrease they promise could not be seen in the values.
        unseen = trial.step * abs(slope) <= resolution
        return unseen and -flat <= trial.slope <= (1 - 2 * _DELTA) * abs(slope)

    def _value(self, at: Iterate, d: Tensor, step: float) -> Trial:
        y = self.objective.retr(at.x, step * d)
        evaluation = self.objective.cost.at(y)
        return Trial(step, float(evaluation.value), evaluation=evaluation)

    def _slope(self, at: Iterate, d: Tensor, trial: Trial) -> None:
        evaluation = trial.evaluation
        assert evaluation is not None
        y, gradient = evaluation.x, evaluation.gradient()
        trial.direction = self.objective.transp(at.x, y, d)
        inner = self.objective.inner
        slopes = [inner(y, gradient, trial.direction), inner(y, gradient, gradient)]
        trial.slope, square = torch.stack(slopes).tolist()
        trial.grad_norm = max(square, 0.0) ** 0.5 if math.isfinite(square) else math.nan
        if not math.isfinite(square):
            trial.slope = math.nan


def _between(low: Trial, high: Trial, resolution: float) -> float:
    """Next step inside of a bracket, away from its ends."""
    width = high.step - low.step
    if not math.isfinite(high.value):
        return low.step + 0.1 * width
    part = 0.5
    if math.isnan(high.slope):
        rise = high.value - low.value - low.slope * width
        part = -low.slope * width / (2 * rise) if rise > 0 else 0.5
        return low.step + min(max(part, 0.01), 0.9) * width
    if abs(high.value - low.value) <= resolution:
        part = low.slope / (low.slope - high.slope)
    else:
        # Minimum of the cubic through both ends (Nocedal & Wright 2006, eq. 3.59).
        d1 = low.slope + high.slope - 3 * (high.value - low.value) / width
        square = d1 * d1 - low.slope * high.slope
        if square >= 0:
            d2 = math.sqrt(square)
            below = high.slope - low.slope + 2 * d2
            part = 1 - (high.slope + d2 - d1) / below if below else 0.5
    return low.step + min(max(part, 0.05), 0.95) * width


def _beyond(before: Trial, low: Trial) -> float:
    """Next step where the cost still falls: the zero of the slope's secant, within limits."""
    width = low.step - before.step
    bend = low.slope - before.slope
    reach = -low.slope * width / bend if bend > 0 else math.inf
    return low.step + min(max(reach, 0.1 * width), 9 * low.step)
