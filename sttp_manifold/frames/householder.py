r"""Full and reduced Householder charts of frames in compact WY form, and their inverses.

A product of ``r`` Householder reflectors with vectors ``Y = [y_1, ..., y_r]`` is
:math:`H_1 \cdots H_r = I - Y T Y^\top` with
:math:`T^{-1} = \operatorname{striu}(G) + \tfrac12 \operatorname{diag}(G)`, :math:`G = Y^\top Y`
(Joffrain, Low, Quintana-Ortí, van de Geijn & Van Zee 2006). Its first ``r`` columns are the frame
:math:`Q = E - Y T Y_{top}^\top`. No loop over reflectors, one triangular solve, any batch shape,
differentiable any number of times (``_wy_form`` has the derivative).

- The *full* chart of the Stiefel manifold ``St(d, r)``: ``Y`` unit lower trapezoidal,
  ``d r - r (r + 1) / 2`` parameters.
- The *reduced* chart of the Grassmannian: ``Y = [I; B]``, ``r (d - r)`` parameters, used where
  the rotation of the frame is a gauge. It is ``2^r``-to-one onto an open dense set: locally, not
  globally, one-to-one.

Both send zero to ``-E``, minus the truncated identity ([STTP] Sec. 3.2).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from sttp_manifold._arguments import explained
from sttp_manifold.errors import ShapeError
from sttp_manifold.frames._householder_autograd import full, reduced
from sttp_manifold.frames._wy_form import FullChart, ReducedChart, strictly_lower
from sttp_manifold.tt.precision import is_half

__all__ = [
    "full_frame",
    "full_reflectors",
    "full_size",
    "reduced_frame",
    "reduced_reflectors",
    "reduced_size",
]


@explained
def full_size(d: int, r: int) -> int:
    """Parameters of the full chart, ``d r - r (r + 1) / 2``."""
    return FullChart.size(d, r)


@explained
def reduced_size(d: int, r: int) -> int:
    """Parameters of the reduced chart, ``r (d - r)``."""
    return ReducedChart.size(d, r)


@explained
def full_frame(
    parameters: Float[Tensor, "*b size"], d: int, r: int, *, transposed: bool = False
) -> Float[Tensor, "*b rows columns"]:
    r"""Frame of the full chart: a product of ``r`` reflectors, ``Q = E - Y T Y_top^T``.

    Every leading dimension is batch; half precision is computed in float32. Derivatives of any
    order and in any mode are right: the first one is written out by hand, and compilers,
    transforms of ``torch.func`` and forward mode see plain operations. The memory layout of the
    output is not fixed: without gradient LAPACK is called where it is faster.

    Args:
        parameters: the strictly lower part of ``Y``: first that of its top ``r x r`` block, row by
            row, then the ``(d - r) x r`` rest, row by row.
        d: rows of the frame.
        r: columns, ``r <= d``.
        transposed: return ``Q^T``, which costs no more.

    Shape:
        - parameters: ``(*b, d r - r (r + 1) / 2)``
        - output: ``(*b, d, r)``, columns orthonormal to rounding; ``(*b, r, d)`` if ``transposed``

    Raises:
        ShapeError: ``r > d``, or a wrong number of parameters.
        FrameOverflowError: the squared norm of a reflector overflows (entries of 1e19 in float32).
            Raised on the CPU; on another device, where looking at a value would wait for it, and
            under ``torch.compile`` or a transform, that frame is NaN instead.

    Example:
        >>> Q = full_frame(torch.randn(7, dtype=torch.float64), 5, 2)
        >>> bool(torch.allclose(Q.mT @ Q, torch.eye(2, dtype=torch.float64)))
        True
    """
    return _batched(full, parameters, full_size(d, r), d, r, transposed)


@explained
def reduced_frame(
    parameters: Float[Tensor, "*b size"], d: int, r: int, *, transposed: bool = False
) -> Float[Tensor, "*b rows columns"]:
    r"""Frame of the reduced chart, ``Q = [I - T; -B T]``; the constant ``-I`` if ``d = r``.

    Batches, derivatives and memory layout as in :func:`full_frame`.

    Args:
        parameters: ``B``, row by row.
        d: rows of the frame.
        r: columns, ``r <= d``.
        transposed: return ``Q^T``, which costs no more.

    Shape:
        - parameters: ``(*b, r (d - r))``
        - output: ``(*b, d, r)``, columns orthonormal to rounding; the top block is upper
          triangular with diagonal in ``[-1, 1)``; ``(*b, r, d)`` if ``transposed``

    Raises:
        ShapeError: ``r > d``, or a wrong number of parameters.
        FrameOverflowError: as in :func:`full_frame`.
    """
    return _batched(reduced, parameters, reduced_size(d, r), d, r, transposed)


def _batched(
    chart: Callable[[Tensor, int, int, bool], Tensor],
    parameters: Tensor,
    size: int,
    d: int,
    r: int,
    transposed: bool,
) -> Tensor:
    """Call a chart of stacks with one batch dimension on parameters with any number of them."""
    if not 1 <= r <= d or parameters.shape[-1:] != (size,):
        raise ShapeError(
            f"{chart.__name__}_frame(parameters, d={d}, r={r}) takes 1 <= r <= d and parameters of "
            f"shape (*b, {chart.__name__}_size(d, r)), got shape {tuple(parameters.shape)}"
            + (f" instead of (*b, {size})" if 1 <= r <= d else "")
        )
    if is_half(parameters.dtype):  # LAPACK has no reflectors of half precision
        frames = _batched(chart, parameters.float(), size, d, r, transposed)
        return frames.to(parameters.dtype)
    if parameters.ndim == 1:
        return chart(parameters.unsqueeze(0), d, r, transposed)[0]
    if parameters.ndim == 2:
        return chart(parameters, d, r, transposed)
    batch = parameters.shape[:-1]
    frames = chart(parameters.reshape(math.prod(batch), size), d, r, transposed)
    return frames.view(*batch, *frames.shape[1:])


def _check_frame(Q: Tensor) -> None:
    if Q.ndim < 2 or not 1 <= Q.shape[-1] <= Q.shape[-2]:
        raise ShapeError(f"a frame is (*b, d, r) with 1 <= r <= d, got {tuple(Q.shape)}")


@explained
def full_reflectors(
    Q: Float[Tensor, "*b d r"],
) -> tuple[Float[Tensor, "*b size"], Float[Tensor, "*b r"]]:
    r"""Inverse of the full chart up to the sign of each column.

    ``E - Q S = Y (T Y_top^T)`` is an LU factorization without pivoting, so ``Y`` is read off by
    elimination; the sign ``s_i`` is chosen on the way so that the pivot is ``1 + |q_i| >= 1``
    (Ballard, Demmel, Grigori, Jacquelin, Nguyen & Solomonik 2014). Hence every reflector has
    ``|y_i| <= sqrt 2``: the inverse is well conditioned everywhere.

    Shape:
        - Q: ``(*b, d, r)`` with orthonormal columns
        - parameters: ``(*b, d r - r (r + 1) / 2)``
        - signs: ``(*b, r)``, plus or minus one

    Returns:
        ``(parameters, signs)`` with ``Q * signs == full_frame(parameters, d, r)``.

    Raises:
        ShapeError: more columns than rows.
    """
    _check_frame(Q)
    if is_half(Q.dtype):
        parameters, column_signs = full_reflectors(Q.float())
        return parameters.to(Q.dtype), column_signs.to(Q.dtype)
    d, r = Q.shape[-2:]
    rest, columns, signs = Q, [], []
    for _ in range(r):
        pivot = rest[..., :1, :1]
        sign = torch.where(pivot > 0, -1.0, 1.0).to(Q.dtype)
        reflector = -sign * rest[..., 1:, :1] / (1 + pivot.abs())
        rest = rest[..., 1:, 1:] - reflector @ rest[..., :1, 1:]
        columns.append(reflector)
        signs.append(sign[..., 0])
    return _parameters(columns, d, r), torch.cat(signs, -1)


def _parameters(columns: list[Tensor], d: int, r: int) -> Tensor:
    """Parameters of the full chart, of the columns of ``Y`` below its diagonal."""
    Y = torch.cat([torch.nn.functional.pad(c, (0, 0, d - c.shape[-2], 0)) for c in columns], dim=-1)
    top = Y[..., :r, :].flatten(-2).index_select(-1, strictly_lower(r, Y))
    return torch.cat((top, Y[..., r:, :].flatten(-2)), -1)


def unsigned_reflectors(Q: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse of the full chart where it has one without signs: no pivot ``1 - q_i`` is zero.

    The elimination of :func:`full_reflectors` without its choice, so badly conditioned next to a
    zero pivot.

    Shape:
        - Q: ``(*b, d, r)`` with orthonormal columns
        - parameters: ``(*b, d r - r (r + 1) / 2)``
        - pivots: ``(*b, r)``

    Returns:
        ``(parameters, pivots)`` with ``Q == full_frame(parameters, d, r)``.
    """
    d, r = Q.shape[-2:]
    rest, columns, pivots = Q, [], []
    for _ in range(r):
        pivot = 1 - rest[..., :1, :1]
        reflector = -rest[..., 1:, :1] / pivot
        rest = rest[..., 1:, 1:] - reflector @ rest[..., :1, 1:]
        columns.append(reflector)
        pivots.append(pivot[..., 0])
    return _parameters(columns, d, r), torch.cat(pivots, -1)


@explained
def reduced_reflectors(
    Q: Float[Tensor, "*b d r"],
) -> tuple[Float[Tensor, "*b size"], Float[Tensor, "*b r r"]]:
    r"""Inverse of the reduced chart up to a rotation of the columns.

    The frame is first rotated by ``O`` so that its top block is upper triangular with a
    non-positive diagonal (an RQ factorization); then ``T = I - top`` and
    ``B = -bottom T^{-1}``, with ``1 <= T_ii`` and hence ``|y_i| <= sqrt 2``. Dropping the top
    block without this rotation gives a wrong subspace.

    Shape:
        - Q: ``(*b, d, r)`` with orthonormal columns
        - parameters: ``(*b, r (d - r))``
        - O: ``(*b, r, r)``, orthogonal

    Returns:
        ``(parameters, O)`` with ``Q @ O == reduced_frame(parameters, d, r)``.

    Raises:
        ShapeError: more columns than rows.
    """
    _check_frame(Q)
    if is_half(Q.dtype):
        parameters, rotation = reduced_reflectors(Q.float())
        return parameters.to(Q.dtype), rotation.to(Q.dtype)
    r = Q.shape[-1]
    # RQ by QR: with J the reversal, (J A)^T = Q1 R1 gives A (Q1 J) = J R1^T J, upper triangular.
    rotation, _ = torch.linalg.qr(Q[..., :r, :].flip(-2).mT)
    rotation = rotation.flip(-1)
    top = (Q[..., :r, :] @ rotation).triu()
    signs = torch.where(top.diagonal(dim1=-2, dim2=-1) > 0, -1.0, 1.0).to(Q.dtype)
    rotation, top = rotation * signs.unsqueeze(-2), top * signs.unsqueeze(-2)
    T = torch.eye(r, dtype=Q.dtype, device=Q.device) - top
    bottom = Q[..., r:, :] @ rotation
    B = torch.linalg.solve_triangular(T, -bottom, upper=True, left=False)
    return B.flatten(-2), rotation
