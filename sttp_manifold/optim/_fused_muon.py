"""The step of :class:`RiemannianMuon` for frames as a Triton kernel: one program a frame.

As :mod:`~sttp_manifold.optim._fused`, by the tables of :mod:`~sttp_manifold.optim._fused_plan`. The
direction is that of :mod:`~sttp_manifold.optim._direction`, for frames of all shapes by polynomials
of the ``2 r x 2 r`` matrix ``M``, which lies in scratch memory as four blocks of ``R x R``. With
``Z = cos X - sin (X A + N B)`` no direction is written: the point goes over what ``N`` was.

Importing this file imports Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sttp_manifold.frames._tiles import (
    add_product,
    add_times,
    eye,
    gram,
    load_small,
    store_small,
    symmetric_part,
    times,
)
from sttp_manifold.optim._fused import frame_of, settle

__all__ = ["turn_frames"]

_AT_REST = tl.constexpr(8 * 1.1920929e-07)  # as in optim/muon.py
_LARGEST = tl.constexpr(3.4028235e38)


@triton.jit
def _largest(A, d, r, DTYPE: tl.constexpr, R: tl.constexpr, BM: tl.constexpr):
    """The largest entry of a ``(d, r)`` matrix by size; NaN if one is infinite or NaN."""
    c = tl.arange(0, R)
    most = tl.zeros((BM, R), tl.float32)
    bad = tl.zeros((BM, R), tl.float32)
    for k in range(0, d, BM):
        i = k + tl.arange(0, BM)
        inside = (i[:, None] < d) & (c[None, :] < r)
        a = tl.load(A + i[:, None] * r + c[None, :], mask=inside, other=0.0).to(tl.float32)
        most = tl.maximum(most, tl.abs(a))
        bad += a - a  # a maximum passes over NaN
    return tl.max(tl.max(most, 1), 0) + tl.sum(tl.sum(bad, 1), 0)


@triton.jit
def _write_scaled(W, A, size, d, r, R: tl.constexpr, BM: tl.constexpr):
    """``W <- A / size``; ``A`` may be ``W``."""
    c = tl.arange(0, R)
    scale = tl.where(size == 0.0, 1.0, size)
    for k in range(0, d, BM):
        i = k + tl.arange(0, BM)
        at = i[:, None] * r + c[None, :]
        inside = (i[:, None] < d) & (c[None, :] < r)
        a = tl.load(A + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(W + at, a / scale, mask=inside)
    tl.debug_barrier()


@triton.jit
def _block(A, B, n, r, R: tl.constexpr, BK: tl.constexpr):
    """Block ``n`` of the product of two matrices of four blocks."""
    left = A + (n // 2) * (2 * R * R)
    right = B + (n % 2) * (R * R)
    acc = tl.zeros((R, R), tl.float32)
    for h in range(0, 2):
        acc = add_product(acc, left + h * (R * R), right + h * (2 * R * R), r, R, BK, False)
    return acc


@triton.jit
def _combine(C, A, B, product, D, kept, first, last, r, R: tl.constexpr, BK: tl.constexpr):
    """Blocks ``first`` to ``last`` of ``C <- product A B + kept D``, none of which is ``C``."""
    for n in range(first, last):
        at = n * (R * R)
        acc = product * _block(A, B, n, r, R, BK) + kept * load_small(D + at, R)
        store_small(C + at, acc, R)


@triton.jit
def _fourth_powers(Q, R: tl.constexpr):
    """Trace of the square of a matrix of four blocks."""
    total = 0.0
    for n in range(0, 4):
        mine = load_small(Q + n * (R * R), R)
        other = load_small(Q + ((n % 2) * 2 + n // 2) * (R * R), R)
        total += tl.sum(tl.sum(mine * tl.trans(other), 1), 0)
    return total


@triton.jit
def _scale(A, factor, R: tl.constexpr):
    for n in range(0, 4):
        store_small(A + n * (R * R), factor * load_small(A + n * (R * R), R), R)


@triton.jit
def _polar_of_skew(M, Q, F, polynomials, last, r, R: tl.constexpr, BK: tl.constexpr):
    """The first ``r`` columns of ``msign(M)``, written to the first two blocks of ``M``.

    Args:
        M: four blocks of a matrix that is skew in some basis; and
        Q: memory for four others; and
        F: likewise. All are overwritten.
        polynomials: coefficients of ``x``, ``-x^3`` and ``x^5``, those of each polynomial in turn.
        last: how many polynomials there are but the last one, an even number.
    """
    zero = 0.0
    _combine(Q, M, M, 1.0, M, zero, 0, 4, r, R, BK)
    fourth = 0.5 * _fourth_powers(Q, R)
    scale = tl.sqrt(tl.sqrt(tl.where(fourth < 0.0, 0.0, fourth)))
    scale = tl.where(scale == 0.0, 1.0, scale)
    _scale(M, 1.0 / scale, R)
    _scale(Q, 1.0 / scale / scale, R)
    for n in range(0, last):
        a = tl.load(polynomials + 3 * n)
        b = tl.load(polynomials + 3 * n + 1)
        c = tl.load(polynomials + 3 * n + 2)
        _combine(F, Q, Q, c, Q, -b, 0, 4, r, R, BK)
        _combine(Q, M, F, 1.0, M, a, 0, 4, r, R, BK)
        _combine(M, Q, Q, 1.0, Q, zero, 0, 4, r, R, BK)
        M, Q = Q, M
    a = tl.load(polynomials + 3 * last)
    b = tl.load(polynomials + 3 * last + 1)
    c = tl.load(polynomials + 3 * last + 2)
    # The first block column: blocks 0 and 2.
    one = eye(r, R)
    for h in range(0, 2):
        n = 2 * h
        at = n * (R * R)
        T = c * _block(Q, Q, n, r, R, BK) - b * load_small(Q + at, R)
        store_small(F + at, T + tl.where(h == 0, a, zero) * one, R)
    # All of Q has been read.
    top = _block(M, F, 0, r, R, BK)
    store_small(Q, top, R)
    store_small(Q + R * R, _block(M, F, 2, r, R, BK), R)
    for h in range(0, 2):
        store_small(M + h * (R * R), load_small(Q + h * (R * R), R), R)


@triton.jit
def turn_frames(
    table, gradients, momentum, work, scratch, polynomials, turn,
    cos, sin, sign, keep, last,
    NESTEROV: tl.constexpr, ON_DEVICE: tl.constexpr, DTYPE: tl.constexpr,
    R: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Turn each frame of a width by an angle.

    Args:
        table: as of :func:`~sttp_manifold.optim._fused.step_frames`; and
        gradients: likewise; and
        momentum: likewise; and
        work: likewise.
        scratch: twelve ``R x R`` matrices for each frame.
        polynomials: coefficients of ``x``, ``-x^3`` and ``x^5``, those of each polynomial in turn.
        turn: cosine and sine of the angle, if they are on the device.
        cos: the cosine, otherwise; and
        sin: the sine.
        sign: minus one to ascend.
        keep: decay of the momentum.
        last: how many polynomials there are but the last one.
    """
    row = table + tl.program_id(0) * 7
    X, place, d, r, G = frame_of(row, gradients, DTYPE)
    V = momentum + place
    W = work + place
    M = scratch + tl.program_id(0).to(tl.int64) * (12 * R * R)
    Q = M + 4 * R * R
    F = Q + 4 * R * R
    c = tl.arange(0, R)
    if ON_DEVICE:
        cos = tl.load(turn).to(tl.float32)
        sin = tl.load(turn + 1).to(tl.float32)

    # The tangent gradient, of numbers up to one, so that no sum overflows.
    size = _largest(G, d, r, DTYPE, R, BM)
    _write_scaled(W, G, size, d, r, R, BM)
    store_small(F, symmetric_part(gram(X, W, d, r, R, BD)), R)
    add_times(W, X, F, d, r, 1.0, -1.0, R, BM, BK)
    rests = _largest(W, d, r, tl.float32, R, BM) <= _AT_REST
    size = sign * tl.minimum(size, _LARGEST / (8.0 * d))
    for k in range(0, d, BM):
        i = k + tl.arange(0, BM)
        at = i[:, None] * r + c[None, :]
        inside = (i[:, None] < d) & (c[None, :] < r)
        g = size * tl.load(W + at, mask=inside, other=0.0)
        m = tl.load(V + at, mask=inside, other=0.0)
        m = g + keep * (m - g)
        tl.store(V + at, m, mask=inside)
        if NESTEROV:
            m = g + keep * (m - g)
        tl.store(W + at, m, mask=inside)
    tl.debug_barrier()

    # N over the work, and M.
    _write_scaled(W, W, _largest(W, d, r, tl.float32, R, BM), d, r, R, BM)
    H = gram(X, W, d, r, R, BD)
    store_small(M, H - tl.trans(H), R)
    store_small(F, H, R)
    add_times(W, X, F, d, r, 1.0, -1.0, R, BM, BK)
    store_small(M + R * R, -gram(W, W, d, r, R, BD), R)
    store_small(M + 2 * R * R, eye(r, R), R)
    store_small(M + 3 * R * R, tl.zeros((R, R), tl.float32), R)
    _polar_of_skew(M, Q, F, polynomials, last, r, R, BK)

    # What X and N are multiplied with, and the point.
    A = tl.where(rests, 0.0, load_small(M, R))
    B = tl.where(rests, 0.0, load_small(M + R * R, R))
    store_small(Q, cos * eye(r, R) - sin * A, R)
    store_small(Q + R * R, -sin * B, R)
    for k in range(0, d, BM):
        i = k + tl.arange(0, BM)
        z = times(X, Q, i, d, r, R, BM, BK) + times(W, Q + R * R, i, d, r, R, BM, BK)
        tl.debug_barrier()  # all of these rows have been read before one is written
        inside = (i[:, None] < d) & (c[None, :] < r)
        tl.store(W + i[:, None] * r + c[None, :], z, mask=inside)
    tl.debug_barrier()
    settle(X, W, V, gram(W, W, d, r, R, BD), M, Q, d, r, True, DTYPE, R, BM, BK, BD)
