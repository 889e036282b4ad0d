r"""Riemannian trust regions (Absil, Baker & Gallivan 2007; Conn, Gould & Toint 2000)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sttp_manifold.manifolds.contract import HasScale, LinearMap
from sttp_manifold.manifolds.geometry import wide
from sttp_manifold.optim._objective import Iterate, Objective
from sttp_manifold.optim._options import TrustRegionOptions

__all__ = ["trust_regions"]

# The radius falls by 4 each time: to 1e-24 of what it was.
_MOST_REJECTED = 40


class _Step(NamedTuple):
    vector: Tensor
    predicted: float
    slope: float
    length: float
    at_boundary: bool


def trust_regions(objective: Objective, at: Iterate, options: TrustRegionOptions) -> None:
    """Run until the objective stops it."""
    own = objective.own
    size, largest = _lengths(objective, at)
    largest = own.get("largest", options.max_radius or largest)
    radius = own.get("radius", min(options.initial_radius or size / 8, largest))
    first_norm = own.get("first_norm", at.grad_norm)
    hessian = objective.hessian(at)
    rejected = 0
    while True:
        step = _steihaug_toint(objective, at, hessian, radius, first_norm, options)
        y = objective.retr(at.x, step.vector)
        evaluation = objective.cost.at(y, curvature=True)
        value = float(evaluation.value)
        new: Iterate | None = None
        decrease = at.value - value
        unseen = objective.resolution(at.value) / 100 * options.rho_regularization
        if max(abs(decrease), abs(step.predicted)) <= unseen:
            # The trapezoid rule on the slopes at both ends has no cancellation.
            new = objective.iterate(evaluation)
            moved = objective.transp(at.x, y, step.vector)
            decrease = -(step.slope + float(objective.inner(y, new.gradient, moved))) / 2
        rho = decrease / step.predicted if step.predicted > 0 else -math.inf
        if not math.isfinite(value):
            rho = -math.inf
        if not rho >= 0.25:
            radius /= 4
        elif rho > 0.75 and step.at_boundary:
            if 2 * radius > largest and options.max_radius is None:
                # Far from the start, where points are longer, so are steps.
                largest = max(largest, _lengths(objective, at)[1])
            radius = min(2 * radius, largest)
        if rho > options.accept:
            rejected = 0
            at = new or objective.iterate(evaluation)
            objective.record(at, step.length, radius=radius, largest=largest, first_norm=first_norm)
            hessian = objective.hessian(at)
        else:
            rejected += 1
            if rejected == _MOST_REJECTED:
                raise objective.stalled(at, "no trust region is small enough for its model")


def _lengths(objective: Objective, at: Iterate) -> tuple[float, float]:
    """How long a step is that changes all of a point, and the longest to be tried from there."""
    base = objective.geometry.base
    root = math.sqrt(at.x.numel())
    if isinstance(base, HasScale):
        # A batch is one point of a product, whose lengths add up by their squares.
        size = objective.geometry.scale * float(torch.linalg.vector_norm(base.typical_dist(at.x)))
        largest = 10 * size
    else:
        # Longer points than those of spheres and frames have room around them.
        length = float(torch.linalg.vector_norm(wide(at.x)))
        size = max(root, length)
        largest = root if length <= root else 10 * length
    return size, largest


def _steihaug_toint(
    objective: Objective,
    at: Iterate,
    hessian: LinearMap,
    radius: float,
    first_norm: float,
    options: TrustRegionOptions,
) -> _Step:
    """Minimize the model within the radius by conjugate gradients.

    One wait for the device a product: what would follow a step inside of the region is computed
    along with the numbers that decide whether there is one.
    """
    inner, x, gradient = objective.inner, at.x, at.gradient
    eta = heta = torch.zeros_like(gradient)
    residual = gradient
    z = options.precondition(x, residual)
    d = -z
    z_r = float(inner(x, z, residual))
    options.check_definite(z_r)
    # Squares and products in the metric of the preconditioner (Conn, Gould & Toint, 7.5.6-7).
    e_e, e_d, d_d = 0.0, 0.0, z_r
    target = at.grad_norm * min(options.kappa, (at.grad_norm / first_norm) ** options.theta)
    # Below these a residual is rounding, or of no use. To go on would follow directions in which
    # the Hessian is singular (those of a gauge) as far as the radius allows.
    target = max(
        target,
        min(
            options.kappa * at.grad_norm,
            max(
                options.kappa * objective.gradient_tolerance,
                10 * torch.finfo(x.dtype).eps * first_norm,
            ),
        ),
    )
    model, at_boundary = 0.0, False
    for _ in range(options.max_inner or at.x.numel()):
        hd = hessian(d)
        d_hd = inner(x, d, hd)
        alpha = z_r / d_hd
        eta_, heta_, residual_ = eta + alpha * d, heta + alpha * hd, residual + alpha * hd
        z_ = options.precondition(x, residual_)
        terms = [
            d_hd,
            inner(x, z_, residual_),
            inner(x, residual_, residual_),
            inner(x, eta_, gradient) + inner(x, eta_, heta_) / 2,
        ]
        curvature, z_r_, square, model_ = torch.stack(terms).tolist()
        if not math.isfinite(curvature):
            break
        step = z_r / curvature if curvature > 0 else math.inf
        if curvature <= 0 or e_e + 2 * step * e_d + step * step * d_d >= radius * radius:
            tau = (-e_d + math.sqrt(e_d * e_d + d_d * max(radius * radius - e_e, 0.0))) / d_d
            eta, heta, at_boundary = eta + tau * d, heta + tau * hd, True
            break
        if not model_ < model:
            break
        eta, heta, residual, z, model = eta_, heta_, residual_, z_, model_
        if math.sqrt(max(square, 0.0)) <= target:
            break
        beta = z_r_ / z_r
        e_e += 2 * step * e_d + step * step * d_d
        e_d = beta * (e_d + step * d_d)
        d_d = z_r_ + beta * beta * d_d
        z_r = z_r_
        d = beta * d - z
    terms = [inner(x, eta, gradient), inner(x, eta, heta), inner(x, eta, eta)]
    slope, bend, square = torch.stack(terms).tolist()
    return _Step(eta, -(slope + bend / 2), slope, math.sqrt(max(square, 0.0)), at_boundary)
