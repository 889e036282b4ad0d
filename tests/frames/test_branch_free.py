"""Retractions that do not look at values: the points of those that do, in a fixed sequence."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from sttp_manifold.frames._branch_free import NEAR_IDENTITY, TERMS, series
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
    "cholesky_qr": cholesky_qr,
    "polar": polar,
    "newton_schulz": newton_schulz,
    "cayley": cayley,
}
DTYPES = [torch.float32, torch.float64]


def frames(shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(shape, dtype=torch.float64, generator=generator))[0].to(
        dtype
    )


def tangents(X, seed=1, rank=None):
    """Of norm one; of one direction where ``rank`` is 1, which is where conditions are worst."""
    generator = torch.Generator().manual_seed(seed)
    *b, d, r = X.shape
    inner = r if rank is None else rank
    G = torch.randn(*b, d, inner, dtype=torch.float64, generator=generator)
    G = G @ torch.randn(*b, inner, r, dtype=torch.float64, generator=generator)
    U = project_tangent(X.double(), G)
    return (U / U.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-9)).to(X.dtype)


def error(Q):
    Q = Q.double()
    return (Q.mT @ Q - torch.eye(Q.shape[-1], dtype=Q.dtype)).abs().max().item()


class Record(TorchDispatchMode):
    """Which operations ran."""

    def __init__(self):
        super().__init__()
        self.ran = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ran.append(func)
        return func(*args, **(kwargs or {}))


# --- The same points. ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", list(RETRACTIONS))
@given(
    n=st.integers(1, 4),
    d=st.integers(1, 20),
    r=st.integers(1, 20),
    seed=st.integers(0, 999),
    exponents=st.lists(st.floats(-6, 3), min_size=4, max_size=4),
    rank=st.sampled_from([None, 1]),
)
@example(n=2, d=5, r=5, seed=0, exponents=[-6.0, 0.0, 0.0, 0.0], rank=None)
@settings(max_examples=60, deadline=None)
def test_looking_changes_nothing(name, dtype, n, d, r, seed, exponents, rank):
    """Frames of one batch, each with a step of its own length, from 1e-6 to 1e3."""
    r = min(d, r)
    X = frames((n, d, r), seed, dtype)
    lengths = torch.tensor([10**e for e in exponents[:n]], dtype=dtype)[:, None, None]
    U = lengths * tangents(X, seed + 1, rank)
    a, b = RETRACTIONS[name](X, U, look=True), RETRACTIONS[name](X, U, look=False)
    # How well the point is known, since X + U has been rounded.
    known = torch.linalg.cond((X + U).double()) * torch.finfo(dtype).eps
    assert ((a - b).abs().amax((-2, -1)) <= 20 * known).all()
    assert error(b) <= 20 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [0.499, 0.501])
def test_the_thresholds_are_the_same(dtype, size):
    """Just beside the threshold the polar factor is far from the Q factor."""
    X = frames((1, 6, 3), dtype=dtype)
    A = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    root = torch.linalg.cholesky(torch.eye(3) + size / 2**0.5 * A).mT
    Z = (X.double() @ root).to(dtype)
    near = newton_schulz(Z, torch.zeros_like(Z), look=False)
    torch.testing.assert_close(
        near, newton_schulz(Z, torch.zeros_like(Z), look=True), rtol=0, atol=1e-6
    )
    assert (near - X).abs().max() > 0.1 if size < NEAR_IDENTITY else (near - X).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_series_is_cut_where_nothing_is_left(dtype):
    """Both passes on single numbers, all over the interval, in exact enough arithmetic."""
    x = torch.linspace(-NEAR_IDENTITY, NEAR_IDENTITY, 2001, dtype=torch.float64).view(-1, 1, 1)
    for terms in TERMS[dtype]:
        x = (1 + series(x, terms)).square() * (1 + x) - 1
    # In float64 what is left is below what it can be computed to.
    assert x.abs().max() <= torch.finfo(dtype).eps * (1 if dtype == torch.float32 else 8)
    first, second = TERMS[dtype]
    for fewer in ((first - 1, second), (first, second - 1)):
        x = torch.tensor([[[-NEAR_IDENTITY]]], dtype=torch.float64)
        for terms in fewer:
            x = (1 + series(x, terms)).square() * (1 + x) - 1
        assert x.abs().max() > torch.finfo(dtype).eps


def test_the_series_is_that_of_the_inverse_root():
    x = torch.tensor([[[1e-2]]], dtype=torch.float64)
    for terms in range(2, 8):
        left = float(1 + series(x, terms) - (1 + x).rsqrt())
        binomial = math.prod((0.5 / k - 1) for k in range(1, terms + 2))
        assert left == pytest.approx(-binomial * 1e-2 ** (terms + 1), rel=0.05, abs=3e-16)


# --- How far it holds. ---


@pytest.mark.parametrize("d", [9, 24, 64, 128, 600])
@pytest.mark.parametrize("r", [1, 6, 64])
@pytest.mark.parametrize("rank", [None, 1])
@pytest.mark.parametrize("function", [polish, orthonormalize])
def test_float32_frames_are_orthonormal_at_any_length_of_use(d, r, rank, function):
    if r > d:
        return
    X = frames((5, d, r), dtype=torch.float32)
    U = tangents(X, rank=rank)
    for length in (1e-6, 1e-2, 0.5, 0.7, 0.72, 1.0, 7.0, 30.0, 300.0, 3e3):
        assert error(function(X + length * U, look=False)) <= 2e-6, length
    if rank is None:
        for length in (1e5, 1e7, 1e9):
            assert error(function(X + length * U, look=False)) <= 2e-6, length


@pytest.mark.parametrize("shape", [(5, 24, 6), (5, 64, 64), (5, 600, 64)])
def test_beyond_that_digits_are_lost_one_by_one(shape):
    X = frames(shape, dtype=torch.float32)
    U = tangents(X, rank=1)
    assert error(polish(X + 1e5 * U, look=False)) <= 2e-5
    assert polish(X + 1e10 * U, look=False).isnan().all()
    assert error(polish(X.double() + 1e7 * U.double(), look=False)) <= 1e-14


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["cholesky_qr", "newton_schulz", "polar"])
def test_near_singular_matrices(name, dtype):
    """Not of the form X + U: conditions up to a thousandth of what float32 can tell."""
    for condition in (1e1, 1e2, 1e3):
        scales = torch.logspace(0, -math.log10(condition), 5, dtype=torch.float64)
        Z = ((frames((4, 12, 5)) * scales) @ frames((4, 5, 5), seed=5)).to(dtype)
        zero = torch.zeros_like(Z)
        a, b = RETRACTIONS[name](Z, zero, look=True), RETRACTIONS[name](Z, zero, look=False)
        assert error(b) <= 20 * torch.finfo(dtype).eps
        torch.testing.assert_close(a, b, rtol=0, atol=20 * condition * torch.finfo(dtype).eps)


@pytest.mark.parametrize("name", list(RETRACTIONS))
@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_of_columns_do_not_matter(name, dtype):
    if name in ("cayley", "polar"):
        return
    scales = torch.tensor([1e-8, 1.0, 1e8], dtype=dtype)
    Z = frames((3, 9, 3), dtype=dtype) * scales
    Q = RETRACTIONS[name](Z, torch.zeros_like(Z), look=False)
    torch.testing.assert_close(Q, frames((3, 9, 3), dtype=dtype), rtol=0, atol=1e-6)


# --- What is not finite. ---


@pytest.mark.parametrize("name", list(RETRACTIONS))
@pytest.mark.parametrize("length", [1e-2, 2.0])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_gives_nan_in_its_own_frame_only(name, length, poison):
    X = frames((4, 6, 3))
    U = length * tangents(X)
    clean = RETRACTIONS[name](X, U, look=False)
    U[2, 1, 1] = poison
    Q = RETRACTIONS[name](X, U, look=False)
    assert Q[2].isnan().all()
    kept = [0, 1, 3]
    torch.testing.assert_close(Q[kept], clean[kept], rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", ["cholesky_qr", "newton_schulz", "polar"])
@pytest.mark.parametrize(
    "make",
    [lambda X: torch.zeros_like(X), lambda X: X * 0 + X[..., :1], lambda X: X * 1e200],
    ids=["zero", "equal columns", "overflow"],
)
def test_what_has_no_factor_is_nan_or_a_frame_and_leaves_others_alone(name, make):
    X = frames((3, 6, 3))
    Z = X.clone()
    Z[1] = make(X[1])
    Q = RETRACTIONS[name](Z, torch.zeros_like(Z), look=False)
    assert Q[1].isnan().all() or error(Q[1]) < 1e-12
    torch.testing.assert_close(Q[[0, 2]], X[[0, 2]], rtol=0, atol=1e-15)


# --- Gradients, shapes, dtypes. ---


@pytest.mark.parametrize("name", list(RETRACTIONS))
@pytest.mark.parametrize("lengths", [(0.1, 0.1), (2.0, 2.0), (0.1, 2.0), (0.0, 30.0)])
def test_differentiable(name, lengths):
    X = frames((2, 5, 3)).requires_grad_()
    scale = torch.tensor(lengths, dtype=X.dtype)[:, None, None]
    U = (scale * tangents(X.detach())).requires_grad_()
    assert torch.autograd.gradcheck(lambda X, U: RETRACTIONS[name](X, U, look=False), (X, U))
    weight = frames((2, 5, 3), seed=3)
    grads = [
        torch.autograd.grad((RETRACTIONS[name](X, U, look=look) * weight).sum(), (X, U))
        for look in (True, False)
    ]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-12)


def test_gradients_of_a_frame_next_to_one_that_is_far_beyond():
    """The series of the far one overflows; nothing of it reaches the other, or itself."""
    X = frames((2, 6, 3))
    U = tangents(X) * torch.tensor([0.1, 1e35], dtype=X.dtype)[:, None, None]
    U.requires_grad_()
    (gradient,) = torch.autograd.grad(newton_schulz(X, U, look=False).square().sum(), U)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", list(RETRACTIONS))
@pytest.mark.parametrize("shape", [(6, 3), (2, 3, 6, 3), (0, 6, 3), (1, 1)])
def test_shapes(name, shape):
    X = frames(shape) if 0 not in shape else torch.zeros(shape)
    U = torch.zeros_like(X)
    Q = RETRACTIONS[name](X, U, look=False)
    assert Q.shape == X.shape
    torch.testing.assert_close(Q, X, rtol=0, atol=1e-15)
    # Not contiguous, like a view of a larger array.
    wide = X.mT.contiguous().mT
    torch.testing.assert_close(RETRACTIONS[name](wide, U, look=False), X, rtol=0, atol=1e-15)


@pytest.mark.parametrize("length", [0.01, 5.0])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16])
def test_polish_writes_where_it_is_told(length, dtype):
    X = frames((3, 9, 4), dtype=dtype)
    Z, out = X + length * tangents(X), torch.empty_like(X)
    kept = Z.clone()
    result = polish(Z, out=out, look=False)
    assert result.data_ptr() == out.data_ptr()
    assert torch.equal(out, polish(Z, look=False))
    assert torch.equal(Z, kept)


# --- No look, on any device but the CPU. ---


@pytest.mark.parametrize("function", [*RETRACTIONS.values(), pogo, qr, project_tangent])
def test_no_value_is_asked_for_elsewhere(function):
    """On the device without values, where asking for one is an error."""
    X = torch.empty(3, 6, 2, device="meta")
    assert function(X, X).device.type == "meta"
    if function in RETRACTIONS.values():
        with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
            function(X, X, look=True)


@pytest.mark.parametrize("name", list(RETRACTIONS))
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sequence_is_the_same_whatever_the_values(name, dtype):
    X = frames((4, 12, 5), dtype=dtype)
    U = tangents(X)
    sequences = []
    for length in (0.0, 1e-3, 0.5, 5.0, 1e30, math.nan):
        with Record() as record:
            RETRACTIONS[name](X, length * U, look=False)
        sequences.append(record.ran[1:])  # after length * U
    assert all(sequence == sequences[0] for sequence in sequences)
    waits = ("_local_scalar_dense", "nonzero", "_linalg_check_errors", "index.Tensor", "svd", "eig")
    for func in sequences[0]:
        assert not any(word in str(func) for word in waits), func


@pytest.mark.parametrize(("dtype", "at_most"), [(torch.float32, 30), (torch.float64, 35)])
def test_how_many_kernels(dtype, at_most):
    """Views, which cost no kernel, left out."""
    X = frames((4, 12, 5), dtype=dtype)
    out = torch.empty_like(X)
    with Record() as record:
        polish(X, out=out, look=False)
    ran = Counter(func.overloadpacket.__name__ for func in record.ran if not func.is_view)
    assert sum(ran.values()) <= at_most
    assert ran["linalg_cholesky_ex"] == ran["linalg_solve_triangular"] == 2
