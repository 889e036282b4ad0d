"""The steepest direction is a tangent vector of norm one, and no other ascends more."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given
from hypothesis import strategies as st

from sttp_manifold.optim._direction import POLYNOMIALS, steepest_direction

SHAPES = [(40, 8), (16, 8), (9, 8), (8, 8), (7, 7), (12, 4), (64, 3), (5, 1), (2, 1), (2, 2)]


def frame(d, r, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, r, dtype=torch.float64, generator=generator))[0]


def gradient(d, r, seed=0, decay=0.0):
    """Random; its singular values fall by as many powers of ten as ``decay`` says."""
    generator = torch.Generator().manual_seed(seed + 1)
    G = torch.randn(d, r, dtype=torch.float64, generator=generator)
    return G * torch.logspace(0, -decay, r, dtype=torch.float64)


def tangent(X, G):
    S = X.mT @ G
    return G - X @ (S + S.mT) / 2


def direction(X, G):
    return steepest_direction(X[None], G[None])[0]


def spectral_norm(D):
    return float(torch.linalg.matrix_norm(D, 2))


def upper_bound(X, G):
    """Nuclear norm of ``G - X L``, made small over symmetric ``L`` by SciPy.

    For a tangent ``D`` with ``|D|_2 <= 1`` and any such ``L``, ``<G, D> = <G - X L, D>`` is no
    larger.
    """
    r = X.shape[1]
    rows, columns = np.triu_indices(r)
    X, G = X.numpy(), G.numpy()

    def symmetric(entries):
        L = np.zeros((r, r))
        L[rows, columns] = entries
        return L + np.triu(L, 1).T

    def cost(entries):
        U, s, Vt = np.linalg.svd(G - X @ symmetric(entries), full_matrices=False)
        slope = -(X.T @ (U @ Vt))
        slope = slope + slope.T
        slope[np.diag_indices(r)] /= 2
        return s.sum(), slope[rows, columns]

    start = np.zeros(len(rows))
    options = {"maxiter": 3000, "maxfun": 6000, "gtol": 1e-9, "ftol": 1e-14, "maxcor": 40}
    return scipy.optimize.minimize(cost, start, jac=True, method="L-BFGS-B", options=options).fun


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_no_tangent_vector_of_norm_one_ascends_more(shape, decay):
    X, G = frame(*shape), gradient(*shape, decay=decay)
    D = direction(X, G)
    assert spectral_norm(X.mT @ D + D.mT @ X) < 1e-9
    assert spectral_norm(D) == pytest.approx(1, abs=5e-4)
    value = float((G * D).sum())
    # The bound, which SciPy does not always make the least one, from above.
    assert 0.995 * upper_bound(X, tangent(X, G)) < value < 1.0005 * upper_bound(X, tangent(X, G))


@given(
    d=st.integers(1, 12),
    r=st.integers(1, 12),
    seed=st.integers(0, 999),
    decay=st.floats(0, 2),
    other=st.integers(0, 999),
)
def test_it_is_tangent_and_of_norm_one_and_beats_others(d, r, seed, decay, other):
    d, r = max(d, r), min(d, r)
    X, G = frame(d, r, seed), gradient(d, r, seed, decay)
    D = direction(X, G)
    omega = G @ X.mT - X @ G.mT
    sizes = torch.linalg.svdvals(omega)
    assert spectral_norm(X.mT @ D + D.mT @ X) < 1e-7
    if d == r == 1:
        assert not D.any()  # there is nowhere to go
        return
    assert spectral_norm(D) == pytest.approx(1, abs=5e-4)
    optimum = float(sizes.sum()) / 2
    value = float((G * D).sum())
    # What is lost is of singular values below 5e-3 of the largest.
    assert optimum - float(sizes[0]) * r * 5e-3 <= value <= optimum * (1 + 5e-4)
    rival = tangent(X, gradient(d, r, other + 5000))
    assert value >= float((G * rival).sum()) / max(spectral_norm(rival), 1e-12) - 1e-4 * optimum


@pytest.mark.parametrize("shape", SHAPES)
def test_all_columns_turn_where_they_can(shape):
    d, r = shape
    D = direction(frame(d, r), gradient(d, r))
    sizes = torch.linalg.svdvals(D)
    # A skew matrix of odd order leaves one direction alone, which is in no span if there is room.
    turning = r - (d % 2 and d < 2 * r)
    torch.testing.assert_close(sizes[:turning], torch.ones_like(sizes[:turning]), rtol=0, atol=2e-2)


@pytest.mark.parametrize("scale", [1e-20, 1e-30, 1e20, 1e30])
@pytest.mark.parametrize("shape", SHAPES)
def test_scales_of_float32_do_not_matter(shape, scale):
    X, G = frame(*shape).float(), gradient(*shape).float()
    torch.testing.assert_close(direction(X, G * scale), direction(X, G), rtol=0, atol=2e-4)


@pytest.mark.parametrize("decay", [0.0, 2.0])
@pytest.mark.parametrize("shape", [*SHAPES, (200, 64), (64, 40), (1000, 16)])
def test_float32_is_float64(shape, decay):
    X, G = frame(*shape), gradient(*shape, decay=decay)
    torch.testing.assert_close(
        direction(X.float(), G.float()).double(), direction(X, G), rtol=0, atol=1e-3
    )


def test_without_a_gradient_there_is_no_direction():
    for shape in SHAPES:
        X = frame(*shape)
        assert not direction(X, torch.zeros_like(X)).any()


def test_the_normal_part_of_a_gradient_does_not_count():
    X, G = frame(9, 4), gradient(9, 4)
    S = gradient(4, 4, seed=3)
    torch.testing.assert_close(direction(X, G + X @ (S + S.mT)), direction(X, G))


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_of_zeros_stay_and_change_nothing(shape):
    """Padded, a frame of few rows goes the way of those of many."""
    d, r = shape
    X, G = frame(d, r), gradient(d, r)
    padded = [torch.nn.functional.pad(A, (0, 0, 0, 3 * r)) for A in (X, G)]
    D = direction(*padded)
    assert not D[d:].any()
    torch.testing.assert_close(D[:d], direction(X, G), rtol=0, atol=1e-6)


def test_frames_of_a_batch_are_alone():
    X = torch.stack([frame(9, 4, seed) for seed in range(3)])
    G = torch.stack([10.0**seed * gradient(9, 4, seed) for seed in range(3)])
    G[1] = 0
    D = steepest_direction(X, G)
    for x, g, together in zip(X, G, D, strict=True):
        torch.testing.assert_close(together, direction(x, g), rtol=0, atol=1e-12)


def test_polynomials_are_the_best_of_their_degree():
    """Each differs from one by as much, with changing sign, at four points: Chebyshev's theorem."""
    low, high = 5e-3, 1.0
    for k, (a, b, c) in enumerate(POLYNOMIALS):
        x = np.linspace(low, high, 200_001)
        error = a * x + b * x**3 + c * x**5 - 1
        worst = np.abs(error).max()
        if k < len(POLYNOMIALS):
            extremes = [error[0], *error[1:-1][np.diff(np.sign(np.diff(error))) != 0], error[-1]]
            np.testing.assert_allclose(extremes, worst * np.array([-1, 1, -1, 1]), rtol=1e-5)
        low, high = 1 - worst, 1 + worst
    assert worst < 5e-4
