r"""Numerical checks of any manifold, retraction, transport, gradient and Hessian.

They are for whoever writes a manifold or a cost by hand, and for whoever doubts one. Each takes a
geoopt manifold or one of this package, measures laws that have to hold up to rounding and errors
that have to fall as a power of the step, and returns a :class:`CheckResult`: true if all passed,
readable when printed, with ``.plot()`` for the log-log figure. Nothing is raised unless asked, by
``raises=True`` or ``.raise_if_failed()``.

All quantities of points and vectors are compared where the manifold lies: in the space of its
tensors, or of dense weights for manifolds whose points are defined up to a gauge.

References: Absil, Mahony & Sepulchre 2008, chapters 4, 5 and 8; Boumal 2023, sections 4.8 and 6.8.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sttp_manifold.checks.ambient import euclidean_gradient
from sttp_manifold.checks.curves import (
    field_model,
    first_order,
    model,
    returns,
    second_order,
    without_acceleration,
)
from sttp_manifold.checks.laws import (
    gradient_laws,
    hessian_laws,
    manifold_laws,
    point_laws,
    transport_laws,
)
from sttp_manifold.checks.place import Place, norm
from sttp_manifold.checks.result import CheckResult
from sttp_manifold.errors import ManifoldError
from sttp_manifold.manifolds.cost import ManifoldCost, derivative
from sttp_manifold.manifolds.geometry import plain

__all__ = [
    "check_gradient",
    "check_hessian",
    "check_manifold",
    "check_retraction",
    "check_vector_transport",
]


def check_manifold(
    M: Any,
    x: Tensor | None = None,
    *,
    size: tuple[int, ...] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    raises: bool = False,
) -> CheckResult:
    r"""Check the laws of geoopt's contract at one point.

    - ``random``, ``origin`` and ``projx`` give points on the manifold; ``projx`` leaves points.
    - ``proju`` is linear, idempotent, self-adjoint in the metric, and lands in the tangent space;
      its rank is the dimension, where the manifold states one (``total_dim``, else ``dim``) and
      the point has at most 256 numbers.
    - ``inner`` is symmetric, bilinear and positive; ``norm`` is its root.
    - ``egrad2rgrad`` gives the gradient:
      :math:`\langle \operatorname{grad} f, u\rangle_x = Df(x)[u]`, and tangent.
    - ``retr`` lands on the manifold, with a slope of at least 2, see :func:`check_retraction`.
    - the transport lands in the tangent space, see :func:`check_vector_transport`.
    - a batch of vectors or points is treated as each would be by itself.

    Args:
        M: a geoopt manifold, or one of this package.
        x: the point, which may have batch dimensions; a random one if absent.
        size: shape of the random point, for manifolds of points of any shape.
        dtype: of the random point; that of the manifold's own parameters, else ``float64``, if
            absent. In ``float32`` the tolerances are wider.
        device: of the random point.
        seed: of everything that is drawn. The global generators are left as they were.
        raises: raise if the check fails.

    Shape:
        - x: a point of ``M``, ``(*b, ...)``

    Raises:
        CheckError: if it fails and ``raises``.
        ManifoldError: a point off the manifold, or neither a point nor a size where one is needed.

    Example:
        >>> from sttp_manifold._geoopt import geoopt
        >>> bool(check_manifold(geoopt.Sphere(), size=(4,)))
        True
        >>> [part.name for part in check_manifold(geoopt.Stiefel(), size=(4, 2)).failures]
        ['proju is idempotent', '|R(tu) - x - tu|']
    """
    place = Place(M, x, size, dtype, device, seed)
    u = place.tangent()
    point_laws(place)
    manifold_laws(place, u)
    transport_laws(place, u, place.tangent())
    result = place.result("check_manifold", first_order(place, u, M.retr))
    return result.raise_if_failed() if raises else result


def check_retraction(
    M: Any,
    x: Tensor | None = None,
    u: Tensor | None = None,
    *,
    order: int = 1,
    size: tuple[int, ...] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    raises: bool = False,
) -> CheckResult:
    r"""Check the order of ``M.retr``.

    First order: :math:`|R_x(tu) - x - tu|` falls as :math:`t^2` in the ambient space. Second order
    in addition: the acceleration of :math:`t \mapsto R_x(tu)` vanishes at zero. On a Riemannian
    submanifold that is its tangential part, so
    :math:`|P_x(R_x(tu) - x - tu)|` falls as :math:`t^3`. Whether the metric is that of the ambient
    space is measured; where it is not, the retraction is compared to ``M.expmap``, which is then
    taken at its word: :math:`|R_x(tu) - \operatorname{Exp}_x(tu)|` falls as :math:`t^3`.

    Args:
        M: a geoopt manifold, or one of this package.
        x: the point; a random one if absent.
        u: a tangent vector at ``x``, taken at unit length; a random one if absent.
        order: 1 or 2.
        size: shape of the random point, for manifolds of points of any shape.
        dtype: of the random point, as for :func:`check_manifold`.
        device: of the random point.
        seed: of everything that is drawn.
        raises: raise if the check fails.

    Shape:
        - x, u: a point and a tangent vector of ``M``, ``(*b, ...)``

    Raises:
        CheckError: if it fails and ``raises``.
        ManifoldError: another order; a point off the manifold, a vector that is not tangent; for
            the second order, a metric of its own without ``expmap``.

    Example:
        >>> from sttp_manifold._geoopt import EuclideanStiefel, geoopt
        >>> bool(check_retraction(geoopt.Sphere(), size=(5,), order=2))
        True
        >>> bool(check_retraction(EuclideanStiefel(), size=(5, 2), order=2))    # by QR
        False
    """
    if order not in (1, 2):
        raise ManifoldError(f"a retraction is checked for order=1 or order=2, not {order!r}")
    place, u = _start(M, x, u, size, dtype, device, seed)
    place.law("retr(x, 0) is x", lambda: returns(place, M.retr))
    y = plain(M.retr(place.x, 0.1 * u))
    place.law("retr lands on the manifold", lambda: place.off_manifold(y))
    slopes = [first_order(place, u, M.retr)]
    if order == 2:
        slopes.append(second_order(place, u, M.retr))
    result = place.result("check_retraction", *slopes)
    return result.raise_if_failed() if raises else result


def check_vector_transport(
    M: Any,
    x: Tensor | None = None,
    u: Tensor | None = None,
    v: Tensor | None = None,
    *,
    order: int = 1,
    isometric: bool = False,
    size: tuple[int, ...] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    raises: bool = False,
) -> CheckResult:
    r"""Check the transport of ``v`` along the retraction of ``u``.

    It lands in the tangent space at ``retr(x, u)``, is linear in ``v``, is the identity at
    ``u = 0``, and ``transp``, ``transp_follow_retr`` and ``retr_transp`` say the same; with
    :math:`T_{tu}` the transport along :math:`tu`, the ambient :math:`|T_{tu} v - v|` falls at least
    as :math:`t`. To that order every transport agrees with the differentiated retraction, since
    both start at the identity.

    Args:
        M: a geoopt manifold, or one of this package.
        x: the point; a random one if absent.
        u: the direction, a tangent vector at ``x`` taken at unit length; a random one if absent.
        v: what is transported, a tangent vector at ``x``; a random one if absent.
        order: 2 also asks that the tangential part :math:`|P_x(T_{tu} v - v)|` falls as
            :math:`t^2`, which is to agree with parallel transport to first order. On a Riemannian
            submanifold the transport by projection does; not every transport has to.
        isometric: also ask that lengths are kept.
        size: shape of the random point, for manifolds of points of any shape.
        dtype: of the random point, as for :func:`check_manifold`.
        device: of the random point.
        seed: of everything that is drawn.
        raises: raise if the check fails.

    Shape:
        - x, u, v: a point and tangent vectors of ``M``, ``(*b, ...)``

    Raises:
        CheckError: if it fails and ``raises``.
        ManifoldError: another order; a point off the manifold, a vector that is not tangent; for
            ``order=2``, a metric that is not that of the ambient space.

    Example:
        >>> from sttp_manifold._geoopt import EuclideanStiefel
        >>> result = check_vector_transport(EuclideanStiefel(), size=(5, 2), order=2)
        >>> result.passed, round(result.slope)
        (True, 2)
    """
    if order not in (1, 2):
        raise ManifoldError(f"a transport is checked for order=1 or order=2, not {order!r}")
    place, u = _start(M, x, u, size, dtype, device, seed)
    if v is not None and x is None:
        raise ManifoldError("v is tangent at a point: give x as well")
    v = place.direction(v, "v")
    transport_laws(place, u, v)
    if isometric:
        y, moved = M.retr_transp(place.x, u, v)
        place.law("transport keeps lengths", lambda: abs(place.inner(moved, moved, y) - 1))
    start = place.velocity(v)

    def change(t: float) -> Tensor:
        y = plain(M.retr(place.x, t * u))
        moved = plain(M.transp_follow_retr(place.x, t * u, v))
        return place.ambient.velocity(y, moved) - start

    length = norm(start)
    slopes = [place.slope("|T(tu) v - v|", lambda t: (norm(change(t)), length), 1)]
    if order == 2:
        if not place.is_euclidean(u):
            raise ManifoldError(
                f"order=2 compares in the ambient space, whose metric is not that of {M!r}; "
                "check_vector_transport(M, order=1) holds for any metric"
            )
        slopes.append(
            place.slope(
                "|P(T(tu) v - v)|",
                lambda t: (norm(place.ambient.tangential(place.x, change(t))), length),
                2,
            )
        )
    result = place.result("check_vector_transport", *slopes)
    return result.raise_if_failed() if raises else result


def check_gradient(
    M: Any,
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
    as :math:`t^2`. The curve is ``M.retr``: where that is no retraction the slope says so here as
    well, so see :func:`check_retraction` first.

    Args:
        M: a geoopt manifold, or one of this package.
        cost: a function of a :class:`~sttp_manifold.SpectralTT` on a manifold of weights, else of a
            point, to a scalar tensor.
        x: the point; a random one if absent.
        u: a tangent vector at ``x``, taken at unit length; a random one if absent.
        gradient: the gradient field to check; by default ``M.egrad2rgrad`` of the derivative by
            autograd.
        size: shape of the random point, for manifolds of points of any shape.
        dtype: of the random point, as for :func:`check_manifold`.
        device: of the random point.
        seed: of everything that is drawn.
        raises: raise if the check fails.

    Shape:
        - x, u: a point and a tangent vector of ``M``, ``(*b, ...)``

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
    place, u = _start(M, x, u, size, dtype, device, seed)
    f = _cost(place, cost)
    field = (lambda y: f.gradient(y)[1]) if gradient is None else gradient
    grad = plain(field(place.x))
    derivative = euclidean_gradient(f, place.x)
    gradient_laws(place, grad, derivative)
    slope = model(place, f, u, M.retr, "|f(R(tu)) - f(x) - t<grad, u>|", grad, derivative)
    result = place.result("check_gradient", slope)
    return result.raise_if_failed() if raises else result


def check_hessian(
    M: Any,
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
      ``c`` without acceleration: ``M.retr`` where it is of second order, which is measured, or
      where ``x`` is critical; else ``M.expmap``.
    - where the metric is that of the ambient space,
      :math:`|P_x(\operatorname{grad} f(R_x(tu)) - \operatorname{grad} f(x))
      - t \operatorname{Hess} f[u]|` as :math:`t^2`. It needs a retraction of first order only, and
      sees all of :math:`\operatorname{Hess} f[u]`, not just its part along ``u``.

    Where only one of them can be measured, a note says so.

    Args:
        M: a geoopt manifold, or one of this package.
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
        - x, u: a point and a tangent vector of ``M``, ``(*b, ...)``

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
    place, u = _start(M, x, u, size, dtype, device, seed)
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
            f"no Hessian can be checked on {M!r} at this point: its metric is not that of the "
            "ambient space and it has no expmap; at a critical point of the cost it can"
        )
    result = place.result("check_hessian", *slopes)
    return result.raise_if_failed() if raises else result


def _cost(place: Place, cost: Callable[..., Tensor]) -> ManifoldCost:
    """The cost to check; that autograd sees no dependence is worth a note, and no error."""
    f = ManifoldCost(place.M, cost, constant=True)
    leaf = place.x.clone().requires_grad_()
    with torch.enable_grad():
        if derivative(f(leaf), leaf) is None:
            place.notes.append(
                "autograd finds no way from the cost to its argument (.detach(), .data, .item(), "
                "numpy, torch.no_grad()): its gradient is zero"
            )
    return f


def _start(
    M: Any,
    x: Tensor | None,
    u: Tensor | None,
    size: tuple[int, ...] | None,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    seed: int,
) -> tuple[Place, Tensor]:
    if u is not None and x is None:
        raise ManifoldError("u is tangent at a point: give x as well")
    place = Place(M, x, size, dtype, device, seed)
    return place, place.direction(u)
