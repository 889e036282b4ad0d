"""The gauge action leaves the weight alone, and the canonical representative sees only it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from strategies import batches, seeds, shapes, weight

from sttp_manifold.errors import ShapeError
from sttp_manifold.frames import canonical_gauge, random_rotation, rotate


@given(shape=shapes(max_modes=4), seed=seeds, batch=batches)
def test_the_canonical_representative_is_gauge_invariant(shape, seed, batch) -> None:
    tt = weight(shape, "free", seed, batch)
    generator = torch.Generator().manual_seed(seed)
    options = {"dtype": torch.float64, "generator": generator}
    left = [random_rotation(c.shape[-1], *batch, **options) for c in tt.left[:-1]]
    right = [random_rotation(c.shape[-1], *batch, **options) for c in tt.right[:-1]]
    turned = rotate(tt, left, right)
    torch.testing.assert_close(turned.to_matrix(), tt.to_matrix())
    a, b = canonical_gauge(tt), canonical_gauge(turned)
    assert a.allclose(tt)
    assert float(a.orthonormality_error()) < 1e-12
    torch.testing.assert_close(a.spectrum, tt.singular_values())
    for p, q in zip((*a.left, *a.right), (*b.left, *b.right), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


def test_a_wrong_number_of_rotations() -> None:
    from sttp_manifold import TTShape

    tt = weight(TTShape((4, 3), (3, 4), rank=2), "free", 0)
    with pytest.raises(ShapeError, match="takes 1 left and 1 right rotations, got 0 and 0"):
        rotate(tt)
