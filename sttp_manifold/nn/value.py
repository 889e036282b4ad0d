"""What a spectral weight holds, as exactly as can be said."""

from __future__ import annotations

import copy

from sttp_manifold.errors import ShapeError
from sttp_manifold.nn.nearest import nearest_frames
from sttp_manifold.nn.weight import SpectralWeight
from sttp_manifold.tt.precision import computing_dtype
from sttp_manifold.tt.spectral import SpectralTT

__all__ = ["exact_value"]


def exact_value(weight: SpectralWeight) -> SpectralTT:
    """What a weight holds, with orthonormal frames, in float64.

    In float32 a spectrum near its bound would be rounded onto it.
    """
    broken = [name for name, p in weight.named_parameters() if not p.isfinite().all()]
    if broken:
        raise ShapeError(f"{', '.join(broken)} has entries that are not finite")
    value = copy.deepcopy(weight).double().tt()
    is_half = computing_dtype(weight.dtype) != weight.dtype
    return nearest_frames(value) if is_half else value
