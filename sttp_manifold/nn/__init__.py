"""Weights, layers, and the conversion of whole networks."""

from sttp_manifold.nn.weight import (
    HouseholderWeight,
    RiemannianWeight,
    SpectralWeight,
    make_weight,
)

__all__ = [
    "HouseholderWeight",
    "RiemannianWeight",
    "SpectralWeight",
    "make_weight",
]
