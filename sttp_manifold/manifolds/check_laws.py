"""The laws that the checks measure, one short measurement each."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sttp_manifold.manifolds.check_result import Law
from sttp_manifold.manifolds.cost import plain
from sttp_manifold.manifolds.site import Site, norm

__all__ = ["gradient_laws", "hessian_laws", "manifold_laws", "point_laws", "transport_laws"]

# Above so many numbers in a point the rank of the projection is not computed.
_RANK_LIMIT = 256
# Coefficients of linear combinations.
_A, _B = 0.7, -1.3


def point_laws(site: Site) -> None:
    """Where points come from, and what a projection of points does."""
    M, x = site.M, site.x
    size = tuple(x.shape)

    def random() -> float:
        with site.seeded(x.device):
            return site.off_manifold(site.random(size, x.dtype, x.device))

    def projected() -> float:
        y = site.normal()
        y = x + 0.1 * norm(x) / max(norm(y), 1e-300) * y
        return site.off_manifold(plain(M.projx(y)))

    site.law("x is on the manifold", lambda: site.off_manifold(x))
    site.law("random is on the manifold", random)
    site.law(
        "origin is on the manifold",
        lambda: site.off_manifold(plain(M.origin(*size, dtype=x.dtype, device=x.device))),
    )
    point = site.ambient.point
    site.law("projx leaves points", lambda: site.same(point(plain(M.projx(x))), point(x)))
    site.law("projx lands on the manifold", projected)


def manifold_laws(site: Site, u: Tensor) -> None:
    """Projection, metric, gradient, dimension, batches; and where the retraction lands."""
    M, x = site.M, site.x
    e, f = site.normal(), site.normal()
    pe, pf = plain(M.proju(x, e)), plain(M.proju(x, f))
    size = norm(e) * norm(f)
    site.law(
        "proju is linear",
        lambda: site.same(M.proju(x, _A * e + _B * f), _A * pe + _B * pf, norm(e)),
    )
    site.law("proju is idempotent", lambda: site.same(M.proju(x, pe), pe, norm(e)))
    site.law("proju lands in the tangent space", lambda: site.off_tangent(x, pe, norm(e)))
    metric = max(site.inner(e, e), size)
    site.law("proju is self-adjoint", lambda: abs(site.inner(pe, f) - site.inner(e, pf)) / metric)
    _metric_laws(site, [site.tangent() for _ in range(4)])
    Z = site.normal(site.ambient.point(x))
    gradient = site.ambient.gradient_of_linear(x, Z)
    site.law("egrad2rgrad is tangent", lambda: site.off_tangent(x, gradient))
    site.law(
        "egrad2rgrad is the gradient",
        lambda: (
            abs(site.inner(gradient, u) - float((Z * site.velocity(u)).sum()))
            / max(norm(Z) * norm(site.velocity(u)), 1e-300)
        ),
    )
    site.law("retr lands on the manifold", lambda: site.off_manifold(plain(M.retr(x, 0.1 * u))))
    site.law("arguments are left as they are", lambda: _overwritten(site, u))
    _dimension_law(site)
    _batch_laws(site)


def _overwritten(site: Site, u: Tensor) -> float:
    # Fresh numbers: those of before may be overwritten already, and stay the same from then on.
    arguments = [site.x.clone(), site.normal(), u.clone()]
    x, e, u = arguments
    before = [a.clone() for a in arguments]
    for operation, vector in (
        (site.M.proju, e),
        (site.M.egrad2rgrad, e),
        (site.M.inner, u),
        (site.M.retr, u),
    ):
        operation(x, vector)
    return max(site.same(a, b) for a, b in zip(arguments, before, strict=True))


def gradient_laws(site: Site, grad: Tensor, derivative: Tensor) -> None:
    """A gradient is tangent; where vectors are velocities it is also seen without any curve."""
    floor = site.floor * norm(derivative)
    site.law("grad is tangent", lambda: site.off_tangent(site.x, grad, norm(grad) + floor))
    if site.ambient.dense:
        site.skipped.append(("<grad, v> is Df(x)[v]", "vectors are no rates of stored numbers"))
        return
    v = site.tangent()
    scale = max(norm(derivative) * norm(v), 1e-300)
    site.law(
        "<grad, v> is Df(x)[v]",
        lambda: abs(site.inner(grad, v) - float((derivative * v).sum())) / scale,
    )


def hessian_laws(
    site: Site, apply: Callable[[Tensor], Tensor], u: Tensor, H_u: Tensor, floor: float
) -> None:
    """A Hessian is a linear map of tangent vectors, symmetric in the metric."""
    v = site.tangent()
    H_v = plain(apply(v))
    lengths = [math.sqrt(max(site.inner(w, w), 0.0)) for w in (H_u, H_v)]
    scale = sum(lengths) + floor
    mixed = plain(apply(_A * u + _B * v))
    site.law("Hess[u] is tangent", lambda: site.off_tangent(site.x, H_u, norm(H_u) + floor))
    site.law(
        "Hess is linear",
        lambda: site.same(mixed, _A * H_u + _B * H_v, norm(H_u) + norm(H_v) + floor),
    )
    site.law(
        "Hess is symmetric",
        lambda: abs(site.inner(H_u, v) - site.inner(u, H_v)) / max(scale, 1e-300),
    )


def transport_laws(site: Site, u: Tensor, v: Tensor) -> None:
    """Where a transport lands, that it is linear, and that its three forms agree."""
    M, x = site.M, site.x
    u = 0.3 * u
    w = site.tangent()
    y = plain(M.retr(x, u))
    try:
        moved = plain(M.transp_follow_retr(x, u, v))
    except NotImplementedError:
        site.skipped.append(("transport", "not implemented"))
        return
    site.law("transport lands in the tangent space", lambda: site.off_tangent(y, moved, norm(v)))

    def linear() -> float:
        other = plain(M.transp_follow_retr(x, u, w))
        both = plain(M.transp_follow_retr(x, u, _A * v + _B * w))
        return site.same(both, _A * moved + _B * other, norm(v) + norm(w))

    def at_zero() -> float:
        zero = torch.zeros_like(u)
        stays = plain(M.transp_follow_retr(x, zero, v))
        x0 = plain(M.retr(x, zero))
        return site.same(site.ambient.velocity(x0, stays), site.velocity(v))

    def at_once() -> float:
        z, carried = map(plain, M.retr_transp(x, u, v))
        point, velocity = site.ambient.point, site.ambient.velocity
        if z.shape != y.shape or carried.shape != moved.shape:
            return float("inf")
        return max(
            site.same(point(z), point(y)), site.same(velocity(z, carried), velocity(y, moved))
        )

    site.law("transport is linear", linear)
    site.law("transport is the identity at u = 0", at_zero)
    site.law("retr_transp is retr and transport", at_once)
    site.law(
        "transp_follow_retr is transp",
        lambda: site.same(plain(M.transp(x, y, v)), moved),
    )


def _metric_laws(site: Site, vectors: list[Tensor]) -> None:
    M, x = site.M, site.x
    u, v, w, _ = vectors
    rows = [[site.inner(a, b) for b in vectors] for a in vectors]
    gram = torch.tensor(rows, dtype=torch.float64)
    scale = max(float(gram.diagonal().max()), 1e-300)

    def positive() -> float:
        if any(norm(a) > 0 and site.inner(a, a) <= 0 for a in vectors):
            return 1.0
        return max(0.0, -float(torch.linalg.eigvalsh((gram + gram.mT) / 2)[0]) / scale)

    def bilinear() -> float:
        both = site.inner(_A * u + _B * w, v)
        return abs(both - _A * site.inner(u, v) - _B * site.inner(w, v)) / scale

    site.law("inner is symmetric", lambda: float((gram - gram.mT).abs().max()) / scale)
    site.law("inner is bilinear", bilinear)
    site.law("inner is positive", positive)
    site.law(
        "norm is the root of inner",
        lambda: site.same(M.norm(x, u), M.inner(x, u, u).clamp_min(0).sqrt()),
    )


def _dimension_law(site: Site) -> None:
    M = site.M
    dim = getattr(M, "total_dim", None) or getattr(M, "dim", None)
    name = "rank of proju is the dimension"
    shape = site.x.shape[site.x.ndim - M.ndim :]
    if not isinstance(dim, int):
        site.skipped.append((name, "no dim"))
        return
    if shape.numel() > _RANK_LIMIT:
        site.skipped.append((name, f"more than {_RANK_LIMIT} numbers"))
        return
    x = site.x.reshape(-1, *shape)[0]
    eye = torch.eye(shape.numel(), dtype=x.dtype, device=x.device)
    rows = torch.stack([plain(M.proju(x, e.reshape(shape))).flatten() for e in eye])
    rank = int(torch.linalg.matrix_rank(rows, rtol=max(site.tol, 1e-8)))
    site.law(name, lambda: float(abs(rank - dim)), f"{rank} of {dim}")


def _batch_laws(site: Site) -> None:
    """Three points with a vector each, and one point with three vectors, against one by one."""
    M, point, velocity = site.M, site.ambient.point, site.ambient.velocity
    x = site.x
    e = torch.stack([site.normal() for _ in range(3)])
    u = torch.stack([0.3 * site.unit(M.proju(x, one)) for one in e])

    def transported(at: Tensor, w: Tensor) -> Tensor:
        return velocity(plain(M.retr(at, w)), plain(M.transp_follow_retr(at, w, w)))

    operations: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Tensor]] = {
        "proju": (lambda at, w: plain(M.proju(at, w)), e),
        "egrad2rgrad": (lambda at, w: plain(M.egrad2rgrad(at, w)), e),
        "inner": (lambda at, w: M.inner(at, w), u),
        "retr": (lambda at, w: point(plain(M.retr(at, w))), u),
        "transport": (transported, u),
    }
    points = {"three points": torch.stack([x] * 3), "one point, three vectors": x}
    for name, (operation, vectors) in operations.items():
        title = f"{name} takes batches"
        try:
            alone = torch.stack([operation(x, one) for one in vectors])
        except NotImplementedError:
            site.skipped.append((title, "not implemented"))
            continue
        worst, detail = 0.0, ""
        for kind, at in points.items():
            gap, words = _gap(site, operation, at, vectors, alone)
            if not gap <= worst:
                worst, detail = gap, f"{kind}{words}" if gap > site.tol else ""
        site.laws.append(Law(title, worst, site.tol, detail))


def _gap(
    site: Site,
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
    return site.same(together.reshape(alone.shape), alone), ""
