"""Weights, layers, and the conversion of whole networks."""

from sttp_manifold.nn.conv import SpectralConv2d
from sttp_manifold.nn.layer import SpectralLayer
from sttp_manifold.nn.linear import SpectralLinear
from sttp_manifold.nn.weight import (
    HouseholderWeight,
    RiemannianWeight,
    SpectralWeight,
    make_weight,
)

__all__ = [
    "HouseholderWeight",
    "RiemannianWeight",
    "SpectralConv2d",
    "SpectralLayer",
    "SpectralLinear",
    "SpectralWeight",
    "make_weight",
]
