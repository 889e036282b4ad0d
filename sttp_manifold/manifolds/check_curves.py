"""Errors along curves on a manifold, and the order at which each falls."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sttp_manifold.errors import ManifoldError
from sttp_manifold.manifolds.cost import ManifoldCost, plain
from sttp_manifold.manifolds.site import Site, norm
from sttp_manifold.manifolds.slopes import Slope

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


def returns(site: Site, curve: Curve) -> float:
    """How far a curve starts from its point."""
    there = site.ambient.point(plain(curve(site.x, torch.zeros_like(site.x))))
    return site.same(there, site.ambient.point(site.x))


def _displacement(site: Site, u: Tensor, curve: Curve) -> Callable[[float], Tensor]:
    start, velocity = site.ambient.point(site.x), site.velocity(u)
    return lambda t: site.ambient.point(plain(curve(site.x, t * u))) - start - t * velocity


def first_order(site: Site, u: Tensor, curve: Curve) -> Slope:
    """The error of a curve against the straight line, ``>= 2`` for a retraction."""
    displacement = _displacement(site, u, curve)
    size, speed = norm(site.ambient.point(site.x)), norm(site.velocity(u))
    return site.slope(
        "|R(tu) - x - tu|", lambda t: (norm(displacement(t)), size + abs(t) * speed), 2
    )


def second_order(site: Site, u: Tensor, curve: Curve) -> Slope:
    """The acceleration of a curve, ``>= 3`` where it has none.

    Raises:
        ManifoldError: a metric that is not that of the ambient space, and no exponential map.
    """
    size, speed = norm(site.ambient.point(site.x)), norm(site.velocity(u))
    if site.is_euclidean(u):
        displacement = _displacement(site, u, curve)
        return site.slope(
            "|P(R(tu) - x - tu)|",
            lambda t: (
                norm(site.ambient.tangential(site.x, displacement(t))),
                size + abs(t) * speed,
            ),
            3,
        )

    def from_geodesic(t: float) -> tuple[float, float]:
        there = site.ambient.point(plain(curve(site.x, t * u)))
        exact = site.ambient.point(plain(site.M.expmap(site.x, t * u)))
        return norm(there - exact), size + abs(t) * speed

    site.notes.append("the metric is not that of the ambient space: compared to expmap")
    try:
        return site.slope("|R(tu) - Exp(tu)|", from_geodesic, 3)
    except NotImplementedError:
        raise ManifoldError(
            f"the second order is not known on {site.M!r}: its metric is not that of the ambient "
            "space and it has no expmap; check_retraction(M, order=1) needs neither"
        ) from None


def model(
    site: Site,
    f: ManifoldCost,
    u: Tensor,
    curve: Curve,
    name: str,
    grad: Tensor,
    derivative: Tensor,
    H_u: Tensor | None = None,
) -> Slope:
    """The error of a Taylor model of a cost along a curve: linear, or quadratic with ``H_u``."""
    value = float(f.value(site.x))
    first = site.inner(grad, u)
    second = 0.0 if H_u is None else site.inner(H_u, u)
    # A point is rounded as well; what that does to the cost is all there is at a zero of the cost.
    place = norm(site.ambient.point(site.x))
    slack = abs(value) + place * norm(derivative)

    def error(t: float) -> tuple[float, float]:
        there = float(f.value(plain(curve(site.x, t * u))))
        terms = t * first, t**2 / 2 * second
        size = slack + abs(there) + sum(map(abs, terms)) + place * abs(t * second)
        return abs(there - value - sum(terms)), size

    return site.slope(name, error, 2 if H_u is None else 3)


def field_model(
    site: Site, f: ManifoldCost, u: Tensor, grad: Tensor, derivative: Tensor, H_u: Tensor
) -> Slope:
    """The tangential error of the linear model of a gradient field along the retraction."""
    start, second = site.velocity(grad), site.velocity(H_u)
    place = norm(site.ambient.point(site.x))
    scale = norm(start) + norm(derivative) + norm(second) * place

    def error(t: float) -> tuple[float, float]:
        y = plain(site.M.retr(site.x, t * u))
        there = site.ambient.velocity(y, plain(f.gradient(y)[1]))
        moved = site.ambient.tangential(site.x, there - start - t * second)
        return norm(moved), scale + norm(there)

    return site.slope("|P(grad f(R(tu)) - grad f(x)) - t Hess[u]|", error, 2)


def without_acceleration(site: Site, u: Tensor, euclidean: bool, critical: bool) -> Curve | None:
    """A curve along which the second derivative of a cost is its Hessian, if there is one."""
    M = site.M
    if critical:
        site.notes.append("c is retr: the point is critical")
        return M.retr
    if euclidean and second_order(site, u, M.retr).passed:
        site.notes.append("c is retr, which is of second order here")
        return M.retr
    try:
        M.expmap(site.x, u)
        if not euclidean or second_order(site, u, M.expmap).passed:
            site.notes.append("c is expmap")
            return M.expmap
    except NotImplementedError:
        pass
    site.notes.append("retr is of first order and there is no expmap: no model of second order")
    return None
