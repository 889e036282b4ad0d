"""Errors along curves on a manifold, and the order at which each falls."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sttp_manifold.checks.place import Place, norm
from sttp_manifold.checks.slopes import Slope
from sttp_manifold.errors import ManifoldError
from sttp_manifold.manifolds.cost import ManifoldCost
from sttp_manifold.manifolds.geometry import plain

__all__ = [
    "Curve",
    "field_model",
    "first_order",
    "model",
    "returns",
    "second_order",
    "without_acceleration",
]

Curve = Callable[[Tensor, Tensor], Tensor]
"""A retraction or the exponential map: ``(x, u) -> y``."""


def returns(place: Place, curve: Curve) -> float:
    """How far a curve starts from its point."""
    there = place.ambient.point(plain(curve(place.x, torch.zeros_like(place.x))))
    return place.same(there, place.ambient.point(place.x))


def _displacement(place: Place, u: Tensor, curve: Curve) -> Callable[[float], Tensor]:
    start, velocity = place.ambient.point(place.x), place.velocity(u)
    return lambda t: place.ambient.point(plain(curve(place.x, t * u))) - start - t * velocity


def first_order(place: Place, u: Tensor, curve: Curve) -> Slope:
    """The error of a curve against the straight line, ``>= 2`` for a retraction."""
    displacement = _displacement(place, u, curve)
    size, speed = norm(place.ambient.point(place.x)), norm(place.velocity(u))
    return place.slope(
        "|R(tu) - x - tu|", lambda t: (norm(displacement(t)), size + abs(t) * speed), 2
    )


def second_order(place: Place, u: Tensor, curve: Curve) -> Slope:
    """The acceleration of a curve, ``>= 3`` where it has none.

    Raises:
        ManifoldError: a metric that is not that of the ambient space, and no exponential map.
    """
    size, speed = norm(place.ambient.point(place.x)), norm(place.velocity(u))
    if place.is_euclidean(u):
        displacement = _displacement(place, u, curve)
        return place.slope(
            "|P(R(tu) - x - tu)|",
            lambda t: (
                norm(place.ambient.tangential(place.x, displacement(t))),
                size + abs(t) * speed,
            ),
            3,
        )

    def from_geodesic(t: float) -> tuple[float, float]:
        there = place.ambient.point(plain(curve(place.x, t * u)))
        exact = place.ambient.point(plain(place.manifold.expmap(place.x, t * u)))
        return norm(there - exact), size + abs(t) * speed

    place.notes.append("the metric is not that of the ambient space: compared to expmap")
    try:
        return place.slope("|R(tu) - Exp(tu)|", from_geodesic, 3)
    except NotImplementedError:
        raise ManifoldError(
            f"the second order is not known on {place.manifold!r}: its metric is not that of the "
            "ambient space and it has no expmap; check_retraction(M, order=1) needs neither"
        ) from None


def model(
    place: Place,
    f: ManifoldCost,
    u: Tensor,
    curve: Curve,
    name: str,
    grad: Tensor,
    derivative: Tensor,
    H_u: Tensor | None = None,
) -> Slope:
    """The error of a Taylor model of a cost along a curve: linear, or quadratic with ``H_u``."""
    value = float(f.value(place.x))
    first = place.inner(grad, u)
    second = 0.0 if H_u is None else place.inner(H_u, u)
    # A point is rounded as well; what that does to the cost is all there is at a zero of the cost.
    radius = norm(place.ambient.point(place.x))
    slack = abs(value) + radius * norm(derivative)

    def error(t: float) -> tuple[float, float]:
        there = float(f.value(plain(curve(place.x, t * u))))
        terms = t * first, t**2 / 2 * second
        size = slack + abs(there) + sum(map(abs, terms)) + radius * abs(t * second)
        return abs(there - value - sum(terms)), size

    return place.slope(name, error, 2 if H_u is None else 3)


def field_model(
    place: Place, f: ManifoldCost, u: Tensor, grad: Tensor, derivative: Tensor, H_u: Tensor
) -> Slope:
    """The tangential error of the linear model of a gradient field along the retraction."""
    start, second = place.velocity(grad), place.velocity(H_u)
    radius = norm(place.ambient.point(place.x))
    scale = norm(start) + norm(derivative) + norm(second) * radius

    def error(t: float) -> tuple[float, float]:
        y = plain(place.manifold.retr(place.x, t * u))
        there = place.ambient.velocity(y, plain(f.gradient(y)[1]))
        moved = place.ambient.tangential(place.x, there - start - t * second)
        return norm(moved), scale + norm(there)

    return place.slope("|P(grad f(R(tu)) - grad f(x)) - t Hess[u]|", error, 2)


def without_acceleration(place: Place, u: Tensor, euclidean: bool, critical: bool) -> Curve | None:
    """A curve along which the second derivative of a cost is its Hessian, if there is one."""
    manifold = place.manifold
    if critical:
        place.notes.append("c is retr: the point is critical")
        return manifold.retr
    if euclidean and second_order(place, u, manifold.retr).passed:
        place.notes.append("c is retr, which is of second order here")
        return manifold.retr
    try:
        manifold.expmap(place.x, u)
        if not euclidean or second_order(place, u, manifold.expmap).passed:
            place.notes.append("c is expmap")
            return manifold.expmap
    except NotImplementedError:
        pass
    place.notes.append("retr is of first order and there is no expmap: no model of second order")
    return None
