"""The step of a Riemannian optimizer as Triton kernels: one program a frame does all of it.

Points and gradients are read where they lie, by a table of addresses, and moments lie in flat
buffers (:mod:`~sttp_manifold.optim._fused_plan`), so that nothing is copied together and a network
is stepped by one launch for each width of frames and one for all coordinates that are no frames.
The rule is that of :mod:`~sttp_manifold.optim.adam` and :mod:`~sttp_manifold.optim.sgd`, and is
tested against them.

Importing this file imports Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sttp_manifold.frames._tiles import (
    add_times,
    address,
    gram,
    polish,
    store_small,
    symmetric_part,
)

__all__ = ["frame_of", "settle", "step_coordinates", "step_frames"]

ADAM = tl.constexpr(0)
_LONGEST = tl.constexpr(1e3)  # as in optim/_blocks.py
_LARGEST = tl.constexpr(3.4028235e38)
_FAR = tl.constexpr(2.2517998e15)  # as in optim/_moments.py
_TINY = tl.constexpr(1.1754944e-38)


@triton.jit
def _rates(counts, which, lr_ptr, lr, log1, log2, LR_TENSOR: tl.constexpr):
    """Minus the rate over the first bias correction, and one over the second one."""
    step = tl.load(counts + which).to(tl.float64)
    if LR_TENSOR:
        lr = tl.load(lr_ptr).to(tl.float32)
    first = -(lr / (1.0 - tl.exp(step * log1)))
    second = 1.0 / (1.0 - tl.exp(step * log2))
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def _averaged(v, squares, w2):
    """The moving average of squares; one that has overflowed is forgotten where nothing is kept."""
    return tl.where(w2 < 1.0, v * (1.0 - w2), 0.0) + w2 * squares


@triton.jit
def _cut(u):
    """Quotients whose squares have a finite sum; what is no number stays none."""
    return tl.where(u > _FAR, _FAR, tl.where(u < -_FAR, -_FAR, u))


@triton.jit
def _second(v, squares, w2, peak, at, mask, inverse, eps, AMSGRAD: tl.constexpr, zero):
    """The new second moment, and the root that momentum is divided by."""
    v = _averaged(v, squares, w2)
    highest = v
    if AMSGRAD:
        highest = tl.maximum(tl.load(peak + at, mask=mask, other=0.0), v)
        tl.store(peak + at, highest, mask=mask)
    root = tl.sqrt(highest * inverse) + eps
    return v, tl.maximum(root, zero)


@triton.jit
def frame_of(row, gradients, DTYPE: tl.constexpr):
    """What a row of the table says of a frame.

    Returns:
        Where the frame is, and in the buffers; its rows and columns; where its gradient is.
    """
    X = address(row, 0, DTYPE)
    place = tl.load(row + 1)
    d = tl.load(row + 2).to(tl.int32)
    r = tl.load(row + 3).to(tl.int32)
    G = address(gradients, tl.load(row + 4), DTYPE)
    return X, place, d, r, G


@triton.jit
def _with_momentum(M, inside, g, keep, fresh, NESTEROV: tl.constexpr):
    """The direction of SGD, with the momentum at ``M``, which is moved on."""
    m = tl.load(M, mask=inside, other=0.0) * keep + fresh * g
    tl.store(M, m, mask=inside)
    u = m
    if NESTEROV:
        u = g + keep * m
    return u


@triton.jit
def settle(
    X, W, M, H, B0, B1, d, r, CARRY: tl.constexpr, DTYPE: tl.constexpr, R: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Let a frame be the orthonormal factor of what it has moved to, and carry its momentum there.

    Args:
        X: the frame.
        W: where it has moved to, in float32; it is overwritten.
        M: the momentum, made tangent if ``CARRY``.
        H: Gram matrix of ``W``.
        B0: scratch; and
        B1: likewise.
    """
    polish(W, H, B0, B1, d, r, R, BM, BK, BD)
    if CARRY:
        store_small(B1, symmetric_part(gram(W, M, d, r, R, BD)), R)
        add_times(M, W, B1, d, r, 1.0, -1.0, R, BM, BK)
    c = tl.arange(0, R)
    for k in range(0, d, BM):
        i = k + tl.arange(0, BM)
        at = i[:, None] * r + c[None, :]
        inside = (i[:, None] < d) & (c[None, :] < r)
        z = tl.load(W + at, mask=inside, other=0.0)
        tl.store(X + at, z.to(DTYPE), mask=inside)


@triton.jit
def step_frames(
    table, gradients, momentum, second, peak, work, scratch, counts, lr_ptr,
    lr, sign, w1, w2, eps, log1, log2, keep, fresh,
    RULE: tl.constexpr, ELEMENTWISE: tl.constexpr, AMSGRAD: tl.constexpr, MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr, SHORTEN: tl.constexpr, LR_TENSOR: tl.constexpr,
    DTYPE: tl.constexpr, R: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One step of each frame of a width.

    Args:
        table: for each frame its address, where it lies in the buffers, ``d``, ``r``, its row in
            ``gradients``, the number of its parameter, and where its second moment is.
        gradients: addresses of gradients.
        momentum: the momentum, laid out as the parameters.
        second: second moments, of entries or of frames.
        peak: the largest ones so far, of AMSGrad.
        work: memory laid out as the parameters, for directions and what is retracted.
        scratch: two ``R x R`` matrices for each frame.
        counts: how many steps each parameter has taken, with this one.
        lr_ptr: the rate, if it is on the device.
        lr: the rate, otherwise.
        sign: minus one to ascend.
        w1: weight of a gradient in the momentum; and
        w2: of its square in the second moment.
        eps: added to the root.
        log1: logarithm of the decay of the momentum; and
        log2: of the second moment.
        keep: decay of the momentum of SGD.
        fresh: weight of a gradient in it.
    """
    row = table + tl.program_id(0) * 7
    X, place, d, r, G = frame_of(row, gradients, DTYPE)
    moment = tl.load(row + 6)
    M = momentum + place
    W = work + place
    B0 = scratch + tl.program_id(0).to(tl.int64) * (2 * R * R)
    B1 = B0 + R * R
    c = tl.arange(0, R)
    factor, inverse = -lr, 1.0
    zero = 0.0
    if RULE == ADAM:
        factor, inverse = _rates(counts, tl.load(row + 5), lr_ptr, lr, log1, log2, LR_TENSOR)
        zero = tl.where(eps == 0.0, _TINY, 0.0)
    elif LR_TENSOR:
        factor = -tl.load(lr_ptr).to(tl.float32)
    # By every thread, long before one of them writes it.
    v = 0.0
    if RULE == ADAM and not ELEMENTWISE:
        v = tl.load(second + moment)

    # The tangent gradient, the moments, and the direction.
    store_small(B0, symmetric_part(gram(X, G, d, r, R, BD)), R)
    squares = tl.zeros((BM, R), tl.float32)
    lengths = tl.zeros((BM, R), tl.float32)
    for k in range(0, d, BM):
        i = k + tl.arange(0, BM)
        at = i[:, None] * r + c[None, :]
        inside = (i[:, None] < d) & (c[None, :] < r)
        g = tl.load(G + at, mask=inside, other=0.0).to(tl.float32)
        kk = tl.arange(0, BK)
        for n in range(0, r, BK):
            q = n + kk
            x = tl.load(
                X + i[:, None] * r + q[None, :],
                mask=(i[:, None] < d) & (q[None, :] < r),
                other=0.0,
            ).to(tl.float32)
            t = tl.load(B0 + q[:, None] * R + c[None, :], mask=q[:, None] < r, other=0.0)
            g = tl.dot(-x, t, g, input_precision="ieee")
        g = g * sign
        squares += g * g
        u = g
        if RULE == ADAM:
            m = tl.load(M + at, mask=inside, other=0.0)
            m = m + w1 * (g - m)
            tl.store(M + at, m, mask=inside)
            u = m
            if ELEMENTWISE:
                s = tl.load(second + moment + at, mask=inside, other=0.0)
                s, root = _second(
                    s, g * g, w2, peak, moment + at, inside, inverse, eps, AMSGRAD, zero
                )
                tl.store(second + moment + at, s, mask=inside)
                u = tl.where(inside, m / root, 0.0)
                if SHORTEN:
                    u = _cut(u)
        elif MOMENTUM:
            u = _with_momentum(M + at, inside, g, keep, fresh, NESTEROV)
        lengths += u * u
        tl.store(W + at, u, mask=inside)
    tl.debug_barrier()
    if ELEMENTWISE:
        store_small(B0, symmetric_part(gram(X, W, d, r, R, BD)), R)
        add_times(W, X, B0, d, r, 1.0, -1.0, R, BM, BK)
        lengths = tl.zeros((BM, R), tl.float32)
        for k in range(0, d, BM):
            i = k + tl.arange(0, BM)
            inside = (i[:, None] < d) & (c[None, :] < r)
            u = tl.load(W + i[:, None] * r + c[None, :], mask=inside, other=0.0)
            lengths += u * u
    elif RULE == ADAM:
        n2 = tl.sum(tl.sum(squares, 1), 0)
        new = _averaged(v, n2, w2)
        highest = new
        if AMSGRAD:
            highest = tl.maximum(tl.load(peak + moment), new)
        tl.debug_barrier()
        if AMSGRAD:
            tl.store(peak + moment, highest)
        tl.store(second + moment, new)
        factor = factor / tl.maximum(tl.sqrt(highest * inverse) + eps, zero)
    if SHORTEN:
        length = tl.sqrt(tl.sum(tl.sum(lengths, 1), 0))
        length = tl.minimum(length, _LARGEST) * tl.abs(factor)
        factor = factor * tl.minimum(1.0, _LONGEST / length)

    # The point, and the momentum carried to it.
    total = tl.zeros((R, R), tl.float32)
    rows = tl.arange(0, BD)
    for big in range(0, d, 8 * BD):
        acc = tl.zeros((R, R), tl.float32)
        for k in range(big, tl.minimum(big + 8 * BD, d), BD):
            i = k + rows
            at = i[:, None] * r + c[None, :]
            inside = (i[:, None] < d) & (c[None, :] < r)
            z = tl.load(X + at, mask=inside, other=0.0).to(tl.float32)
            z += (factor * tl.load(W + at, mask=inside, other=0.0)).to(tl.float32)
            tl.store(W + at, z, mask=inside)
            acc = tl.dot(tl.trans(z), z, acc, input_precision="ieee")
        total += acc
    tl.debug_barrier()
    CARRY: tl.constexpr = RULE == ADAM or MOMENTUM
    settle(X, W, M, total, B0, B1, d, r, CARRY, DTYPE, R, BM, BK, BD)


@triton.jit
def step_coordinates(
    table, gradients, momentum, second, peak, counts, lr_ptr,
    lr, sign, w1, w2, eps, log1, log2, keep, fresh, decay, apart,
    RULE: tl.constexpr, ELEMENTWISE: tl.constexpr, AMSGRAD: tl.constexpr, MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr, SHORTEN: tl.constexpr, LR_TENSOR: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One step of all coordinates that are no frames: that of Adam or SGD.

    Args:
        table: for each run of them its address, where it lies in the buffers, its length, its row
            in ``gradients``, the number of its parameter, and where its second moments are.
        decay: weight of the penalty in the gradient; and
        apart: the same outside of the moments.
        gradients: as of :func:`step_frames`, and so are the others.
    """
    row = table + tl.program_id(0) * 6
    X = address(row, 0, DTYPE)
    M = momentum + tl.load(row + 1)
    size = tl.load(row + 2).to(tl.int32)
    G = address(gradients, tl.load(row + 3), DTYPE)
    moment = tl.load(row + 5)
    rate = lr
    if LR_TENSOR:
        rate = tl.load(lr_ptr).to(tl.float32)
    factor, inverse, zero = -rate, 1.0, 0.0
    if RULE == ADAM:
        factor, inverse = _rates(counts, tl.load(row + 4), lr_ptr, lr, log1, log2, LR_TENSOR)
        zero = tl.where(eps == 0.0, _TINY, 0.0)
    for k in range(0, size, BLOCK):
        at = k + tl.arange(0, BLOCK)
        inside = at < size
        x = tl.load(X + at, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(G + at, mask=inside, other=0.0).to(tl.float32) * sign + decay * x
        u = g
        if RULE == ADAM:
            m = tl.load(M + at, mask=inside, other=0.0)
            m = m + w1 * (g - m)
            tl.store(M + at, m, mask=inside)
            v = tl.load(second + moment + at, mask=inside, other=0.0)
            v, root = _second(v, g * g, w2, peak, moment + at, inside, inverse, eps, AMSGRAD, zero)
            tl.store(second + moment + at, v, mask=inside)
            if ELEMENTWISE:
                u = m / root
                if SHORTEN:
                    u = _cut(u)
                u = factor * u
            else:
                u = m * (factor / root)
        elif MOMENTUM:
            u = _with_momentum(M + at, inside, g, keep, fresh, NESTEROV)
        if RULE != ADAM:
            u = factor * u
        x = x - rate * apart * x + u
        tl.store(X + at, x.to(DTYPE), mask=inside)
