"""Manifolds of spectral tensor-train weights, on geoopt's contract."""

from sttp_manifold.manifolds.fixed_tt_rank import FixedTTRankManifold
from sttp_manifold.manifolds.pymanopt import pymanopt_problem, to_pymanopt
from sttp_manifold.manifolds.spectral_tt import SpectralTTManifold

__all__ = [
    "FixedTTRankManifold",
    "SpectralTTManifold",
    "pymanopt_problem",
    "to_pymanopt",
]
