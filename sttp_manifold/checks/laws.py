"""The laws that the checks measure, one short measurement each."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sttp_manifold.checks.place import Place, norm
from sttp_manifold.checks.result import Law
from sttp_manifold.manifolds.contract import dimension_of
from sttp_manifold.manifolds.geometry import plain

__all__ = ["gradient_laws", "hessian_laws", "manifold_laws", "point_laws", "transport_laws"]

# Above so many numbers in a point the rank of the projection is not computed.
_RANK_LIMIT = 256
# Coefficients of linear combinations.
_A, _B = 0.7, -1.3


def point_laws(place: Place) -> None:
    """Where points come from, and what a projection of points does."""
    manifold, x = place.manifold, place.x
    size = tuple(x.shape)

    def random() -> float:
        with place.seeded(x.device):
            return place.off_manifold(place.random(size, x.dtype, x.device))

    def projected() -> float:
        y = place.normal()
        y = x + 0.1 * norm(x) / max(norm(y), 1e-300) * y
        return place.off_manifold(plain(manifold.projx(y)))

    place.law("x is on the manifold", lambda: place.off_manifold(x))
    place.law("random is on the manifold", random)
    place.law(
        "origin is on the manifold",
        lambda: place.off_manifold(plain(manifold.origin(*size, dtype=x.dtype, device=x.device))),
    )
    point = place.ambient.point
    place.law("projx leaves points", lambda: place.same(point(plain(manifold.projx(x))), point(x)))
    place.law("projx lands on the manifold", projected)


def manifold_laws(place: Place, u: Tensor) -> None:
    """Projection, metric, gradient, dimension, batches; and where the retraction lands."""
    manifold, x = place.manifold, place.x
    e, f = place.normal(), place.normal()
    pe, pf = plain(manifold.proju(x, e)), plain(manifold.proju(x, f))
    size = norm(e) * norm(f)
    place.law(
        "proju is linear",
        lambda: place.same(manifold.proju(x, _A * e + _B * f), _A * pe + _B * pf, norm(e)),
    )
    place.law("proju is idempotent", lambda: place.same(manifold.proju(x, pe), pe, norm(e)))
    place.law("proju lands in the tangent space", lambda: place.off_tangent(x, pe, norm(e)))
    metric = max(place.inner(e, e), size)
    place.law(
        "proju is self-adjoint", lambda: abs(place.inner(pe, f) - place.inner(e, pf)) / metric
    )
    _metric_laws(place, [place.tangent() for _ in range(4)])
    Z = place.normal(place.ambient.point(x))
    gradient = place.ambient.gradient_of_linear(x, Z)
    place.law("egrad2rgrad is tangent", lambda: place.off_tangent(x, gradient))
    place.law(
        "egrad2rgrad is the gradient",
        lambda: (
            abs(place.inner(gradient, u) - float((Z * place.velocity(u)).sum()))
            / max(norm(Z) * norm(place.velocity(u)), 1e-300)
        ),
    )
    place.law(
        "retr lands on the manifold", lambda: place.off_manifold(plain(manifold.retr(x, 0.1 * u)))
    )
    place.law("arguments are left as they are", lambda: _overwritten(place, u))
    _dimension_law(place)
    _batch_laws(place)


def _overwritten(place: Place, u: Tensor) -> float:
    # Fresh numbers: those of before may be overwritten already, and stay the same from then on.
    arguments = [place.x.clone(), place.normal(), u.clone()]
    x, e, u = arguments
    before = [a.clone() for a in arguments]
    for operation, vector in (
        (place.manifold.proju, e),
        (place.manifold.egrad2rgrad, e),
        (place.manifold.inner, u),
        (place.manifold.retr, u),
    ):
        operation(x, vector)
    return max(place.same(a, b) for a, b in zip(arguments, before, strict=True))


def gradient_laws(place: Place, grad: Tensor, derivative: Tensor) -> None:
    """A gradient is tangent; where vectors are velocities it is also seen without any curve."""
    floor = place.floor * norm(derivative)
    place.law("grad is tangent", lambda: place.off_tangent(place.x, grad, norm(grad) + floor))
    if place.ambient.dense:
        place.skipped.append(("<grad, v> is Df(x)[v]", "vectors are no rates of stored numbers"))
        return
    v = place.tangent()
    scale = max(norm(derivative) * norm(v), 1e-300)
    place.law(
        "<grad, v> is Df(x)[v]",
        lambda: abs(place.inner(grad, v) - float((derivative * v).sum())) / scale,
    )


def hessian_laws(
    place: Place, apply: Callable[[Tensor], Tensor], u: Tensor, H_u: Tensor, floor: float
) -> None:
    """A Hessian is a linear map of tangent vectors, symmetric in the metric."""
    v = place.tangent()
    H_v = plain(apply(v))
    lengths = [math.sqrt(max(place.inner(w, w), 0.0)) for w in (H_u, H_v)]
    scale = sum(lengths) + floor
    mixed = plain(apply(_A * u + _B * v))
    place.law("Hess[u] is tangent", lambda: place.off_tangent(place.x, H_u, norm(H_u) + floor))
    place.law(
        "Hess is linear",
        lambda: place.same(mixed, _A * H_u + _B * H_v, norm(H_u) + norm(H_v) + floor),
    )
    place.law(
        "Hess is symmetric",
        lambda: abs(place.inner(H_u, v) - place.inner(u, H_v)) / max(scale, 1e-300),
    )


def transport_laws(place: Place, u: Tensor, v: Tensor) -> None:
    """Where a transport lands, that it is linear, and that its three forms agree."""
    manifold, x = place.manifold, place.x
    u = 0.3 * u
    w = place.tangent()
    y = plain(manifold.retr(x, u))
    try:
        moved = plain(manifold.transp_follow_retr(x, u, v))
    except NotImplementedError:
        place.skipped.append(("transport", "not implemented"))
        return
    place.law("transport lands in the tangent space", lambda: place.off_tangent(y, moved, norm(v)))

    def linear() -> float:
        other = plain(manifold.transp_follow_retr(x, u, w))
        both = plain(manifold.transp_follow_retr(x, u, _A * v + _B * w))
        return place.same(both, _A * moved + _B * other, norm(v) + norm(w))

    def at_zero() -> float:
        zero = torch.zeros_like(u)
        stays = plain(manifold.transp_follow_retr(x, zero, v))
        x0 = plain(manifold.retr(x, zero))
        return place.same(place.ambient.velocity(x0, stays), place.velocity(v))

    def at_once() -> float:
        z, carried = map(plain, manifold.retr_transp(x, u, v))
        point, velocity = place.ambient.point, place.ambient.velocity
        if z.shape != y.shape or carried.shape != moved.shape:
            return float("inf")
        return max(
            place.same(point(z), point(y)), place.same(velocity(z, carried), velocity(y, moved))
        )

    place.law("transport is linear", linear)
    place.law("transport is the identity at u = 0", at_zero)
    place.law("retr_transp is retr and transport", at_once)
    place.law(
        "transp_follow_retr is transp",
        lambda: place.same(plain(manifold.transp(x, y, v)), moved),
    )


def _metric_laws(place: Place, vectors: list[Tensor]) -> None:
    manifold, x = place.manifold, place.x
    u, v, w, _ = vectors
    rows = [[place.inner(a, b) for b in vectors] for a in vectors]
    gram = torch.tensor(rows, dtype=torch.float64)
    scale = max(float(gram.diagonal().max()), 1e-300)

    def positive() -> float:
        if any(norm(a) > 0 and place.inner(a, a) <= 0 for a in vectors):
            return 1.0
        return max(0.0, -float(torch.linalg.eigvalsh((gram + gram.mT) / 2)[0]) / scale)

    def bilinear() -> float:
        both = place.inner(_A * u + _B * w, v)
        return abs(both - _A * place.inner(u, v) - _B * place.inner(w, v)) / scale

    place.law("inner is symmetric", lambda: float((gram - gram.mT).abs().max()) / scale)
    place.law("inner is bilinear", bilinear)
    place.law("inner is positive", positive)
    place.law(
        "norm is the root of inner",
        lambda: place.same(manifold.norm(x, u), manifold.inner(x, u, u).clamp_min(0).sqrt()),
    )


def _dimension_law(place: Place) -> None:
    manifold = place.manifold
    dim = dimension_of(manifold)
    name = "rank of proju is the dimension"
    shape = place.x.shape[place.x.ndim - manifold.ndim :]
    if dim is None:
        place.skipped.append((name, "no dim"))
        return
    if shape.numel() > _RANK_LIMIT:
        place.skipped.append((name, f"more than {_RANK_LIMIT} numbers"))
        return
    x = place.x.reshape(-1, *shape)[0]
    eye = torch.eye(shape.numel(), dtype=x.dtype, device=x.device)
    rows = torch.stack([plain(manifold.proju(x, e.reshape(shape))).flatten() for e in eye])
    rank = int(torch.linalg.matrix_rank(rows, rtol=max(place.tol, 1e-8)))
    place.law(name, lambda: float(abs(rank - dim)), f"{rank} of {dim}")


def _batch_laws(place: Place) -> None:
    """Three points with a vector each, and one point with three vectors, against one by one."""
    manifold, point, velocity = place.manifold, place.ambient.point, place.ambient.velocity
    x = place.x
    e = torch.stack([place.normal() for _ in range(3)])
    u = torch.stack([0.3 * place.unit(manifold.proju(x, one)) for one in e])

    def transported(at: Tensor, w: Tensor) -> Tensor:
        return velocity(plain(manifold.retr(at, w)), plain(manifold.transp_follow_retr(at, w, w)))

    operations: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Tensor]] = {
        "proju": (lambda at, w: plain(manifold.proju(at, w)), e),
        "egrad2rgrad": (lambda at, w: plain(manifold.egrad2rgrad(at, w)), e),
        "inner": (lambda at, w: manifold.inner(at, w), u),
        "retr": (lambda at, w: point(plain(manifold.retr(at, w))), u),
        "transport": (transported, u),
    }
    points = {"three points": torch.stack([x] * 3), "one point, three vectors": x}
    for name, (operation, vectors) in operations.items():
        title = f"{name} takes batches"
        try:
            alone = torch.stack([operation(x, one) for one in vectors])
        except NotImplementedError:
            place.skipped.append((title, "not implemented"))
            continue
        worst, detail = 0.0, ""
        for kind, at in points.items():
            gap, words = _gap(place, operation, at, vectors, alone)
            if not gap <= worst:
                worst, detail = gap, f"{kind}{words}" if gap > place.tol else ""
        place.laws.append(Law(title, worst, place.tol, detail))


def _gap(
    place: Place,
    operation: Callable[[Tensor, Tensor], Tensor],
    at: Tensor,
    vectors: Tensor,
    alone: Tensor,
) -> tuple[float, str]:
    try:
        together = operation(at, vectors)
    except (RuntimeError, ValueError, IndexError) as error:
        return math.inf, f": {str(error).splitlines()[0]}"
    # Some manifolds keep a dimension of one where there is no batch.
    if together.numel() != alone.numel():
        return math.inf, f": {tuple(together.shape)} for {tuple(alone.shape)}"
    return place.same(together.reshape(alone.shape), alone), ""
