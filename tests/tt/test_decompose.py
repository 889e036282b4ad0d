"""TT-SVD, truncation and orthogonalization against dense SVDs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import batches, normal, seeds, shapes, weight

from sttp_manifold import SpectralTT, TTShape, orthogonalize, truncate, tt_svd
from sttp_manifold.errors import ArgumentError, RankError, ShapeError
from sttp_manifold.frames import canonical_gauge
from sttp_manifold.tt.contract import left_matrix, right_matrix


def bond_errors(W: torch.Tensor, shape: TTShape) -> torch.Tensor:
    """Squared error of the best approximation at each bond, by dense SVDs, ``(bonds, *b)``."""
    modes = shape.out_modes + shape.in_modes
    errors = []
    for k in range(1, len(modes)):
        unfolding = W.reshape(*W.shape[:-2], math.prod(modes[:k]), math.prod(modes[k:]))
        tail = torch.linalg.svdvals(unfolding)[..., shape.ranks[k] :]
        errors.append(tail.square().sum(-1))
    return torch.stack(errors)


def assert_quasi_optimal(W: torch.Tensor, tt: SpectralTT) -> None:
    error = torch.linalg.matrix_norm(W - tt.to_matrix()).square()
    bonds = bond_errors(W, tt.shape)
    slack = 1e-18 * torch.linalg.matrix_norm(W).square() + 1e-18
    # The best approximation is at least as far as the best one at any single bond.
    assert bool((error <= bonds.sum(0) * (1 + 1e-9) + slack).all())
    assert bool((error <= len(bonds) * bonds.amax(0) * (1 + 1e-9) + slack).all())


@given(shape=shapes(max_modes=4), seed=seeds, batch=batches)
def test_tt_svd_is_quasi_optimal_with_orthonormal_frames(shape, seed, batch) -> None:
    W = normal(seed, *batch, shape.d_out, shape.d_in)
    tt = tt_svd(W, shape)
    assert tt.shape == shape
    assert float(tt.orthonormality_error()) < 1e-13
    assert_quasi_optimal(W, tt)
    s = tt.spectrum
    assert bool((s >= 0).all())
    assert bool((s.diff(dim=-1) <= 1e-12).all())


@given(shape=shapes(max_modes=4), seed=seeds, batch=batches)
def test_tt_svd_is_exact_where_the_rank_allows(shape, seed, batch) -> None:
    exact = weight(shape, "free", seed, batch)
    assert tt_svd(exact.to_matrix(), shape).allclose(exact)
    unlimited = TTShape(shape.out_modes, shape.in_modes, rank=shape.numel)
    W = normal(seed, *batch, shape.d_out, shape.d_in)
    torch.testing.assert_close(tt_svd(W, unlimited).to_matrix(), W)


def test_svdp_is_the_truncated_svd() -> None:
    W = normal(0, 9, 7)
    u, s, vt = torch.linalg.svd(W, full_matrices=False)
    best = (u[:, :3] * s[:3]) @ vt[:3]
    torch.testing.assert_close(tt_svd(W, TTShape.svd(9, 7, 3)).to_matrix(), best)


@given(shape=shapes(max_modes=4), seed=seeds, batch=batches, data=st.data())
def test_truncate(shape, seed, batch, data) -> None:
    tt = weight(shape, data.draw(st.sampled_from(["free", "full"])), seed, batch)
    rank = data.draw(st.integers(1, max(shape.ranks)))
    shorter = truncate(tt, rank)
    assert shorter.shape == TTShape(shape.out_modes, shape.in_modes, rank)
    assert float(shorter.orthonormality_error()) < 1e-12
    assert_quasi_optimal(tt.to_matrix(), shorter)
    assert truncate(tt, ranks=shape.ranks).allclose(tt)


def test_truncate_never_raises_a_rank() -> None:
    tt = weight(TTShape((4, 4), (4, 4), ranks=(1, 2, 4, 2, 1)), "free", 0)
    assert truncate(tt, rank=3).shape.ranks == (1, 2, 3, 2, 1)
    with pytest.raises(RankError, match="bond 1 is above 2") as caught:
        truncate(tt, ranks=(1, 3, 4, 2, 1))
    assert (caught.value.bond, caught.value.rank, caught.value.bound) == (1, 3, 2)
    with pytest.raises(ShapeError, match="give either"):
        truncate(tt)


@given(shape=shapes(max_modes=4), seed=seeds, batch=batches, centre=st.sampled_from("nsm"))
def test_orthogonalize_keeps_the_product(shape, seed, batch, centre) -> None:
    left = [normal(seed + k, *batch, *c) for k, c in enumerate(shape.left_core_shapes)]
    right = [normal(seed - k, *batch, *c) for k, c in enumerate(shape.right_core_shapes)]
    bond = {
        "n": None,
        "s": normal(seed, *batch, shape.rank),
        "m": normal(seed, *batch, shape.rank, shape.rank),
    }[centre]
    matrix = {
        "n": lambda: torch.eye(shape.rank, dtype=torch.float64),
        "s": lambda: torch.diag_embed(bond),
    }
    product = left_matrix(left) @ matrix.get(centre, lambda: bond)() @ right_matrix(right)
    tt = orthogonalize(left, bond, right)
    torch.testing.assert_close(tt.to_matrix(), product, rtol=1e-9, atol=1e-9)
    assert float(tt.orthonormality_error()) < 1e-12


def test_orthogonalize_lowers_ranks_that_no_mode_can_carry() -> None:
    left, right = [normal(1, 1, 2, 9), normal(2, 9, 2, 6)], [normal(3, 6, 3, 1)]
    tt = orthogonalize(left, None, right)
    assert tt.shape.ranks == (1, 2, 3, 1)
    torch.testing.assert_close(tt.to_matrix(), left_matrix(left) @ right_matrix(right))


@pytest.mark.parametrize(
    ("W", "words"),
    [
        (torch.zeros(4, 6), "takes a matrix (*b, 6, 4), got (4, 6)"),
        (torch.zeros(6), "got (6,)"),
        (torch.zeros(6, 4, dtype=torch.bfloat16), "W.float()"),
        (torch.zeros(6, 4, dtype=torch.int64), "float32 or float64, got torch.int64"),
        (torch.full((6, 4), torch.nan), "not finite"),
        (torch.full((6, 4), torch.inf), "not finite"),
    ],
)
def test_matrices_that_do_not_fit(W, words) -> None:
    with pytest.raises(ShapeError) as caught:
        tt_svd(W, TTShape.for_matrix(6, 4, rank=2))
    assert words in str(caught.value)


CORES = [normal(0, 1, 3, 2)], [normal(1, 2, 3, 1)]


@pytest.mark.parametrize(
    ("left", "bond", "right", "words"),
    [
        (CORES[0], None, [normal(0, 3, 3, 1)], "disagree at the centre: ranks 2 and 3"),
        ([], None, CORES[1], "at least one core"),
        ([normal(0, 1, 3, 4), normal(0, 2, 3, 2)], None, CORES[1], "left cores disagree at bond 1"),
        (CORES[0], None, [normal(0, 2, 3, 4), CORES[1][0]], "right cores disagree at bond 2"),
        ([normal(0, 2, 3, 2)], None, CORES[1], "outer ranks are 1, got 2 and 1"),
        (CORES[0], torch.ones(1).double(), CORES[1], "a bond between ranks 2 and 2"),
        (CORES[0], torch.ones(1, 1).double(), CORES[1], "a bond between ranks 2 and 2"),
        (CORES[0], torch.ones(2), CORES[1], "share dtype and device"),
        (CORES[0], None, [normal(0, 5, 2, 3, 1)], "right core 0 has shape (5, 2, 3, 1)"),
        (CORES[0], None, [None], "right core 0 takes a Tensor, got NoneType"),
        ([c.cfloat() for c in CORES[0]], None, [c.cfloat() for c in CORES[1]], "real floating"),
        ([CORES[0][0] * torch.nan], None, CORES[1], "not finite"),
    ],
)
def test_cores_that_do_not_chain(left, bond, right, words) -> None:
    with pytest.raises(ShapeError) as caught:
        orthogonalize(left, bond, right)
    assert words in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spectrum", ["free", "full"])
def test_half_precision_is_factored_in_single(dtype, spectrum) -> None:
    """The value has its dtype, and is as near as rounding allows."""
    tt = weight(TTShape((3, 4), (4, 3), rank=4), spectrum, 0, (2,)).to(torch.float32)
    half, W = tt.to(dtype), tt.to_matrix()
    eps = torch.finfo(dtype).eps
    near = 8 * eps * float(tt.norm().max())
    cases = {
        "truncate": (truncate(half, rank=2), truncate(tt, rank=2).to_matrix()),
        "orthogonalize": (orthogonalize(half.left, half.spectrum, half.right), W),
        "canonical_gauge": (canonical_gauge(half), W),
    }
    for name, (found, wanted) in cases.items():
        assert found.dtype == dtype, name
        assert float((found.to(torch.float32).to_matrix() - wanted).abs().max()) < near, name
        assert float(found.orthonormality_error()) < 8 * eps, name
    assert half.singular_values().dtype == dtype
    assert half.allclose(half.clone())
    assert not half.allclose(SpectralTT(half.left, half.spectrum * 2, half.right, half.shape))


def test_what_cannot_be_truncated() -> None:
    tt = weight(TTShape((3, 4), (4, 3), rank=4), "free", 0)
    bad = SpectralTT(tt.left, tt.spectrum * torch.nan, tt.right, tt.shape)
    for value, rank, words in ((bad, 2, "not finite"), (tt, "2", "'2'")):
        with pytest.raises(ShapeError) as caught:
            truncate(value, rank)
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda tt: tt_svd([[1.0]], tt.shape), "tt_svd: W is a Tensor, got list: [[1.0]]"),
        (lambda tt: tt_svd(tt.to_matrix(), 2), "tt_svd: shape is a TTShape, got int: 2"),
        (lambda tt: truncate(tt.to_matrix(), 2), "truncate: tt is a SpectralTT, got a Tensor (12"),
        (lambda tt: orthogonalize(tt.left, 2.0, tt.right), "orthogonalize: bond is Tensor | None"),
        (lambda tt: tt.distance(None), "SpectralTT.distance: other is a SpectralTT, got NoneType"),
    ],
)
def test_arguments_of_another_type_are_named(call, words) -> None:
    with pytest.raises(ArgumentError) as caught:
        call(weight(TTShape((3, 4), (4, 3), rank=4), "free", 0))
    assert words in str(caught.value)


def test_zero_is_a_weight() -> None:
    tt = tt_svd(torch.zeros(6, 4), TTShape.for_matrix(6, 4, rank=3))
    assert float(tt.norm()) == 0
    assert float(tt.orthonormality_error()) < 1e-6


def test_empty_batches() -> None:
    shape = TTShape((4, 3), (5, 2), rank=3)
    tt = tt_svd(torch.randn(0, 12, 10), shape)
    assert tt.to_matrix().shape == (0, 12, 10)
    assert truncate(tt, rank=2).to_matrix().shape == (0, 12, 10)
