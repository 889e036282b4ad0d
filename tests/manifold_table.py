"""The manifolds that laws are asked of: ours with every spectrum, and all of geoopt's real ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sttp_manifold import FixedTTRankManifold, SpectralTTManifold, TTShape
from sttp_manifold._geoopt import geoopt
from sttp_manifold.manifolds.geometry import geometry_of
from sttp_manifold.tt import SPECTRA

PLAN = TTShape((2, 3), (3, 2), rank=2)
D = torch.float64


@dataclass(frozen=True)
class Row:
    """One manifold.

    Attributes:
        make: the manifold, whose own parameters have a dtype.
        size: shape of one point.
        dim: its dimension, of one point.
        hessian: whether Hessians are known.
        gauge: whether points stand for weights: gradients, and steps, are compared by weights.
        mend: whether random points are on the manifold only roughly.
    """

    make: Callable[[torch.dtype], Any]
    size: tuple[int, ...]
    dim: int
    hessian: bool = False
    gauge: bool = False
    mend: bool = False

    def points(self, *batch: int, dtype: torch.dtype = D, seed: int = 0) -> tuple[Any, Tensor]:
        """The manifold, and random points on it."""
        M = self.make(dtype)
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            draw = M.random_normal if isinstance(M, geoopt.Lorentz) else M.random
            x = draw(*batch, *self.size, dtype=dtype)
        x = x.detach().as_subclass(Tensor).clone()
        if isinstance(M, geoopt.Stereographic):  # the projected sphere's go far out
            x = x / (1 + x.norm(dim=-1, keepdim=True))
        # geoopt's doubly stochastic matrices are right to 1e-5 only.
        return M, geometry_of(M).retr(x, torch.zeros_like(x)) if self.mend else x


def product(dtype: torch.dtype) -> Any:
    return geoopt.ProductManifold(
        (geoopt.Sphere(), 4), (geoopt.EuclideanStiefel(), (4, 2)), (geoopt.Euclidean(ndim=1), 3)
    )


def mended_product(dtype: torch.dtype) -> Any:
    ball = geoopt.PoincareBall(c=torch.tensor(1.0, dtype=dtype))
    exact = geoopt.EuclideanStiefelExact()
    return geoopt.ProductManifold((ball, 3), (exact, (3, 2)), (geoopt.BirkhoffPolytope(), (3, 3)))


def curved(dtype: torch.dtype) -> Any:
    one = torch.tensor(1.0, dtype=dtype)
    return geoopt.StereographicProductManifold(
        (geoopt.PoincareBall(c=one), 3), (geoopt.SphereProjection(k=one), 2)
    )


def ours() -> dict[str, Row]:
    rows = {}
    for spectrum in SPECTRA:
        M = SpectralTTManifold(PLAN, spectrum)
        make = lambda dtype, s=spectrum: SpectralTTManifold(PLAN, s)  # noqa: E731
        rows[f"product {spectrum}"] = Row(make, (M.n_elements,), M.total_dim, hessian=True)
    for spectrum, retraction in (
        ("full", "svd"),
        ("full", "qr"),
        ("identity", "svd"),
        ((3.0, 2.0), "svd"),
        ((2.0, 2.0), "qr"),
    ):
        make = lambda dtype, s=spectrum, r=retraction: FixedTTRankManifold(  # noqa: E731
            PLAN, s, retraction=r
        )
        F = make(D)
        name = f"fixed rank {spectrum} {retraction}"
        rows[name] = Row(make, (F.n_elements,), F.dim, hessian=True, gauge=True)
    return rows


def theirs() -> dict[str, Row]:
    g = geoopt

    def fixed(M: Any) -> Callable[[torch.dtype], Any]:
        return lambda dtype: M

    def curvature(kind: Any, name: str, value: float) -> Callable[[torch.dtype], Any]:
        return lambda dtype: kind(**{name: torch.tensor(value, dtype=dtype)})

    def sub(dtype: torch.dtype) -> Any:
        return g.Sphere(intersection=torch.eye(5, 3, dtype=dtype))

    return {
        "Euclidean": Row(fixed(g.Euclidean(ndim=1)), (4,), 4, hessian=True),
        "Euclidean of matrices": Row(fixed(g.Euclidean(ndim=2)), (2, 3), 6, hessian=True),
        "Sphere": Row(fixed(g.Sphere()), (4,), 3, hessian=True),
        "SphereExact": Row(fixed(g.SphereExact()), (4,), 3, hessian=True),
        "Sphere of a subspace": Row(sub, (5,), 2, hessian=True),
        "Stiefel": Row(fixed(g.Stiefel()), (4, 2), 5),
        "EuclideanStiefel": Row(fixed(g.EuclideanStiefel()), (4, 2), 5, hessian=True),
        "EuclideanStiefelExact": Row(fixed(g.EuclideanStiefelExact()), (4, 2), 5, hessian=True),
        "PoincareBall": Row(curvature(g.PoincareBall, "c", 1.0), (3,), 3),
        "PoincareBallExact": Row(curvature(g.PoincareBallExact, "c", 1.0), (3,), 3),
        "Stereographic": Row(curvature(g.Stereographic, "k", -0.7), (3,), 3),
        "StereographicExact": Row(curvature(g.StereographicExact, "k", 0.4), (3,), 3),
        "SphereProjection": Row(curvature(g.SphereProjection, "k", 1.0), (3,), 3),
        "SphereProjectionExact": Row(curvature(g.SphereProjectionExact, "k", 1.0), (3,), 3),
        "Lorentz": Row(curvature(g.Lorentz, "k", 1.0), (4,), 3),
        "SPD": Row(fixed(g.SymmetricPositiveDefinite()), (3, 3), 6),
        "Birkhoff": Row(fixed(g.BirkhoffPolytope()), (3, 3), 4, mend=True),
        "ProductManifold": Row(product, (15,), 11, hessian=True),
        "a product to mend": Row(mended_product, (18,), 10, mend=True),
        "StereographicProductManifold": Row(curved, (5,), 5),
        "Scaled sphere": Row(fixed(g.Scaled(g.Sphere(), 2.0)), (4,), 3, hessian=True),
        "Scaled twice": Row(
            fixed(g.Scaled(g.Scaled(g.EuclideanStiefelExact(), 0.5), 3.0)), (4, 2), 5, hessian=True
        ),
        "Scaled ball": Row(
            lambda dtype: g.Scaled(g.PoincareBall(c=torch.tensor(1.0, dtype=dtype)), 2.0), (3,), 3
        ),
        "Scaled Birkhoff": Row(fixed(g.Scaled(g.BirkhoffPolytope(), 2.0)), (3, 3), 4, mend=True),
    }


OURS, THEIRS = ours(), theirs()
TABLE = OURS | THEIRS
