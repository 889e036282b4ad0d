"""Frames: Householder charts and their inverses, the gauge action, retractions."""

from sttp_manifold.frames.gauge import canonical_gauge, haar_frame, random_rotation, rotate
from sttp_manifold.frames.householder import (
    full_frame,
    full_reflectors,
    full_size,
    reduced_frame,
    reduced_reflectors,
    reduced_size,
)

__all__ = [
    "canonical_gauge",
    "full_frame",
    "full_reflectors",
    "full_size",
    "haar_frame",
    "random_rotation",
    "reduced_frame",
    "reduced_reflectors",
    "reduced_size",
    "rotate",
]
