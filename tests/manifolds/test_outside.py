"""The Stiefel factors against pymanopt's Stiefel manifold, which was not written here."""

from __future__ import annotations

import numpy as np
import pymanopt
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import normal, seeds

from sttp_manifold import SpectralTTManifold, TTShape


@given(d_out=st.integers(1, 8), d_in=st.integers(1, 8), seed=seeds)
def test_every_factor_is_pymanopts_stiefel(d_out, d_in, seed) -> None:
    M = SpectralTTManifold(TTShape.svd(d_out, d_in, rank=3), "identity")
    generator = torch.Generator().manual_seed(seed)
    x = M.random(dtype=torch.float64, generator=generator).as_subclass(torch.Tensor)
    e, v = normal(seed + 1, M.n_elements), normal(seed + 2, M.n_elements)
    u = M.proju(x, e)
    results = {
        "projection": (u, lambda S, X, E, U, V: S.projection(X, E)),
        "gradient": (
            M.egrad2rgrad(x, e),
            lambda S, X, E, U, V: S.euclidean_to_riemannian_gradient(X, E),
        ),
        "retraction": (M.retr(x, u), lambda S, X, E, U, V: S.retraction(X, U)),
        "exp": (M.expmap(x, u), lambda S, X, E, U, V: S.exp(X, U)),
        "transport": (
            M.transp(x, M.retr(x, u), v),
            lambda S, X, E, U, V: S.transport(X, S.retraction(X, U), V),
        ),
    }
    for k, size in enumerate(M.shapes):
        S = pymanopt.manifolds.Stiefel(*size, retraction="qr")
        parts = [M.take_submanifold_value(t, k).numpy() for t in (x, e, u, v)]
        for name, (ours, theirs) in results.items():
            ours_k = M.take_submanifold_value(ours, k).numpy()
            np.testing.assert_allclose(
                ours_k, theirs(S, *parts), rtol=1e-9, atol=1e-9, err_msg=name
            )
    total = sum(pymanopt.manifolds.Stiefel(*size).dim for size in M.shapes)
    assert total == M.total_dim
