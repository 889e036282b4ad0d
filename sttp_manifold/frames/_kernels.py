"""Frames of both charts as Triton kernels: one program a frame, forward or backward.

The formulas are those of :mod:`sttp_manifold.frames._wy_form`; a reduced chart is a full one with
zeros above. Coordinates are read where they lie in one vector, and frames are written one after
another into a second one, as they are or transposed, so that frames of any shape go by one launch
for each width. Between two products ``r x r`` matrices lie in scratch memory, of which the backward
pass needs two. ``R``, ``BM``, ``BK`` and ``BD`` are as in :mod:`sttp_manifold.frames._tiles`.

Importing this file imports Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sttp_manifold.frames._tiles import (
    MATRIX,
    REFLECTORS,
    WITH_ONES,
    entries,
    gram_of,
    is_held,
    place_of,
    small_product,
    store_small,
)

__all__ = ["form_frames", "pull_back_frames"]


@triton.jit
def _mine(table):
    """What a table says of the frame of this program, and the strides of its entries."""
    row = table + tl.program_id(0) * 6
    d = tl.load(row + 2).to(tl.int32)
    r = tl.load(row + 3).to(tl.int32)
    full = tl.load(row + 4).to(tl.int32)
    turned = tl.load(row + 5).to(tl.int32)
    down = r + turned * (1 - r)
    along = 1 + turned * (d - 1)
    return tl.load(row), tl.load(row + 1), d, r, full, down, along


@triton.jit
def _store_factor(L, H, P, r, full, R: tl.constexpr):
    """Write ``tril(Y^T Y)``, its diagonal halved, to scratch, with ones beyond ``r``."""
    i = tl.arange(0, R)
    H += entries(P, i[:, None], i[None, :], r, r, full, 0, 0, REFLECTORS)
    H = tl.where(i[:, None] == i[None, :], 0.5 * (H + 1.0), H)
    H = H + (H - H)  # infinity would drop its reflector without a trace: NaN
    H = tl.where((i[:, None] >= i[None, :]) & (i[:, None] < r), H, 0.0)
    store_small(L, tl.where((i[:, None] == i[None, :]) & (i[:, None] >= r), 1.0, H), R)


@triton.jit
def _solve_from_below(L, Z, P, r, full, R: tl.constexpr):
    """``L^T Z = Y_top^T``, sixteen rows at a time, the last ones first."""
    i = tl.arange(0, R)
    ri = tl.arange(0, 16)
    panels = (r + 15) // 16
    for s in range(0, panels):
        top = (panels - 1 - s) * 16
        rows = top + ri
        # Row k of the transpose is column k.
        B = entries(P, i[None, :], rows[:, None], r, r, full, 0, 0, WITH_ONES)
        for k in range(top + 16, panels * 16, 16):
            a = tl.load(L + (k + ri)[None, :] * R + rows[:, None])
            z = tl.load(Z + (k + ri)[:, None] * R + i[None, :])
            B = tl.dot(-a, z, B, input_precision="ieee")
        for u in range(0, 16):
            j = 15 - u
            pivot = tl.load(L + (top + j) * (R + 1))
            row = tl.sum(tl.where(ri[:, None] == j, B, 0.0), 0) / pivot
            column = tl.load(L + (top + j) * R + rows, mask=ri < j, other=0.0)
            B = tl.where(ri[:, None] == j, row[None, :], B - column[:, None] * row[None, :])
        tl.store(Z + rows[:, None] * R + i[None, :], B)
        tl.debug_barrier()


@triton.jit
def _solve_from_above(L, W, r, R: tl.constexpr):
    """``W <- L^-1 W`` in scratch, sixteen rows at a time."""
    i = tl.arange(0, R)
    ri = tl.arange(0, 16)
    for top in range(0, r, 16):
        rows = top + ri
        B = tl.load(W + rows[:, None] * R + i[None, :])
        for k in range(0, top, 16):
            a = tl.load(L + rows[:, None] * R + (k + ri)[None, :])
            w = tl.load(W + (k + ri)[:, None] * R + i[None, :])
            B = tl.dot(-a, w, B, input_precision="ieee")
        for j in range(0, 16):
            pivot = tl.load(L + (top + j) * (R + 1))
            row = tl.sum(tl.where(ri[:, None] == j, B, 0.0), 0) / pivot
            column = tl.load(L + rows * R + top + j, mask=ri > j, other=0.0)
            B = tl.where(ri[:, None] == j, row[None, :], B - column[:, None] * row[None, :])
        tl.debug_barrier()
        tl.store(W + rows[:, None] * R + i[None, :], B)
        tl.debug_barrier()


@triton.jit
def _times(P, T, i, d, r, full, R: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr):
    """Rows ``i`` of the reflectors with their ones, times a matrix in scratch."""
    kk = tl.arange(0, BK)
    c = tl.arange(0, R)
    acc = tl.zeros((BM, R), tl.float32)
    for k in range(0, r, BK):
        q = k + kk
        y = entries(P, i[:, None], q[None, :], d, r, full, 0, 0, WITH_ONES)
        t = tl.load(T + q[:, None] * R + c[None, :], mask=q[:, None] < r, other=0.0)
        acc = tl.dot(y, t, acc, input_precision="ieee")
    return acc


@triton.jit
def form_frames(
    table, vector, frames, kept, R: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """Frames of a width: ``Q = E - Y Z``.

    Args:
        table: for each frame where its coordinates are, where it is to be written, ``d``, ``r``,
            whether its chart is the full one, whether its transpose is wanted.
        vector: the coordinates.
        frames: where to write.
        kept: two ``R x R`` matrices for each frame, for the backward pass.
    """
    start, place, d, r, full, down, along = _mine(table)
    P = vector + start
    Q = frames + place
    L = kept + tl.program_id(0).to(tl.int64) * (2 * R * R)
    Z = L + R * R
    # Ones and the linear part are added last: summed with the rest, a one would round away small
    # entries.
    H = gram_of(P, P, d, r, full, 0, 0, REFLECTORS, REFLECTORS, R, BD)
    _store_factor(L, H, P, r, full, R)
    _solve_from_below(L, Z, P, r, full, R)
    c = tl.arange(0, R)
    for k in range(0, d, BM):
        i = k + tl.arange(0, BM)
        q = tl.where(i[:, None] == c[None, :], 1.0, 0.0)
        q -= _times(P, Z, i, d, r, full, R, BM, BK)
        inside = (i[:, None] < d) & (c[None, :] < r)
        tl.store(Q + i[:, None] * down + c[None, :] * along, q, mask=inside)


@triton.jit
def pull_back_frames(
    table, vector, gradients, kept, scratch, result, R: tl.constexpr, BM: tl.constexpr,
    BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Cotangents of coordinates from those of frames of a width.

    Args:
        table: as in :func:`form_frames`.
        vector: the coordinates.
        gradients: cotangents of the frames, laid out as those.
        kept: what the forward pass has kept.
        scratch: two ``R x R`` matrices for each frame.
        result: where to write, laid out as ``vector``.
    """
    start, place, d, r, full, down, along = _mine(table)
    P = vector + start
    G = gradients + place
    L = kept + tl.program_id(0).to(tl.int64) * (2 * R * R)
    Z = L + R * R
    W = scratch + tl.program_id(0).to(tl.int64) * (2 * R * R)
    K = W + R * R
    H = gram_of(P, G, d, r, full, down, along, WITH_ONES, MATRIX, R, BD)
    store_small(W, H, R)
    _solve_from_above(L, W, r, R)
    # K + K^T of K = triu(W Z^T), its diagonal halved. Of Z no rows beyond the last panel exist.
    c = tl.arange(0, R)
    S = small_product(W, Z, r, R, BK, True)
    S = tl.where((c[:, None] < r) & (c[None, :] < r), S, 0.0)
    S = tl.where(c[:, None] < c[None, :], S, tl.where(c[:, None] == c[None, :], 0.5 * S, 0.0))
    store_small(K, S + tl.trans(S), R)
    kk = tl.arange(0, BK)
    for k0 in range(0, d, BM):
        i = k0 + tl.arange(0, BM)
        acc = _times(P, K, i, d, r, full, R, BM, BK)
        for k in range(0, r, BK):
            q = k + kk
            g = entries(G, i[:, None], q[None, :], d, r, full, down, along, MATRIX)
            z = tl.load(
                Z + c[None, :] * R + q[:, None],
                mask=(q[:, None] < r) & (c[None, :] < r),
                other=0.0,
            )
            acc = tl.dot(-g, z, acc, input_precision="ieee")
        acc -= tl.load(
            W + c[None, :] * R + i[:, None],
            mask=(i[:, None] < r) & (c[None, :] < r),
            other=0.0,
        )
        held = is_held(i[:, None], c[None, :], d, r, full)
        tl.store(result + start + place_of(i[:, None], c[None, :], r, full), acc, mask=held)
