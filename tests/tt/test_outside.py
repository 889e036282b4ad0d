"""TT-SVD against torchTT, which was not written here."""

from __future__ import annotations

import warnings

import torch
from hypothesis import given
from strategies import normal, seeds, shapes

from sttp_manifold import tt_svd

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message=r"[\s\S]*C\+\+ implementation not available")
    import torchtt


@given(shape=shapes(max_modes=4), seed=seeds)
def test_same_ranks_and_same_tensor_on_exact_input(shape, seed) -> None:
    """TorchTT finds the ranks of our weight, and its full tensor is ours."""
    modes = list(shape.out_modes + shape.in_modes)
    tt = tt_svd(normal(seed, shape.d_out, shape.d_in), shape)
    theirs = torchtt.TT(tt.to_matrix().reshape(modes), eps=1e-11)
    assert tuple(theirs.R) == shape.ranks
    full = theirs.full().reshape(shape.d_out, shape.d_in)
    torch.testing.assert_close(full, tt.to_matrix(), rtol=1e-8, atol=1e-8)


@given(shape=shapes(max_modes=4), seed=seeds)
def test_truncation_is_about_as_good_as_theirs(shape, seed) -> None:
    """Both are quasi-optimal: neither error exceeds the other's by more than the proven factor."""
    modes = list(shape.out_modes + shape.in_modes)
    W = normal(seed, shape.d_out, shape.d_in)
    theirs = torchtt.TT(W.reshape(modes), rmax=[*shape.ranks], eps=1e-14)
    their_error = float((theirs.full().reshape(W.shape) - W).norm())
    our_error = float((tt_svd(W, shape).to_matrix() - W).norm())
    factor = max(len(modes) - 1, 1) ** 0.5
    assert our_error <= factor * their_error + 1e-9
    assert their_error <= factor * our_error + 1e-9
