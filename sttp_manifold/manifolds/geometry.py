r"""A manifold as solvers and adapters call it: whole batches, plain tensors, numbers in range.

`geometry_of` gives the operations of any geoopt manifold under one convention. A batch of points is
one point of a product, so that inner products are summed over it; arguments have equal shapes and
are left as they are; what a manifold does not implement is an error that names it. Inner products
are computed so that they neither overflow nor underflow before their result does in float64.

Some of geoopt 0.5 needs help, and gets it here, in one class each:

===================================== ==========================================================
geoopt                                what is mended
===================================== ==========================================================
``inner`` of a batch                  ``PoincareBall`` gives all pairs without ``keepdim``
``Lorentz.egrad2rgrad``               overwrites the gradient that it is given
``EuclideanStiefelExact``,            leave the manifold little by little: each point is projected
``SphereExact``, ``Stiefel``
``Stiefel``                           (canonical) has no ``transp``; ``proju`` is no projection, and
                                      ``retr`` does not start along its vector
``BirkhoffPolytope``                  ``proju`` is the gradient map, not a projection, and of small
                                      vectors rounding; the gradient lacks a factor ``n``; points
                                      are right to 1e-5 only
``Scaled``                            ``egrad2rgrad`` is that of the manifold before scaling
products of these                     factor by factor
===================================== ==========================================================
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sttp_manifold._geoopt import Euclidean, EuclideanStiefel, ProductManifold, geoopt
from sttp_manifold.errors import ManifoldError
from sttp_manifold.manifolds.grouped import GroupedProduct
from sttp_manifold.manifolds.weight_points import WeightPoints

__all__ = ["AbsentError", "Geometry", "geometry_of", "is_embedded", "plain", "wide"]

# Newton's steps from geoopt's 1e-5; two or three do.
_MOST_BALANCING = 20


def plain(x: Tensor) -> Tensor:
    """The numbers of a point, outside of the graph and without geoopt's subclass.

    Shape:
        - x, output: any
    """
    return x.detach().as_subclass(Tensor)


def wide(t: Tensor) -> Tensor:
    """A tensor in float64, where its device has that.

    Shape:
        - t, output: any
    """
    return t if t.device.type == "mps" else t.double()


class AbsentError(ManifoldError, NotImplementedError):
    """An operation that a manifold does not implement. Also what geoopt and pymanopt raise then."""


class Geometry:
    """The operations of a manifold, for points and vectors of equal shapes.

    Args:
        manifold: a geoopt manifold, or one of this package.

    Attributes:
        manifold: as it was given.
        base: the same without geoopt's ``Scaled``: what may offer more, such as ``unpack``.
        scale: by how much lengths on ``base`` are multiplied.
    """

    def __init__(self, manifold: Any) -> None:
        self.manifold = manifold
        self.base = manifold
        self.scale: float = 1.0
        self._trusted = isinstance(manifold, WeightPoints)
        # A manifold written by hand may know single points only.
        self._batches = self._trusted or type(manifold).__module__.startswith("geoopt.")
        inner = getattr(type(manifold), "inner", None)
        self._flat = getattr(inner, "is_flat", False) or is_embedded(manifold)

    def inner(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """Inner product summed over all points of a batch, a scalar in float64.

        It is bilinear: vectors are brought to the size of one first, since squares of what float32
        can hold may be beyond it.
        """
        if self._flat:
            x, u, v = torch.broadcast_tensors(x, u, v)
            return torch.dot(wide(u).reshape(-1), wide(v).reshape(-1))
        a, b = _size(u), _size(v)
        # keepdim: without it, PoincareBall of geoopt 0.5 returns every pair of a batch.
        value = self._call("inner", x, u / a, v / b, keepdim=True).sum()
        return wide(value) * wide(a) * wide(b)

    def norm(self, x: Tensor, u: Tensor) -> Tensor:
        """Root of :meth:`inner` of a vector with itself."""
        return self.inner(x, u, u).clamp_min(0.0).sqrt()

    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        """Projection onto the tangent space."""
        return self._call("proju", x, u)

    def gradient(self, x: Tensor, u: Tensor) -> Tensor:
        """Riemannian gradient of a Euclidean one, which is left as it is."""
        return self._call("egrad2rgrad", x, u if self._trusted else u.clone())

    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        """Retraction; not a number where the step is too long to be computed."""
        try:
            return self._call("retr", x, u)
        except torch.linalg.LinAlgError:
            return torch.full_like(x, torch.nan)

    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Transport of one vector, or of a stack of them, from ``x`` to ``y``."""
        if v.ndim > x.ndim and not self._batches:
            return torch.stack([self.transp(x, y, one) for one in v])
        return self._call("transp", x, y, v)

    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        """Exponential map."""
        return self._call("expmap", x, u)

    def logmap(self, x: Tensor, y: Tensor) -> Tensor:
        """Logarithm."""
        return self._call("logmap", x, y)

    def dist(self, x: Tensor, y: Tensor) -> Tensor:
        """Distance, the root of the sum of squares over a batch."""
        return torch.linalg.vector_norm(wide(self._call("dist", x, y)))

    def projx(self, x: Tensor) -> Tensor:
        """A point near any tensor."""
        return self._call("projx", x)

    def _call(self, name: str, *tensors: Tensor, **options: Any) -> Tensor:
        if not self._trusted:
            # What takes one point and many vectors does not always take them right.
            tensors = tuple(torch.broadcast_tensors(*tensors))
        try:
            result: Tensor = getattr(self.manifold, name)(*tensors, **options)
        except NotImplementedError as error:
            raise AbsentError(_absent(self.manifold, name, str(error))) from error
        return result.as_subclass(Tensor)


def _absent(manifold: Any, name: str, said: str) -> str:
    arguments = {"transp": "x, y, v", "dist": "x, y", "logmap": "x, y", "projx": "x"}
    call = f"{type(manifold).__name__}.{name}({arguments.get(name, 'x, u')})"
    text = f"{call} is not implemented"
    if said:
        text += f" ({said.splitlines()[0]})"
    if name == "transp":
        return (
            f"{text}, and this method transports vectors; define it, transp(x, y, v) = proju(y, v) "
            "where nothing better is known"
        )
    return text


def _size(u: Tensor) -> Tensor:
    """The largest entry, one where all are zero or there are none."""
    largest = torch.linalg.vector_norm(u, torch.inf) if u.numel() else u.new_zeros(())
    return torch.where(largest > 0, largest, torch.ones_like(largest))


class _Drifting(Geometry):
    """A retraction that is exact but for rounding, which adds up over a run."""

    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        y = super().retr(x, u)
        return self.projx(y) if bool(torch.isfinite(y).all()) else y


class _Canonical(_Drifting):
    """geoopt's Stiefel(): the retraction starts twice as fast along the fibre of each frame."""

    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        turn = x.mT @ u
        return u - x @ (turn + turn.mT) / 2

    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        return super().retr(x, u - x @ (x.mT @ u) / 2)

    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        return self.proju(y, v)


class _Birkhoff(Geometry):
    r"""Doubly stochastic matrices in the Fisher metric :math:`\sum u v / (n x)`."""

    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        # geoopt's takes Euclidean gradients, which the metric multiplies by x first. It adds and
        # takes away ones, which leave nothing of small vectors.
        size = _size(u)
        return size * super().proju(x, u / size / x)

    def gradient(self, x: Tensor, u: Tensor) -> Tensor:
        size = _size(u)
        return x.shape[-1] * size * super().gradient(x, u / size)

    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        return self.proju(y, v)

    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        return _balance(super().retr(x, u))


def _balance(y: Tensor) -> Tensor:
    """Row and column sums to one, to rounding, by factors for rows and columns.

    Newton's method: near a vertex, where Sinkhorn's is slow, it is not.
    """
    n = y.shape[-1]
    # Equal and opposite factors change nothing; this fixes them.
    free = torch.cat((y.new_ones(n), -y.new_ones(n)))
    fixed = torch.outer(free, free) / (2 * n)
    for _ in range(_MOST_BALANCING):
        rows, columns = y.sum(-1), y.sum(-2)
        missing = 1 - torch.cat((rows, columns), -1)
        if not bool((missing.abs() > n * torch.finfo(y.dtype).eps).any()):
            break
        top = torch.cat((torch.diag_embed(rows), y), -1)
        bottom = torch.cat((y.mT, torch.diag_embed(columns)), -1)
        system = torch.cat((top, bottom), -2) + fixed
        factors, failed = torch.linalg.solve_ex(system, missing.unsqueeze(-1))
        if bool(failed.any()):
            break
        y = y * torch.exp(factors[..., :n, :] + factors[..., n:, :].mT)
    return y


class _Scaled(Geometry):
    """Lengths times a constant; vectors are as long as on the manifold before scaling.

    A vector ``u`` stands for the velocity ``u / scale``.
    """

    def __init__(self, manifold: Any) -> None:
        super().__init__(manifold)
        self._inside = geometry_of(manifold.base)
        self.base = self._inside.base
        self._by = float(manifold.scale.detach())
        self.scale = self._inside.scale * self._by

    def inner(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        return self._inside.inner(x, u, v)

    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        return self._inside.proju(x, u)

    def projx(self, x: Tensor) -> Tensor:
        return self._inside.projx(x)

    def gradient(self, x: Tensor, u: Tensor) -> Tensor:
        return self._inside.gradient(x, u) / self._by

    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        return self._inside.retr(x, u / self._by)

    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        return self._inside.expmap(x, u / self._by)

    def logmap(self, x: Tensor, y: Tensor) -> Tensor:
        return self._inside.logmap(x, y) * self._by

    def dist(self, x: Tensor, y: Tensor) -> Tensor:
        return self._inside.dist(x, y) * self._by

    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        return self._inside.transp(x, y, v)


class _Product(Geometry):
    """A product some of whose factors are mended."""

    def __init__(self, manifold: Any, factors: list[Geometry]) -> None:
        super().__init__(manifold)
        self._factors = factors

    def _parts(self, *tensors: Tensor) -> list[list[Tensor]]:
        tensors = tuple(torch.broadcast_tensors(*tensors))
        take = self.manifold.take_submanifold_value
        return [[take(t, k) for t in tensors] for k in range(len(self._factors))]

    def _call(self, name: str, *tensors: Tensor, **options: Any) -> Tensor:
        # The names of the operations are those of geoopt, but for the gradient's.
        name = "gradient" if name == "egrad2rgrad" else name
        batch = torch.broadcast_shapes(*(t.shape for t in tensors))[:-1]
        return torch.cat(
            [
                getattr(factor, name)(*parts).reshape(*batch, -1)
                for factor, parts in zip(self._factors, self._parts(*tensors), strict=True)
            ],
            -1,
        )

    def inner(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        parts = zip(self._factors, self._parts(x, u, v), strict=True)
        return torch.stack([factor.inner(*part) for factor, part in parts]).sum()

    def dist(self, x: Tensor, y: Tensor) -> Tensor:
        parts = zip(self._factors, self._parts(x, y), strict=True)
        return torch.linalg.vector_norm(torch.stack([f.dist(*part) for f, part in parts]))


_ASKED_FOR = ("inner", "proju", "egrad2rgrad", "retr")

_MENDED: dict[Any, type[Geometry]] = {
    geoopt.BirkhoffPolytope: _Birkhoff,
    geoopt.CanonicalStiefel: _Canonical,
    geoopt.EuclideanStiefelExact: _Drifting,
    geoopt.SphereExact: _Drifting,
}


def geometry_of(manifold: Any) -> Geometry:
    """The operations of a manifold, with what geoopt's own kinds of it need.

    A subclass that has its own retraction is taken at its word.

    Raises:
        ManifoldError: something that is no manifold.
    """
    if isinstance(manifold, type):
        raise ManifoldError(
            f"a manifold is wanted, but the class {manifold.__name__} came; "
            f"{manifold.__name__}(...) is one"
        )
    kind = type(manifold)
    missing = [name for name in _ASKED_FOR if not callable(getattr(manifold, name, None))]
    if missing:
        raise ManifoldError(
            f"a manifold has geoopt's {', '.join(_ASKED_FOR)}, but {kind.__name__} came, without "
            f"{', '.join(missing)}; SpectralTTManifold(shape) is one, geoopt.Sphere() another"
        )
    if isinstance(manifold, geoopt.Scaled):
        return _Scaled(manifold)
    for base, mended in _MENDED.items():
        if issubclass(kind, base) and kind.retr is base.retr:
            return mended(manifold)
    if isinstance(manifold, ProductManifold) and kind.retr is ProductManifold.retr:
        factors = [geometry_of(factor) for factor in manifold.manifolds]
        if any(type(factor) is not Geometry for factor in factors):
            return _Product(manifold, factors)
    return Geometry(manifold)


def is_embedded(manifold: Any) -> bool:
    """Whether a manifold is known to carry the metric of the Euclidean space that its points fill.

    By the exact type for geoopt's own, whose subclasses may change the metric; a product, as long
    as its metric and its gradients are those of a product.
    """
    kind = type(manifold)
    if isinstance(manifold, ProductManifold):
        known: tuple[Any, ...] = (ProductManifold, GroupedProduct)
        usual = all(
            getattr(kind, name) in [getattr(c, name) for c in known]
            for name in ("inner", "egrad2rgrad", "proju")
        )
        return usual and all(is_embedded(factor) for factor in manifold.manifolds)
    spheres = {geoopt.Sphere, geoopt.SphereExact}
    return kind in {Euclidean, EuclideanStiefel, geoopt.EuclideanStiefelExact} | spheres
