"""The leading singular vectors of large matrices against LAPACK."""

from __future__ import annotations

import pytest
import torch
from strategies import normal

from sttp_manifold.tt.leading import leading_svd


@pytest.mark.parametrize(("decay", "wide"), [(0.0, False), (0.5, True), (2.0, False)])
def test_squared_errors_are_within_a_thousandth(decay: float, wide: bool) -> None:
    W = normal(0, 1500, 1100).float() * torch.arange(1, 1101) ** -decay
    W = W.mT.contiguous() if wide else W
    before = torch.get_rng_state()
    u, s, vt = leading_svd(W, 40)
    assert torch.equal(torch.get_rng_state(), before)
    values = torch.linalg.svdvals(W)
    best = values[40:].square().sum()
    found = (W - (u * s) @ vt).square().sum()
    assert float(found) <= float(best) * 1.002
    torch.testing.assert_close(s[:4], values[:4], rtol=2e-2, atol=0)
    for frame in (u, vt.mT):
        torch.testing.assert_close(frame.mT @ frame, torch.eye(40), rtol=0, atol=1e-5)
    assert bool((s.diff() <= 0).all())


def test_what_has_the_rank_is_exact() -> None:
    W = normal(0, 1300, 30) @ normal(1, 30, 1200)
    u, s, vt = leading_svd(W, 30)
    torch.testing.assert_close((u * s) @ vt, W, rtol=0, atol=1e-10)


def test_small_ones_are_those_of_lapack() -> None:
    W = normal(0, 2, 40, 30)
    found, (u, s, vt) = leading_svd(W, 7), torch.linalg.svd(W, full_matrices=False)
    for mine, theirs in zip(found, (u[..., :7], s[..., :7], vt[..., :7, :]), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("scale", [2.0**100, 2.0**-100])
def test_squares_do_not_overflow(scale: float) -> None:
    W = normal(0, 1100, 30).float() @ normal(1, 30, 1100).float()
    u, s, vt = leading_svd(W, 20)
    for mine, other in zip(leading_svd(W * scale, 20), (u, s * scale, vt), strict=True):
        assert torch.equal(mine, other)
