"""Products of a frame in Triton: what its fused kernels are put together from.

Imported by those kernels only, which are imported only where they are used: Triton comes with torch
for CUDA, and with nothing else.

A kernel has one program for each frame. ``r x r`` matrices between two products go through scratch
memory, which stays in the cache, so that every product is one loop over small pieces: little code,
few registers, any ``r`` up to 128. ``R`` is ``r`` rounded up to 16, 32, 64 or 128; whatever lies
beyond ``r`` is zero. Products are of float32 in full precision; long sums are summed in two levels,
so that each rounding is one of a short sum. Writes to scratch are seen by all threads of a program
after a barrier.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "MATRIX",
    "REFLECTORS",
    "SIZES",
    "WITH_ONES",
    "add_product",
    "add_times",
    "address",
    "entries",
    "eye",
    "gram",
    "gram_of",
    "inverse_root",
    "is_held",
    "load_small",
    "padded",
    "place_of",
    "polish",
    "small_product",
    "store_small",
    "symmetric_part",
    "times",
]

MATRIX, REFLECTORS, WITH_ONES = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""What the entries of a matrix are."""

EPS = tl.constexpr(1.1920929e-07)
NEAR_IDENTITY = tl.constexpr(0.5)
"""As :data:`sttp_manifold.frames._branch_free.NEAR_IDENTITY`."""

SIZES = {
    16: dict(BM=64, BK=16, BD=64, num_warps=4, num_stages=2),
    32: dict(BM=64, BK=32, BD=32, num_warps=4, num_stages=2),
    64: dict(BM=64, BK=32, BD=32, num_warps=8, num_stages=2),
    128: dict(BM=64, BK=16, BD=16, num_warps=16, num_stages=2),
}
"""For each width, rows of a block of a product, rows of a piece of a Gram matrix, and the like.

Chosen so that nothing is spilled from registers, and the shared memory of any GPU since 2020 does.
"""


def padded(r: int) -> int:
    """The width at which frames of ``r`` columns are computed."""
    return next(width for width in SIZES if r <= width)


@triton.jit
def address(table, i, DTYPE: tl.constexpr):
    """The pointer that a table of addresses holds at a place."""
    return tl.load(table + i).to(tl.pointer_type(DTYPE))


@triton.jit
def eye(r, R: tl.constexpr):
    """The identity of order ``r``, and zeros beyond."""
    i = tl.arange(0, R)
    return tl.where((i[:, None] == i[None, :]) & (i[:, None] < r), 1.0, 0.0)


@triton.jit
def _eye_beyond(r, R: tl.constexpr):
    i = tl.arange(0, R)
    return tl.where((i[:, None] == i[None, :]) & (i[:, None] >= r), 1.0, 0.0)


@triton.jit
def store_small(B, T, R: tl.constexpr):
    """Write an ``R x R`` matrix to scratch, for every thread to see."""
    i = tl.arange(0, R)
    tl.debug_barrier()  # somebody may still be reading what was there
    tl.store(B + i[:, None] * R + i[None, :], T)
    tl.debug_barrier()


@triton.jit
def load_small(B, R: tl.constexpr):
    """An ``R x R`` matrix in scratch."""
    i = tl.arange(0, R)
    return tl.load(B + i[:, None] * R + i[None, :])


@triton.jit
def add_product(acc, A, B, r, R: tl.constexpr, BK: tl.constexpr, TRANSPOSED: tl.constexpr):
    """``acc + A B`` of matrices in scratch; with the transpose of ``B`` if ``TRANSPOSED``."""
    i = tl.arange(0, R)
    kk = tl.arange(0, BK)
    for k in range(0, r, BK):
        q = k + kk
        a = tl.load(A + i[:, None] * R + q[None, :], mask=q[None, :] < r, other=0.0)
        if TRANSPOSED:
            b = tl.load(B + i[None, :] * R + q[:, None], mask=q[:, None] < r, other=0.0)
        else:
            b = tl.load(B + q[:, None] * R + i[None, :], mask=q[:, None] < r, other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


@triton.jit
def small_product(A, B, r, R: tl.constexpr, BK: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Product of two matrices in scratch; with the transpose of the second if ``TRANSPOSED``."""
    return add_product(tl.zeros((R, R), tl.float32), A, B, r, R, BK, TRANSPOSED)


@triton.jit
def place_of(i, j, r, full):
    """Where entry ``(i, j)``, below the diagonal, of the reflectors is among their coordinates."""
    above = full * ((r * (r - 1)) // 2)
    return tl.where(i < r, (i * (i - 1)) // 2 + j, above + (i - r) * r + j)


@triton.jit
def is_held(i, j, d, r, full):
    """Whether entry ``(i, j)`` of the reflectors is a coordinate."""
    return (i < d) & (j < r) & (j < i) & (i >= r - full * r)


@triton.jit
def entries(A, i, j, d, r, full, down, along, KIND: tl.constexpr):
    """Entries of a ``(d, r)`` matrix, in float32, zeros beyond.

    Args:
        A: where they are.
        i: their rows; and
        j: columns.
        full: of the coordinates of a frame whether its chart is the full one; and
        down: of a matrix, how far a row is from the next; and
        along: a column.
        KIND: ``MATRIX``; ``REFLECTORS``, the coordinates of a frame as its reflectors; or
            ``WITH_ONES``, these with the ones on their diagonal.
    """
    if KIND == MATRIX:
        a = tl.load(A + i * down + j * along, mask=(i < d) & (j < r), other=0.0).to(tl.float32)
    else:
        held = is_held(i, j, d, r, full)
        a = tl.load(A + place_of(i, j, r, full), mask=held, other=0.0)
        if KIND == WITH_ONES:
            a += tl.where((i == j) & (i < d) & (j < r), 1.0, 0.0)
    return a


@triton.jit
def gram_of(
    A, B, d, r, full, down, along, LEFT: tl.constexpr, RIGHT: tl.constexpr, R: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """``A^T B`` of two ``(d, r)`` matrices of the kinds ``LEFT`` and ``RIGHT`` of entries."""
    rows = tl.arange(0, BD)
    c = tl.arange(0, R)
    total = tl.zeros((R, R), tl.float32)
    for big in range(0, d, 8 * BD):
        acc = tl.zeros((R, R), tl.float32)
        for k in range(big, tl.minimum(big + 8 * BD, d), BD):
            i = k + rows
            a = entries(A, i[None, :], c[:, None], d, r, full, down, along, LEFT)
            b = entries(B, i[:, None], c[None, :], d, r, full, down, along, RIGHT)
            acc = tl.dot(a, b, acc, input_precision="ieee")
        total += acc
    return total


@triton.jit
def gram(A, B, d, r, R: tl.constexpr, BD: tl.constexpr):
    """``A^T B`` of two ``(d, r)`` matrices, row by row."""
    return gram_of(A, B, d, r, 0, r, 1, MATRIX, MATRIX, R, BD)


@triton.jit
def symmetric_part(A):
    """``(A + A^T) / 2``."""
    return 0.5 * (A + tl.trans(A))


@triton.jit
def times(A, T, i, d, r, R: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr):
    """Rows ``i`` of a ``(d, r)`` matrix, times one in scratch."""
    kk = tl.arange(0, BK)
    c = tl.arange(0, R)
    acc = tl.zeros((BM, R), tl.float32)
    for k in range(0, r, BK):
        q = k + kk
        a = tl.load(
            A + i[:, None] * r + q[None, :],
            mask=(i[:, None] < d) & (q[None, :] < r),
            other=0.0,
        ).to(tl.float32)
        t = tl.load(T + q[:, None] * R + c[None, :], mask=q[:, None] < r, other=0.0)
        acc = tl.dot(a, t, acc, input_precision="ieee")
    return acc


@triton.jit
def add_times(Y, X, T, d, r, keep, factor, R: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr):
    """``Y <- keep Y + factor X T``, with ``T`` in scratch; ``X`` may be ``Y``."""
    c = tl.arange(0, R)
    for k in range(0, d, BM):
        i = k + tl.arange(0, BM)
        at = i[:, None] * r + c[None, :]
        inside = (i[:, None] < d) & (c[None, :] < r)
        y = factor * times(X, T, i, d, r, R, BM, BK)
        y += keep * tl.load(Y + at, mask=inside, other=0.0)
        tl.debug_barrier()  # all of these rows have been read before one is written
        tl.store(Y + at, y, mask=inside)
    tl.debug_barrier()


@triton.jit
def _inverse_factor(H, r, R: tl.constexpr):
    """Inverse of the upper Cholesky factor of a positive definite matrix.

    Elimination without pivots of ``[H | I]``: with ``H = L D L^T``, ``L^-1`` is what becomes of
    the identity. The root of a negative pivot is NaN.
    """
    i = tl.arange(0, R)
    A = H
    B = tl.where(i[:, None] == i[None, :], 1.0, 0.0)
    for j in range(0, r):
        here = i[:, None] == j
        p = tl.sum(tl.where(here, A, 0.0), 0)
        q = tl.sum(tl.where(here, B, 0.0), 0)
        column = tl.sum(tl.where(i[None, :] == j, A, 0.0), 1)
        pivot = tl.sum(tl.where(i == j, p, 0.0), 0)
        f = tl.where(i > j, column / pivot, 0.0)
        A -= f[:, None] * p[None, :]
        B -= f[:, None] * q[None, :]
    diagonal = tl.sum(tl.where(i[:, None] == i[None, :], A, 0.0), 1)
    return tl.trans(B / tl.sqrt(diagonal)[:, None])


@triton.jit
def inverse_root(B0, B1, D, size, r, R: tl.constexpr, BK: tl.constexpr):
    """Write ``(I + D)^(-1/2) - I``, cut where the size of ``D`` asks for it, to ``B0``.

    Args:
        B0: scratch for the result.
        B1: scratch that is overwritten.
        D: the excess of a Gram matrix.
        size: its Frobenius norm, at most 1/2.

    Returns:
        A bound on the excess that is left.
    """
    T = -0.5 * D
    left = 0.75 * size * size
    if left > EPS:
        store_small(B1, D, R)
        left = 0.625 * size * size * size
        T = 0.375 * D
        if left > EPS:
            left = 0.546875 * size * size * size * size
            store_small(B0, 0.375 * eye(r, R) - 0.3125 * D, R)
            T = small_product(B1, B0, r, R, BK, False)
        store_small(B0, T - 0.5 * eye(r, R), R)
        T = small_product(B1, B0, r, R, BK, False)
    store_small(B0, T, R)
    return left


@triton.jit
def polish(
    W, H, B0, B1, d, r, R: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr
):
    """Orthonormalize a matrix in place, as :func:`sttp_manifold.frames.orthonormal.polish` does.

    Args:
        W: the matrix, ``(d, r)`` in float32.
        H: its Gram matrix.
        B0: scratch; and
        B1: likewise.
    """
    one = eye(r, R)
    D = H - one
    size = tl.sqrt(tl.sum(tl.sum(D * D, 1), 0))
    if size <= NEAR_IDENTITY:
        left = size + 1.0
        while left > EPS:
            left = inverse_root(B0, B1, D, size, r, R, BK)
            add_times(W, W, B0, d, r, 1.0, 1.0, R, BM, BK)
            if left > EPS:
                D = gram(W, W, d, r, R, BD) - one
                size = left
    else:  # and where it is NaN
        bad = size - size  # NaN where an overflow would be divided away
        shift = 2.0 * EPS * r
        for _ in range(2):
            T = _inverse_factor(H + shift * one * H + _eye_beyond(r, R), r, R)
            store_small(B0, T + bad, R)
            add_times(W, W, B0, d, r, 0.0, 1.0, R, BM, BK)
            H = gram(W, W, d, r, R, BD)
            shift *= 0.0
