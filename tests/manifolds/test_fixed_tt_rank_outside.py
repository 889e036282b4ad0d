"""Fixed TT rank against pymanopt's fixed rank and torchTT's projection, not written here."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pymanopt.manifolds import FixedRankEmbedded
from strategies import normal, seeds, shapes, weight

from sttp_manifold import FixedTTRankManifold, TTShape

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message=r"[\s\S]*C\+\+ implementation not available")
    import torchtt
    from torchtt import manifold as torchtt_manifold


def dense(vector, x: tuple[np.ndarray, ...]) -> np.ndarray:
    """A tangent vector of pymanopt as a matrix: ``u M vt + Up vt + u Vp^T``."""
    u, _, vt = x
    up, m, vp = vector
    return u @ m @ vt + up @ vt + u @ vp.T


@given(d_out=st.integers(2, 12), d_in=st.integers(2, 12), rank=st.integers(1, 4), seed=seeds)
def test_one_mode_a_side_is_pymanopts_fixed_rank(d_out, d_in, rank, seed) -> None:
    # Its retraction stacks u and a Q factor of r columns beside it: twice the rank must fit.
    rank = min(rank, d_out // 2, d_in // 2)
    shape = TTShape.svd(d_out, d_in, rank)
    F, P = FixedTTRankManifold(shape), FixedRankEmbedded(d_out, d_in, rank)
    assert F.dim == P.dim
    tt, other = weight(shape, "free", seed), weight(shape, "free", seed + 9)

    def theirs(t):
        (U, V), s = t.frames(), t.spectrum
        return U.numpy(), s.numpy(), V.mT.numpy()

    # pymanopt divides by s and by differences of s^2; its order and signs are its own affair.
    x, y, p, q = F.pack(tt), F.pack(other), theirs(tt), theirs(other)
    Z, Y = normal(seed + 1, d_out, d_in), normal(seed + 2, d_out, d_in)
    u, v = F.project_matrix(x, Z), F.project_matrix(x, Y)
    pu, pv = P.projection(p, Z.numpy()), P.projection(p, Y.numpy())

    def close(ours, theirs) -> None:
        np.testing.assert_allclose(
            ours, theirs, rtol=1e-12, atol=1e-12 * (1 + np.abs(theirs).max())
        )

    close(F.ambient_vector(x, u).numpy(), dense(pu, p))
    close(F.inner(x, u, v).numpy(), P.inner_product(p, pu, pv))
    close(F.norm(x, u).numpy(), P.norm(p, pu))
    close(F.ambient_vector(y, F.transp(x, y, u)).numpy(), dense(P.transport(p, q, pu), q))
    step = 0.1 * float(tt.singular_values()[-1]) / max(1e-9, float(F.norm(x, u)))
    moved = P.retraction(p, type(pu)(*(step * part for part in pu)))
    ours = F.to_matrix(F.retr(x, step * u)).numpy()
    close(ours, moved[0] @ np.diag(moved[1]) @ moved[2])


@given(shape=shapes(max_modes=4), seed=seeds)
def test_projection_is_torchtts(shape, seed) -> None:
    modes = list(shape.out_modes + shape.in_modes)
    if len(modes) < 3:
        return  # torchTT's projection wants an inner core
    F = FixedTTRankManifold(shape)
    tt = weight(shape, "free", seed)
    x = F.pack(tt)
    target = weight(TTShape(shape.out_modes, shape.in_modes, rank=shape.rank + 1), "free", seed + 1)
    space, z = (torchtt.TT(t.to_matrix().reshape(modes), eps=1e-14) for t in (tt, target))
    if tuple(space.R) != shape.ranks:
        return  # its rounding found another rank
    theirs = torchtt_manifold.riemannian_projection(space, z).full().reshape(tt.to_matrix().shape)
    for u in (F.project_weight(x, target), F.project_matrix(x, target.to_matrix())):
        torch.testing.assert_close(F.ambient_vector(x, u), theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("modes", [((4, 3), (5, 2)), ((3, 4, 2), (2, 5, 3)), ((2, 6), (8,))])
def test_gradient_is_torchtts(modes) -> None:
    """By its own way: derivatives of the rank-2R chain in its new cores."""
    shape = TTShape(*modes, rank=3)
    F = FixedTTRankManifold(shape)
    tt, target = weight(shape, "free", 3), normal(4, shape.d_out, shape.d_in)
    sizes = list(shape.out_modes + shape.in_modes)
    space = torchtt.TT(tt.to_matrix().reshape(sizes), eps=1e-14)
    gradient = torchtt_manifold.riemannian_gradient(
        space, lambda t: (t.full().reshape(target.shape) - target).pow(4).sum() / 4
    )
    x = F.pack(tt)
    leaf = x.clone().requires_grad_()
    (F.to_matrix(leaf) - target).pow(4).sum().div(4).backward()
    ours = F.ambient_vector(x, F.egrad2rgrad(x, leaf.grad))
    theirs = gradient.full().reshape(target.shape).detach()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12 * float(theirs.abs().max()))
