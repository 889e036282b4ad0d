"""Tensor-train algebra: the plan `TTShape`, the value `SpectralTT`, and decompositions."""

from sttp_manifold.tt.decompose import orthogonalize, truncate, tt_svd
from sttp_manifold.tt.factors import prime_factors
from sttp_manifold.tt.fit import tt_fit
from sttp_manifold.tt.shape import SPECTRA, TTShape
from sttp_manifold.tt.spectral import SpectralTT

__all__ = [
    "SPECTRA",
    "SpectralTT",
    "TTShape",
    "orthogonalize",
    "prime_factors",
    "truncate",
    "tt_fit",
    "tt_svd",
]
