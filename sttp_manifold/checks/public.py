r"""Numerical checks of any manifold, its retraction and its transport.

They are for whoever writes a manifold by hand, and for whoever doubts one. Each takes a geoopt
manifold or one of this package, measures laws that have to hold up to rounding and errors that have
to fall as a power of the step, and returns a :class:`CheckResult`: true if all passed, readable
when printed, with ``.plot()`` for the log-log figure. Nothing is raised unless asked, by
``raises=True`` or ``.raise_if_failed()``.

All quantities of points and vectors are compared where the manifold lies: in the space of its
tensors, or of dense weights for manifolds whose points are defined up to a gauge.

References: Absil, Mahony & Sepulchre 2008, chapters 4, 5 and 8; Boumal 2023, sections 4.8 and 6.8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sttp_manifold._arguments import explained
from sttp_manifold._geoopt import Manifold
from sttp_manifold.checks.curves import first_order, returns, second_order
from sttp_manifold.checks.laws import manifold_laws, point_laws, transport_laws
from sttp_manifold.checks.place import Place, norm, place_at
from sttp_manifold.checks.result import CheckResult
from sttp_manifold.errors import ManifoldError
from sttp_manifold.manifolds.geometry import plain

__all__ = ["check_manifold", "check_retraction", "check_vector_transport"]


@explained
def check_manifold(
    manifold: Manifold,
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
        manifold: a geoopt manifold, or one of this package.
        x: the point, which may have batch dimensions; a random one if absent.
        size: shape of the random point, for manifolds of points of any shape.
        dtype: of the random point; that of the manifold's own parameters, else ``float64``, if
            absent. In ``float32`` the tolerances are wider.
        device: of the random point.
        seed: of everything that is drawn. The global generators are left as they were.
        raises: raise if the check fails.

    Shape:
        - x: a point of ``manifold``, ``(*b, ...)``

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
    place = Place(manifold, x, size, dtype, device, seed)
    u = place.tangent()
    point_laws(place)
    manifold_laws(place, u)
    transport_laws(place, u, place.tangent())
    result = place.result("check_manifold", first_order(place, u, manifold.retr))
    return result.raise_if_failed() if raises else result


@explained
def check_retraction(
    manifold: Manifold,
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
    r"""Check the order of ``manifold.retr``.

    First order: :math:`|R_x(tu) - x - tu|` falls as :math:`t^2` in the ambient space. Second order
    in addition: the acceleration of :math:`t \mapsto R_x(tu)` vanishes at zero. On a Riemannian
    submanifold that is its tangential part, so
    :math:`|P_x(R_x(tu) - x - tu)|` falls as :math:`t^3`. Whether the metric is that of the ambient
    space is measured; where it is not, the retraction is compared to ``manifold.expmap``, which is
    then taken at its word: :math:`|R_x(tu) - \operatorname{Exp}_x(tu)|` falls as :math:`t^3`.

    Args:
        manifold: a geoopt manifold, or one of this package.
        x: the point; a random one if absent.
        u: a tangent vector at ``x``, taken at unit length; a random one if absent.
        order: 1 or 2.
        size: shape of the random point, for manifolds of points of any shape.
        dtype: of the random point, as for :func:`check_manifold`.
        device: of the random point.
        seed: of everything that is drawn.
        raises: raise if the check fails.

    Shape:
        - x, u: a point and a tangent vector of ``manifold``, ``(*b, ...)``

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
    place, u = place_at(manifold, x, u, size, dtype, device, seed)
    place.law("retr(x, 0) is x", lambda: returns(place, manifold.retr))
    y = plain(manifold.retr(place.x, 0.1 * u))
    place.law("retr lands on the manifold", lambda: place.off_manifold(y))
    slopes = [first_order(place, u, manifold.retr)]
    if order == 2:
        slopes.append(second_order(place, u, manifold.retr))
    result = place.result("check_retraction", *slopes)
    return result.raise_if_failed() if raises else result


@explained
def check_vector_transport(
    manifold: Manifold,
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
        manifold: a geoopt manifold, or one of this package.
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
        - x, u, v: a point and tangent vectors of ``manifold``, ``(*b, ...)``

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
    place, u = place_at(manifold, x, u, size, dtype, device, seed)
    if v is not None and x is None:
        raise ManifoldError("v is tangent at a point: give x as well")
    v = place.direction(v, "v")
    transport_laws(place, u, v)
    if isometric:
        y, moved = manifold.retr_transp(place.x, u, v)
        place.law("transport keeps lengths", lambda: abs(place.inner(moved, moved, y) - 1))
    start = place.velocity(v)

    def change(t: float) -> Tensor:
        y = plain(manifold.retr(place.x, t * u))
        moved = plain(manifold.transp_follow_retr(place.x, t * u, v))
        return place.ambient.velocity(y, moved) - start

    length = norm(start)
    slopes = [place.slope("|T(tu) v - v|", lambda t: (norm(change(t)), length), 1)]
    if order == 2:
        if not place.is_euclidean(u):
            raise ManifoldError(
                f"order=2 compares in the ambient space, whose metric is not that of {manifold!r}; "
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
