"""Spectral tensor-train weights in PyTorch, by Householder charts or on the manifold itself.

A weight ``W = U diag(s) V^T`` whose orthonormal frames ``U`` and ``V`` are chains of small
orthonormal cores. `TTShape` is its plan, `SpectralTT` its value; a chart
(`HouseholderChart`), a manifold (`SpectralTTManifold`) and a layer (`nn.SpectralLinear`)
are three ways to hold one.
"""

from __future__ import annotations

from importlib.metadata import version

from sttp_manifold import errors, nn, optim
from sttp_manifold.chart import HouseholderChart
from sttp_manifold.checks import (
    CheckResult,
    check_gradient,
    check_hessian,
    check_manifold,
    check_retraction,
    check_vector_transport,
)
from sttp_manifold.manifolds import (
    FixedTTRankManifold,
    SpectralTTManifold,
    pymanopt_problem,
    to_pymanopt,
)
from sttp_manifold.optim import minimize
from sttp_manifold.quotient import transfer, transfer_vector
from sttp_manifold.tt import SpectralTT, TTShape, orthogonalize, truncate, tt_fit, tt_svd

__version__ = version("sttp-manifold")

__all__ = [
    "CheckResult",
    "FixedTTRankManifold",
    "HouseholderChart",
    "SpectralTT",
    "SpectralTTManifold",
    "TTShape",
    "__version__",
    "check_gradient",
    "check_hessian",
    "check_manifold",
    "check_retraction",
    "check_vector_transport",
    "errors",
    "minimize",
    "nn",
    "optim",
    "orthogonalize",
    "pymanopt_problem",
    "to_pymanopt",
    "transfer",
    "transfer_vector",
    "truncate",
    "tt_fit",
    "tt_svd",
]
