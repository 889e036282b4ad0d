"""`tt_fit` against dense weighted SVDs, its own limits, and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import normal, seeds, shapes
from torch import Tensor

from sttp_manifold import SpectralTT, TTShape, tt_fit, tt_svd
from sttp_manifold.errors import ShapeError


def moment(seed: int, size: int, spread: float = 2.0) -> Tensor:
    """The second moment of vectors whose directions are of very different lengths."""
    scale = torch.logspace(0, -spread, size, dtype=torch.float64)
    x = (normal(seed, 2 * size, size) * scale) @ torch.linalg.qr(normal(seed + 1, size, size)).Q
    return x.mT @ x


def error(
    W: Tensor, tt: SpectralTT, right: Tensor | None = None, left: Tensor | None = None
) -> Tensor:
    """The squared error in the metric, by its definition."""
    gap = W - tt.to_matrix()
    after = gap if right is None else gap @ (torch.diag(right) if right.ndim == 1 else right)
    return (gap * (after if left is None else left @ after)).sum()


def of_one_mode(draw_shape: TTShape) -> TTShape:
    return TTShape.svd(draw_shape.d_out, draw_shape.d_in, max(draw_shape.ranks))


def root(A: Tensor) -> Tensor:
    return torch.linalg.cholesky(A)


@given(shape=shapes(), seed=seeds, sides=st.sampled_from(["right", "left", "both"]))
def test_svdp_is_the_dense_weighted_svd(shape: TTShape, seed: int, sides: str) -> None:
    """Eckart & Young for the whitened matrix, by Cholesky factors in place of ours."""
    shape = of_one_mode(shape)
    W = normal(seed, shape.d_out, shape.d_in)
    A = moment(seed + 2, shape.d_out) if sides != "right" else None
    C = moment(seed + 5, shape.d_in) if sides != "left" else None
    tt = tt_fit(W, shape, left=A, right=C)
    white = W if A is None else root(A).mT @ W
    white = white if C is None else white @ root(C)
    best = torch.linalg.svdvals(white)[shape.rank :].square().sum()
    scale = white.square().sum()
    torch.testing.assert_close(error(W, tt, C, A), best, rtol=1e-6, atol=1e-10 * float(scale))
    assert float(tt.orthonormality_error()) < 1e-12
    assert bool((tt.spectrum.diff() <= 1e-12 * float(tt.spectrum.max())).all())


@settings(max_examples=25)
@given(shape=shapes(max_modes=4), seed=seeds, diagonal=st.booleans(), both=st.booleans())
def test_sweeps_fall_and_end_no_farther_than_tt_svd(
    shape: TTShape, seed: int, diagonal: bool, both: bool
) -> None:
    W = normal(seed, shape.d_out, shape.d_in)
    C = normal(seed + 3, shape.d_in).square() if diagonal else moment(seed + 3, shape.d_in)
    A = moment(seed + 7, shape.d_out) if both else None
    scale = float(error(W, tt_svd(0 * W, shape), C, A))
    errors = [
        float(error(W, tt_fit(W, shape, left=A, right=C, max_sweeps=n, tol=0), C, A))
        for n in (0, 1, 3, 6)
    ]
    plain = float(error(W, tt_svd(W, shape), C, A))
    for before, after in zip([plain, *errors[:-1]], errors, strict=True):
        assert after <= before * (1 + 1e-9) + 1e-12 * scale


@settings(max_examples=20)
@given(shape=shapes(max_modes=4), seed=seeds)
def test_a_unit_metric_is_none(shape: TTShape, seed: int) -> None:
    W = normal(seed, shape.d_out, shape.d_in)
    none = tt_fit(W, shape, max_sweeps=12, tol=0)
    unit = tt_fit(W, shape, right=2 * torch.eye(shape.d_in).double(), max_sweeps=12, tol=0)
    whole = float(W.square().sum())
    assert float(error(W, none)) == pytest.approx(float(error(W, unit)), abs=1e-7 * whole)


@given(shape=shapes(max_modes=4), seed=seeds)
def test_what_the_ranks_allow_is_found(shape: TTShape, seed: int) -> None:
    W = tt_svd(normal(seed, shape.d_out, shape.d_in), shape).to_matrix()
    tt = tt_fit(W, shape, right=moment(seed + 1, shape.d_in))
    torch.testing.assert_close(tt.to_matrix(), W, rtol=0, atol=1e-7)


def test_the_end_is_stationary() -> None:
    """No gradient of the weighted error is left, by autograd through the cores."""
    shape = TTShape((3, 4, 2), (2, 5, 3), rank=4)
    W, C = normal(0, 24, 30), moment(1, 30, 1.0)
    tt = tt_fit(W, shape, right=C, max_sweeps=200, tol=0)
    cores = [t.clone().requires_grad_() for t in (*tt.left, tt.spectrum, *tt.right)]
    held = SpectralTT(cores[: len(tt.left)], cores[len(tt.left)], cores[len(tt.left) + 1 :], shape)
    gap = W - held.to_matrix()
    gradients = torch.autograd.grad((gap * (gap @ C)).sum(), cores)
    started = torch.autograd.grad(
        (normal(2, 24, 30) * held.to_matrix()).sum() * float(C.norm()), cores
    )
    for now, any_other in zip(gradients, started, strict=True):
        assert float(now.norm()) < 1e-3 * float(any_other.norm())


def test_several_modes_come_close_in_the_metric() -> None:
    """Sweeps are worth a lot where inputs are of very different sizes."""
    shape = TTShape.for_matrix(48, 64, 8)
    W, C = normal(3, 48, 64), moment(4, 64)
    assert float(error(W, tt_fit(W, shape, right=C), C)) < 0.5 * float(
        error(W, tt_svd(W, shape), C)
    )


def test_unseen_directions_do_no_harm() -> None:
    """Fewer inputs than there are directions, and none at all."""
    x = normal(1, 5, 30)
    for C in (x.mT @ x, torch.zeros(30, 30).double()):
        for shape in (TTShape.svd(24, 30, 4), TTShape((3, 4, 2), (2, 5, 3), rank=4)):
            tt = tt_fit(normal(0, 24, 30), shape, right=C)
            assert bool(tt.to_matrix().isfinite().all())
            assert float(tt.orthonormality_error()) < 1e-10


def test_float32_is_as_good_to_its_rounding() -> None:
    shape = TTShape((3, 4, 2), (2, 5, 3), rank=4)
    W, C = normal(0, 24, 30), moment(1, 30, 1.0)
    fine, coarse = tt_fit(W, shape, right=C), tt_fit(W.float(), shape, right=C.float())
    assert coarse.dtype == torch.float32
    assert float(error(W, coarse.to(torch.float64), C)) == pytest.approx(
        float(error(W, fine, C)), rel=1e-2
    )


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"right": torch.ones(4)}, "second moment"),
        ({"right": torch.ones(5)}, "right.to"),
        ({"right": -torch.ones(5).double()}, "negative square"),
        ({"left": torch.full((4, 4), float("nan")).double()}, "not finite"),
        ({"max_sweeps": -1}, "max_sweeps"),
        ({"tol": float("nan")}, "tol"),
    ],
)
def test_refusals(how: dict, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        tt_fit(torch.ones(4, 5).double(), TTShape.svd(4, 5, 2), **how)
    with pytest.raises(ShapeError, match="takes a matrix"):
        tt_fit(torch.ones(2, 4, 5), TTShape.svd(4, 5, 2))
    with pytest.raises(ShapeError, match=r"W\.float"):
        tt_fit(torch.ones(4, 5).half(), TTShape.svd(4, 5, 2))
