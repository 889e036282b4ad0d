"""Points and tangent vectors are real, of one length, with batches that go together."""

from __future__ import annotations

import pytest
import torch
from strategies import normal

from sttp_manifold import FixedTTRankManifold, SpectralTTManifold, TTShape
from sttp_manifold.errors import ShapeError
from sttp_manifold.manifolds.weight_points import broadcast_vectors

SHAPE = TTShape.for_matrix(6, 4, rank=2)


def test_batches_broadcast_and_lengths_do_not() -> None:
    x, u = broadcast_vectors(5, normal(0, 2, 1, 5), normal(1, 3, 5))
    assert x.shape == u.shape == (2, 3, 5)
    with pytest.raises(ShapeError, match=r"shape \(\*b, 5\), got \(5,\), \(1,\)"):
        broadcast_vectors(5, normal(0, 5), normal(1, 1))
    with pytest.raises(ShapeError, match="do not go together"):
        broadcast_vectors(5, normal(0, 2, 5), normal(1, 3, 5))


@pytest.mark.parametrize("make", [SpectralTTManifold, FixedTTRankManifold])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_numbers_that_are_not_real_are_refused(make, dtype, device) -> None:
    M = make(SHAPE)
    x = M.random().to(dtype).to(device)
    with pytest.raises(ShapeError, match=f"real numbers, got {dtype}"):
        M.proju(x, x)
    with pytest.raises(ShapeError, match=f"real numbers, got {dtype}"):
        M.inner(x, x)
