r"""Numerical checks of gradients and Hessians of a cost, by the slopes of its Taylor models.

As in :mod:`sttp_manifold.checks.public`, a check returns a :class:`CheckResult` and raises only if
asked.

References: Boumal 2023, sections 4.8 and 6.8.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sttp_manifold._arguments import explained
from sttp_manifold._geoopt import Manifold
from sttp_manifold.checks.ambient import euclidean_gradient
from sttp_manifold.checks.curves import field_model, model, without_acceleration
from sttp_manifold.checks.laws import gradient_laws, hessian_laws
from sttp_manifold.checks.place import Place, norm, place_at
from sttp_manifold.checks.result import CheckResult
from sttp_manifold.errors import ManifoldError
from sttp_manifold.manifolds.cost import ManifoldCost, derivative
from sttp_manifold.manifolds.geometry import plain

__all__ = ["check_gradient", "check_hessian"]


@explained
def check_gradient(
    manifold: Manifold,
    cost: Callable[..., Tensor],
    x: Tensor | None = None,
    u: Tensor | None = None,
    *,
    gradient: Callable[[Tensor], Tensor] | None = None,
    size: tuple[int, ...] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    raises: bool = False,
) -> CheckResult:
    r"""Check the Riemannian gradient of a cost.

    It is tangent, and :math:`|f(R_x(tu)) - f(x) - t\langle\operatorname{grad} f, u\rangle|` falls
    as :math:`t^2`. The curve is ``manifold.retr``: where that is no retraction the slope says so
    here as well, so see :func:`check_retraction` first.

    Args:
        manifold: a geoopt manifold, or one of this package.
        cost: a function of a :class:`~sttp_manifold.SpectralTT` on a manifold of weights, else of a
            point, to a scalar tensor.
        x: the point; a random one if absent.
        u: a tangent vector at ``x``, taken at unit length; a random one if absent.
        gradient: the gradient field to check; by default ``manifold.egrad2rgrad`` of the
            derivative by autograd.
        size: shape of the random point, for manifolds of points of any shape.
        dtype: of the random point, as for :func:`check_manifold`.
        device: of the random point.
        seed: of everything that is drawn.
        raises: raise if the check fails.

    Shape:
        - x, u: a point and a tangent vector of ``manifold``, ``(*b, ...)``

    Raises:
        CheckError: if it fails and ``raises``.
        ManifoldError: a point off the manifold, a vector that is not tangent, a cost that is not
            a scalar.

    Example:
        >>> from sttp_manifold._geoopt import geoopt
        >>> result = check_gradient(geoopt.Sphere(), lambda x: x[0] * x[1] + x[2], size=(3,))
        >>> result.passed, round(result.slope)
        (True, 2)
        >>> wrong = lambda x: geoopt.Sphere().proju(x, torch.tensor([1.0, 0.0, 1.0]).double())
        >>> bool(check_gradient(geoopt.Sphere(), lambda x: x[0] * x[1] + x[2], size=(3,),
        ...                     gradient=wrong))
        False
    """
    place, u = place_at(manifold, x, u, size, dtype, device, seed)
    f = _cost(place, cost)
    field = (lambda y: f.gradient(y)[1]) if gradient is None else gradient
    grad = plain(field(place.x))
    derivative = euclidean_gradient(f, place.x)
    gradient_laws(place, grad, derivative)
    slope = model(place, f, u, manifold.retr, "|f(R(tu)) - f(x) - t<grad, u>|", grad, derivative)
    result = place.result("check_gradient", slope)
    return result.raise_if_failed() if raises else result


@explained
def check_hessian(
    manifold: Manifold,
    cost: Callable[..., Tensor],
    x: Tensor | None = None,
    u: Tensor | None = None,
    *,
    hessian: Callable[[Tensor, Tensor], Tensor] | None = None,
    size: tuple[int, ...] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    raises: bool = False,
) -> CheckResult:
    r"""Check the Riemannian Hessian of a cost.

    It is tangent, linear and symmetric, and two errors fall with the step:

    - :math:`|f(c(t)) - f(x) - t\langle\operatorname{grad} f, u\rangle
      - \tfrac{t^2}{2}\langle\operatorname{Hess} f[u], u\rangle|` as :math:`t^3`, along a curve
      ``c`` without acceleration: ``manifold.retr`` where it is of second order, which is measured,
      or where ``x`` is critical; else ``manifold.expmap``.
    - where the metric is that of the ambient space,
      :math:`|P_x(\operatorname{grad} f(R_x(tu)) - \operatorname{grad} f(x))
      - t \operatorname{Hess} f[u]|` as :math:`t^2`. It needs a retraction of first order only, and
      sees all of :math:`\operatorname{Hess} f[u]`, not just its part along ``u``.

    Where only one of them can be measured, a note says so.

    Args:
        manifold: a geoopt manifold, or one of this package.
        cost: a function of a :class:`~sttp_manifold.SpectralTT` on a manifold of weights, else of a
            point, to a scalar tensor, twice differentiable.
        x: the point; a random one if absent.
        u: a tangent vector at ``x``, taken at unit length; a random one if absent.
        hessian: the Hessian ``(x, u) -> Hess f(x)[u]`` to check; by default that of the manifold's
            ``hessian_operator``, or the one by autograd on a Riemannian submanifold that is known.
        size: shape of the random point, for manifolds of points of any shape.
        dtype: of the random point, as for :func:`check_manifold`.
        device: of the random point.
        seed: of everything that is drawn.
        raises: raise if the check fails.

    Shape:
        - x, u: a point and a tangent vector of ``manifold``, ``(*b, ...)``

    Raises:
        CheckError: if it fails and ``raises``.
        ManifoldError: a manifold whose Hessian is not known and not given, or where neither error
            can be measured; a point off the manifold, a vector that is not tangent, a cost that
            is not a scalar.

    Example:
        >>> from sttp_manifold._geoopt import EuclideanStiefel
        >>> A = torch.diag(torch.arange(5.0)).double()
        >>> result = check_hessian(EuclideanStiefel(), lambda x: (x * (A @ x)).sum(), size=(5, 2))
        >>> result.passed, [round(slope.found) for slope in result.slopes]
        (True, [2, 3])
    """
    place, u = place_at(manifold, x, u, size, dtype, device, seed)
    f = _cost(place, cost)
    grad = plain(f.gradient(place.x)[1])
    apply = f.hessian(place.x) if hessian is None else lambda w: plain(hessian(place.x, w))
    H_u = plain(apply(u))
    derivative = euclidean_gradient(f, place.x)
    # Rounding of an operator that is zero, or nearly, is seen against what it is computed from.
    floor = place.floor * norm(derivative)
    hessian_laws(place, apply, u, H_u, floor)
    slopes = []
    euclidean = place.is_euclidean(u)
    if euclidean:
        slopes.append(field_model(place, f, u, grad, derivative, H_u))
    else:
        place.notes.append("the metric is not that of the ambient space: gradients not compared")
    curve = without_acceleration(place, u, euclidean, norm(grad) <= place.tol * norm(derivative))
    if curve is not None:
        name = "|f(c(t)) - f(x) - t<grad, u> - t^2/2 <Hess[u], u>|"
        slopes.append(model(place, f, u, curve, name, grad, derivative, H_u))
    if not slopes:
        raise ManifoldError(
            f"no Hessian can be checked on {manifold!r} at this point: its metric is not that of "
            "the ambient space and it has no expmap; at a critical point of the cost it can"
        )
    result = place.result("check_hessian", *slopes)
    return result.raise_if_failed() if raises else result


def _cost(place: Place, cost: Callable[..., Tensor]) -> ManifoldCost:
    """The cost to check; that autograd sees no dependence is worth a note, and no error."""
    f = ManifoldCost(place.manifold, cost, constant=True)
    leaf = place.x.clone().requires_grad_()
    with torch.enable_grad():
        if derivative(f(leaf), leaf) is None:
            place.notes.append(
                "autograd finds no way from the cost to its argument (.detach(), .data, .item(), "
                "numpy, torch.no_grad()): its gradient is zero"
            )
    return f
