"""Steepest descent and nonlinear conjugate gradients."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sttp_manifold.optim._line_search import LineSearch
from sttp_manifold.optim._objective import Iterate, Objective
from sttp_manifold.optim._options import ConjugateGradientOptions, SteepestDescentOptions

__all__ = ["conjugate_gradient", "first_step", "steepest_descent"]


def steepest_descent(objective: Objective, at: Iterate, options: SteepestDescentOptions) -> None:
    """Run until the objective stops it."""
    _descend(objective, at, options)


def conjugate_gradient(
    objective: Objective, at: Iterate, options: ConjugateGradientOptions
) -> None:
    """Run until the objective stops it."""
    _descend(objective, at, options)


def _descend(objective: Objective, at: Iterate, options: SteepestDescentOptions) -> None:
    conjugate = options if isinstance(options, ConjugateGradientOptions) else None
    line = LineSearch(objective, options.decrease, options.curvature, options.max_trials)
    z = options.precondition(at.x, at.gradient)
    d, since = objective.own.get("direction", -z), objective.own.get("since", 0)
    slope, length = _slope_and_length(objective, at, d)
    if not objective.own:
        options.check_definite(-slope)
    trial_step = objective.own.get("trial_step", options.initial_step / length)
    while True:
        trial = line.search(at, d, slope, trial_step)
        if trial is None:
            if since == 0:
                raise objective.stalled(at, "no step along the negative gradient lowers the cost")
            d, since = -z, 0
            slope, length = _slope_and_length(objective, at, d)
            continue
        new, moved = trial.iterate(), trial.step * length
        z_new = options.precondition(new.x, new.gradient)
        beta: Tensor | None = None
        since += 1
        if conjugate is not None and since != conjugate.restart_every:
            assert trial.direction is not None
            g_old = objective.transp(at.x, new.x, at.gradient)
            beta = _beta(objective, conjugate, at, new, z, z_new, g_old, trial.direction, slope)
            d_new = beta * trial.direction - z_new
        else:
            d_new, since = -z_new, 0
        slope_new, length_new = _slope_and_length(objective, new, d_new)
        if not slope_new < 0 and since:
            d_new, since = -z_new, 0
            slope_new, length_new = _slope_and_length(objective, new, d_new)
        trial_step = first_step(options, at.value, slope, trial.step, new.value, slope_new)
        at, z, d, slope, length = new, z_new, d_new, slope_new, length_new
        objective.record(at, moved, direction=d, since=since, trial_step=trial_step)


def _slope_and_length(objective: Objective, at: Iterate, d: Tensor) -> tuple[float, float]:
    pair = [objective.inner(at.x, at.gradient, d), objective.inner(at.x, d, d)]
    slope, square = torch.stack(pair).tolist()
    return slope, math.sqrt(max(square, 0.0))


def _beta(
    objective: Objective,
    options: ConjugateGradientOptions,
    old: Iterate,
    new: Iterate,
    z_old: Tensor,
    z_new: Tensor,
    g_old: Tensor,
    d_old: Tensor,
    slope_old: float,
) -> Tensor:
    """Weight of the last direction, on the device: no decision hangs on it."""
    inner = objective.inner
    change = new.gradient - g_old
    above = inner(new.x, z_new, change)
    if options.beta_rule == "hestenes_stiefel":
        below = inner(new.x, change, d_old)
    else:
        below = inner(old.x, old.gradient, z_old)
    beta = torch.where(below > 0, above / below, 0.0).clamp_min(0.0)
    if math.isfinite(options.restart):
        overlap = inner(new.x, g_old, z_new).abs()
        beta = torch.where(
            overlap >= options.restart * inner(new.x, new.gradient, z_new), 0.0, beta
        )
    return beta


def first_step(
    options: SteepestDescentOptions,
    value: float,
    slope: float,
    step: float,
    new_value: float,
    new_slope: float,
) -> float:
    """The first trial step of the next search, from how the last one went."""
    if new_slope == 0:
        return step
    by_slopes = step * slope / new_slope
    if options.first_step == "decrease" and new_value < value:
        return 2 * (new_value - value) / new_slope
    return by_slopes
