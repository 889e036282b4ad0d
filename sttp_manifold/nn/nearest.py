"""The nearest value whose frames are orthonormal."""

from __future__ import annotations

import torch
from torch import Tensor

from sttp_manifold.tt.spectral import SpectralTT

__all__ = ["nearest_frames"]


def nearest_frames(tt: SpectralTT) -> SpectralTT:
    """The value with each frame as the nearest orthonormal one, and the same spectrum.

    What half precision has rounded is orthonormal again, and no farther from the value that it was
    before than the rounding.

    References:
        Higham, *Matrix nearness problems and applications*, 1989 (the polar factor).
    """

    def nearest(frame: Tensor) -> Tensor:
        U, _, Vh = torch.linalg.svd(frame, full_matrices=False)
        return U @ Vh

    left = tuple(nearest(core.flatten(-3, -2)).view_as(core) for core in tt.left)
    right = tuple(nearest(core.flatten(-2, -1)).view_as(core) for core in tt.right)
    return SpectralTT(left, tt.spectrum, right, tt.shape)
