"""Points on the manifold of spectral tensor trains for tests of optimizers, and their frames."""

from __future__ import annotations

import torch

from sttp_manifold._geoopt import EuclideanStiefel
from sttp_manifold.manifolds.spectral_tt import SpectralTTManifold
from sttp_manifold.tt.shape import TTShape

SHAPE = TTShape(out_modes=(3, 4, 2), in_modes=(2, 5, 3), rank=4)


def points(spectrum="free", *batch, dtype=torch.float64, seed=0):
    """The manifold, and a parameter on it."""
    M = SpectralTTManifold(SHAPE, spectrum=spectrum)
    generator = torch.Generator().manual_seed(seed)
    return M, M.random_parameter(*batch, dtype=dtype, generator=generator)


def put_gradients(params, seed, scale=1.0):
    """Gradients that do not depend on the dtype of the parameters, up to rounding."""
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = (scale * torch.randn(p.shape, generator=generator, dtype=torch.float64)).to(p)


def frame_error(p):
    """The largest entry of ``Q^T Q - I`` over the frames of a parameter."""
    x, manifold = p.detach().double(), p.manifold
    if isinstance(manifold, EuclideanStiefel):
        frames = [x]
    else:
        frames = [
            x[..., span].unflatten(-1, (count, d, r)) for span, count, d, r in manifold.frame_groups
        ]
    return max(
        float((X.mT @ X - torch.eye(X.shape[-1], dtype=X.dtype)).abs().max()) for X in frames
    )
