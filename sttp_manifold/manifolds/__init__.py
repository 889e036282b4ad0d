"""Manifolds of spectral tensor-train weights, on geoopt's contract, and checks of any manifold."""

from sttp_manifold.manifolds.check_result import CheckResult, Law
from sttp_manifold.manifolds.checks import (
    check_gradient,
    check_hessian,
    check_manifold,
    check_retraction,
    check_vector_transport,
)
from sttp_manifold.manifolds.fixed_tt_rank import FixedTTRankManifold
from sttp_manifold.manifolds.interop import pymanopt_problem, to_pymanopt
from sttp_manifold.manifolds.slopes import Slope
from sttp_manifold.manifolds.spectral_tt import SpectralTTManifold

__all__ = [
    "CheckResult",
    "FixedTTRankManifold",
    "Law",
    "Slope",
    "SpectralTTManifold",
    "check_gradient",
    "check_hessian",
    "check_manifold",
    "check_retraction",
    "check_vector_transport",
    "pymanopt_problem",
    "to_pymanopt",
]
