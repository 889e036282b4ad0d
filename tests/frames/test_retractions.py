"""Laws of the retractions of frames, against LAPACK and against their definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sttp_manifold.errors import ShapeError
from sttp_manifold.frames.orthonormal import orthonormalize, polish
from sttp_manifold.frames.retractions import (
    cayley,
    cholesky_qr,
    newton_schulz,
    pogo,
    polar,
    project_tangent,
    qr,
)

RETRACTIONS = {
    "qr": qr,
    "cholesky_qr": cholesky_qr,
    "polar": polar,
    "newton_schulz": newton_schulz,
    "cayley": cayley,
}
SHAPES = [(6, 3), (5, 5), (1, 1), (7, 1), (3, 8, 4), (2, 3, 9, 2), (40, 16, 8)]


def frames(shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(shape, dtype=dtype, generator=generator))[0]


def directions(shape, seed=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=dtype, generator=generator)


def tangents(X, seed=1):
    U = project_tangent(X, directions(X.shape, seed, X.dtype))
    return U / U.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-300)


def lapack(Z):
    Q, R = torch.linalg.qr(Z)
    return Q * torch.sign(R.diagonal(dim1=-2, dim2=-1)).unsqueeze(-2)


def error(Q):
    eye = torch.eye(Q.shape[-1], dtype=Q.dtype)
    return (Q.mT @ Q - eye).abs().max().item()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("length", [0.0, 1e-3, 0.3, 3.0, 1e3, 1e6, 1e9])
def test_cholesky_qr_is_the_point_of_lapack_at_any_length(shape, length):
    X = frames(shape)
    U = length * tangents(X)
    # X is lost in X + U by the rounding of X + U itself: the Q factor is known to eps * cond.
    cond = torch.linalg.cond(X + U).max().item()
    torch.testing.assert_close(
        cholesky_qr(X, U), lapack(X + U), rtol=0, atol=1e-14 + 1e-15 * max(shape) * cond
    )
    assert error(cholesky_qr(X, U)) < 1e-14 * max(shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_cholesky_qr_takes_directions_that_are_not_tangent(shape):
    X = frames(shape)
    for scale in (0.1, 1.0, 30.0):
        Z = X + scale * directions(shape)
        cond = torch.linalg.cond(Z).max().item()
        torch.testing.assert_close(
            cholesky_qr(X, Z - X), lapack(Z), rtol=0, atol=1e-13 + 1e-14 * cond
        )


@pytest.mark.parametrize("condition", [1e1, 1e4, 1e7, 1e10, 1e13])
def test_orthonormalize_holds_where_a_gram_matrix_does_not(condition):
    d, r = 30, 6
    scales = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), r, dtype=torch.float64)
    Z = (frames((4, d, r)) * scales) @ frames((4, r, r), seed=5)
    Q = orthonormalize(Z)
    assert error(Q) < 1e-13
    # Same flag of subspaces, with R upper triangular and positive: that is the QR factorization.
    R = Q.mT @ Z
    torch.testing.assert_close(Q @ R.triu(), Z, rtol=0, atol=1e-13)
    assert (R.diagonal(dim1=-2, dim2=-1) > -1e-13).all()


@pytest.mark.parametrize(
    ("length", "condition", "cholesky", "lapack_calls"),
    [(0.1, 1.0, 1, 0), (5.0, 1.0, 2, 0), (1e12, 1.0, 2, 0), (0.1, 1e12, None, 1)],
)
def test_cost_follows_the_step(monkeypatch, length, condition, cholesky, lapack_calls):
    X = frames((5, 12, 4))
    scales = torch.tensor([1.0, 1.0, 1.0, condition], dtype=X.dtype)
    # Scales between two rotations: Cholesky does not mind the scales of columns.
    U = ((X + length * tangents(X)) @ frames((4, 4)) * scales) @ frames((4, 4), seed=7) - X
    calls = {"cholesky_ex": 0, "qr": 0}
    for name in calls:
        original = getattr(torch.linalg, name)

        def counted(*args, _name=name, _original=original, **kwargs):
            calls[_name] += 1
            return _original(*args, **kwargs)

        monkeypatch.setattr(torch.linalg, name, counted)
    cholesky_qr(X, U)
    assert calls["qr"] == lapack_calls
    if cholesky is not None:
        assert calls["cholesky_ex"] == cholesky


@pytest.mark.parametrize("name", ["qr", "cholesky_qr"])
def test_signs_make_the_diagonal_of_r_positive(name):
    X = frames((10, 7, 4))
    U = 0.7 * directions((10, 7, 4))
    R = RETRACTIONS[name](X, U).mT @ (X + U)
    assert (R.diagonal(dim1=-2, dim2=-1) > 0).all()
    torch.testing.assert_close(R.tril(-1), torch.zeros_like(R), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", list(RETRACTIONS))
def test_the_zero_direction_stays(name):
    X = frames((3, 8, 4))
    torch.testing.assert_close(RETRACTIONS[name](X, torch.zeros_like(X)), X, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", list(RETRACTIONS))
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_first_order_the_error_falls_with_the_square_of_the_step(name, data):
    d = data.draw(st.integers(2, 12))
    r = data.draw(st.integers(1, d))
    X = frames((2, d, r), seed=data.draw(st.integers(0, 999)))
    U = tangents(X, seed=data.draw(st.integers(1000, 1999)))
    if r == d == 1:
        return
    steps = torch.logspace(-1.5, -3.5, 9, dtype=torch.float64)
    errors = torch.stack([(RETRACTIONS[name](X, t * U) - X - t * U).norm() for t in steps])
    slope = ((errors[0] / errors[-1]).log() / (steps[0] / steps[-1]).log()).item()
    assert slope == pytest.approx(2, abs=0.1)


@given(
    d=st.integers(1, 12),
    r=st.integers(1, 12),
    seed=st.integers(0, 999),
    scale=st.floats(0, 10),
)
@settings(max_examples=40, deadline=None)
def test_polar_is_the_nearest_frame(d, r, seed, scale):
    r = min(d, r)
    X = frames((2, d, r), seed)
    U = scale * directions((2, d, r), seed + 1)
    left, _, right = torch.linalg.svd(X + U, full_matrices=False)
    cond = torch.linalg.cond(X + U).max().item()
    torch.testing.assert_close(polar(X, U), left @ right, rtol=0, atol=1e-13 + 1e-14 * cond)


@pytest.mark.parametrize("gram", [0.501, 0.9, 1.1, 1.499, 1.501])
def test_polar_converges_as_far_out_as_newton_schulz_is_trusted(gram):
    """One column whose squared length is at the edge: the worst case that is iterated."""
    X = frames((6, 3))
    scales = torch.tensor([1.0, gram**0.5, 1.0], dtype=X.dtype)
    torch.testing.assert_close(polar(X, X * scales - X), X, rtol=0, atol=1e-15)


@given(d=st.integers(1, 12), r=st.integers(1, 12), seed=st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_project_tangent_is_the_orthogonal_projection(d, r, seed):
    r = min(d, r)
    X, G = frames((2, d, r), seed), directions((2, d, r), seed + 1)
    U = project_tangent(X, G)
    torch.testing.assert_close(X.mT @ U, -(U.mT @ X), rtol=0, atol=1e-13)
    torch.testing.assert_close(project_tangent(X, U), U, rtol=0, atol=1e-13)
    V = project_tangent(X, directions((2, d, r), seed + 2))
    torch.testing.assert_close((G * V).sum(), (U * V).sum(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", list(RETRACTIONS))
@pytest.mark.parametrize("length", [1e-2, 2.0])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_not_finite_gives_nan_in_its_own_frame_only(name, length, poison):
    X = frames((4, 6, 3))
    U = length * tangents(X)
    clean = RETRACTIONS[name](X, U)
    U[2, 1, 1] = poison
    Q = RETRACTIONS[name](X, U)
    assert Q[2].isnan().all()
    kept = [0, 1, 3]
    torch.testing.assert_close(Q[kept], clean[kept], rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", list(RETRACTIONS))
def test_all_nan_gives_all_nan(name):
    X = torch.full((6, 3), float("nan"))
    assert RETRACTIONS[name](X, X).isnan().all()


@pytest.mark.parametrize("name", list(RETRACTIONS))
def test_a_frame_that_vanishes_is_no_error(name):
    X = frames((6, 3))
    assert RETRACTIONS[name](X, -X).shape == X.shape
    assert torch.isfinite(RETRACTIONS[name](X, -X)).all()


def test_huge_directions_in_float32_do_not_overflow():
    X = frames((3, 6, 3), dtype=torch.float32)
    U = 1e30 * directions((3, 6, 3), dtype=torch.float32)
    assert error(cholesky_qr(X, U)) < 1e-5


@pytest.mark.parametrize("name", [*RETRACTIONS, "project_tangent"])
@pytest.mark.parametrize("lengths", [(0.1, 0.1), (2.0, 2.0), (0.0, 2.0)])
def test_differentiable(name, lengths):
    """Also where a frame that does not move, whose singular values are all one, has company."""
    function = {**RETRACTIONS, "project_tangent": project_tangent}[name]
    X = frames((2, 5, 3)).requires_grad_()
    scales = torch.tensor(lengths, dtype=torch.float64).view(2, 1, 1)
    U = (scales * tangents(X.detach())).requires_grad_()
    assert torch.autograd.gradcheck(function, (X, U))


@pytest.mark.parametrize("name", list(RETRACTIONS))
@pytest.mark.parametrize("length", [0.1, 2.0])
def test_differentiable_at_square_frames(name, length):
    """Singular values of a square frame plus a tangent direction come in equal pairs."""
    X = frames((2, 4, 4)).requires_grad_()
    U = (length * tangents(X.detach())).requires_grad_()
    assert torch.autograd.gradcheck(RETRACTIONS[name], (X, U))


def test_gradients_agree_between_the_ways_to_the_same_point():
    X, weight = frames((3, 7, 3)), directions((3, 7, 3), seed=3)
    for length in (0.1, 2.0):
        U = (length * tangents(X)).requires_grad_()
        (a,) = torch.autograd.grad((qr(X, U) * weight).sum(), U)
        (b,) = torch.autograd.grad((cholesky_qr(X, U) * weight).sum(), U)
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("function", [*RETRACTIONS.values(), pogo, project_tangent])
def test_wrong_shapes_are_refused(function):
    with pytest.raises(ShapeError, match=r"d >= r.*\(3, 6\).*mT"):
        function(torch.zeros(3, 6), torch.zeros(3, 6))
    with pytest.raises(ShapeError, match="d >= r"):
        function(torch.zeros(3), torch.zeros(3))
    with pytest.raises(ShapeError, match=r"\(6, 3\).*\(6, 2\)"):
        function(torch.zeros(6, 3), torch.zeros(6, 2))


@pytest.mark.parametrize("name", list(RETRACTIONS))
def test_empty_batches(name):
    X = torch.zeros(0, 6, 3)
    assert RETRACTIONS[name](X, X).shape == (0, 6, 3)


@pytest.mark.parametrize("name", ["cholesky_qr", "polar", "newton_schulz", "cayley"])
def test_ten_thousand_noisy_float32_steps_without_svd(name, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("a singular value decomposition in a step")

    for function in ("svd", "svdvals", "eigh"):
        monkeypatch.setattr(torch.linalg, function, refuse)
    X = frames((3, 24, 8), dtype=torch.float32)
    generator = torch.Generator().manual_seed(2)
    worst = 0.0
    for step in range(10_000):
        noise = torch.randn(X.shape, generator=generator)
        X = RETRACTIONS[name](X, 0.01 * project_tangent(X, noise))
        if step % 100 == 99:
            worst = max(worst, error(X))
    assert worst < 1e-5


# --- Newton-Schulz, Cayley, POGO. ---


@given(
    d=st.integers(1, 12), r=st.integers(1, 12), seed=st.integers(0, 999), length=st.floats(0, 0.6)
)
@settings(max_examples=40, deadline=None)
def test_newton_schulz_is_the_polar_factor_of_a_short_step(d, r, seed, length):
    r = min(d, r)
    X = frames((3, d, r), seed)
    U = length * tangents(X, seed + 1)
    torch.testing.assert_close(newton_schulz(X, U), polar(X, U), rtol=0, atol=2e-15)
    left, _, right = torch.linalg.svd(X + U, full_matrices=False)
    torch.testing.assert_close(newton_schulz(X, U), left @ right, rtol=0, atol=1e-14)


@pytest.mark.parametrize("length", [1e-9, 1e-5, 1e-3, 1e-2, 0.05, 0.1, 0.3, 0.7, 1.0, 10.0, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_newton_schulz_is_orthonormal_at_any_length(length, dtype):
    """At each of them another number of terms of the series is the right one."""
    X = frames((4, 24, 6), dtype=dtype)
    assert error(newton_schulz(X, length * tangents(X))) < 8 * torch.finfo(dtype).eps


def test_a_long_step_of_one_frame_leaves_the_others_polar():
    X = frames((3, 9, 4))
    U = 0.1 * tangents(X)
    U[1] *= 100
    Q = newton_schulz(X, U)
    torch.testing.assert_close(Q[[0, 2]], polar(X, U)[[0, 2]], rtol=0, atol=1e-15)
    torch.testing.assert_close(Q[1], lapack((X + U)[1]), rtol=0, atol=1e-13)


def test_polish_writes_where_it_is_told():
    X = frames((3, 9, 4))
    for length in (0.01, 5.0):
        Z, out = X + length * tangents(X), torch.empty_like(X)
        assert polish(Z, out=out) is out
        assert torch.equal(out, polish(Z))


@given(d=st.integers(1, 10), r=st.integers(1, 10), seed=st.integers(0, 999), t=st.floats(0.01, 3))
@settings(max_examples=40, deadline=None)
def test_cayley_is_the_transform_of_its_skew_matrix(d, r, seed, t):
    """Of size ``d``, solved as it is written."""
    r = min(d, r)
    X = frames((2, d, r), seed)
    U = t * tangents(X, seed + 1)
    I_d = torch.eye(d, dtype=X.dtype)
    P = I_d - X @ X.mT / 2
    W = P @ U @ X.mT - X @ U.mT @ P
    torch.testing.assert_close(W @ X, U, rtol=0, atol=1e-12)
    expected = torch.linalg.solve(I_d - W / 2, (I_d + W / 2) @ X)
    torch.testing.assert_close(cayley(X, U), expected, rtol=0, atol=1e-12)
    normal = X @ (X.mT @ directions(X.shape, seed + 2) @ torch.eye(r, dtype=X.dtype))
    normal = X @ (X.mT @ normal + normal.mT @ X)
    torch.testing.assert_close(cayley(X, U + normal), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", ["polar", "newton_schulz"])
def test_second_order_the_error_is_normal_to_leading_order(name):
    """The tangential part of what a curve of a second-order retraction accelerates by is none."""
    X = frames((2, 9, 4))
    U = tangents(X)
    steps = torch.logspace(-1, -2.5, 7, dtype=torch.float64)
    errors = torch.stack(
        [project_tangent(X, RETRACTIONS[name](X, t * U) - X - t * U).norm() for t in steps]
    )
    slope = ((errors[0] / errors[-1]).log() / (steps[0] / steps[-1]).log()).item()
    assert slope == pytest.approx(3, abs=0.1)


@given(d=st.integers(1, 10), r=st.integers(1, 10), seed=st.integers(0, 999))
@settings(max_examples=30, deadline=None)
def test_pogo_is_its_formula_with_matrices_of_size_d(d, r, seed):
    r = min(d, r)
    X, U = frames((2, d, r), seed), 0.3 * directions((2, d, r), seed + 1)
    A = U @ X.mT
    M = X + (A - A.mT) / 2 @ X
    torch.testing.assert_close(pogo(X, U), M + (M - M @ M.mT @ M) / 2, rtol=0, atol=1e-13)


def test_pogo_loses_orthonormality_with_the_fourth_power_of_the_step():
    X = frames((2, 9, 4))
    U = directions(X.shape) / 6
    errors = torch.tensor([error(pogo(X, t * U)) for t in (0.1, 0.01)])
    assert (errors[0] / errors[1]).log10().item() == pytest.approx(4, abs=0.1)


@pytest.mark.parametrize("name", list(RETRACTIONS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [1e-2, 5.0])
@pytest.mark.parametrize("look", [True, False])
def test_half_precision_is_computed_in_float32(name, dtype, length, look):
    options = {} if name == "qr" else {"look": look}
    X = frames((4, 24, 6), dtype=torch.float32).to(dtype)
    U = (length * tangents(X.float())).to(dtype)
    Q = RETRACTIONS[name](X, U, **options)
    assert Q.dtype == dtype
    expected = RETRACTIONS[name](X.float(), U.float(), **options)
    assert torch.equal(Q, expected.to(dtype))
    assert error(Q.float()) < torch.finfo(dtype).eps


@pytest.mark.parametrize("look", [True, False])
def test_polish_and_orthonormalize_take_half_precision(look):
    Z = (3 * directions((4, 24, 6))).bfloat16()
    for function in (polish, orthonormalize):
        Q = function(Z, look=look)
        assert torch.equal(Q, function(Z.float(), look=look).bfloat16())
