r"""Full and reduced Householder charts of frames in compact WY form, and their inverses.

A product of ``r`` Householder reflectors with vectors ``Y = [y_1, ..., y_r]`` is
:math:`H_1 \cdots H_r = I - Y T Y^\top` with
:math:`T^{-1} = \operatorname{striu}(G) + \tfrac12 \operatorname{diag}(G)`, :math:`G = Y^\top Y`
(Joffrain, Low, Quintana-Ortí, van de Geijn & Van Zee 2006). Its first ``r`` columns are the frame
:math:`Q = E - Y T Y_{top}^\top`. No loop over reflectors, one triangular solve, any batch shape,
differentiable any number of times.

- The *full* chart of the Stiefel manifold ``St(d, r)``: ``Y`` unit lower trapezoidal,
  ``d r - r (r + 1) / 2`` parameters.
- The *reduced* chart of the Grassmannian: ``Y = [I; B]``, ``r (d - r)`` parameters, used where
  the rotation of the frame is a gauge. It is ``2^r``-to-one onto an open dense set: locally, not
  globally, one-to-one.

Both send zero to ``-E``, minus the truncated identity ([STTP] Sec. 3.2).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = [
    "full_frame",
    "full_reflectors",
    "full_size",
    "reduced_frame",
    "reduced_reflectors",
    "reduced_size",
]


def full_size(d: int, r: int) -> int:
    """Parameters of the full chart, ``d r - r (r + 1) / 2``."""
    return d * r - r * (r + 1) // 2


def reduced_size(d: int, r: int) -> int:
    """Parameters of the reduced chart, ``r (d - r)``."""
    return r * (d - r)


@lru_cache(maxsize=1024)
def _strictly_lower(r: int, device: torch.device) -> Tensor:
    """Flat positions of the strictly lower triangle of an ``r x r`` matrix, row by row."""
    rows, columns = torch.tril_indices(r, r, -1, device=device)
    return rows * r + columns


def _half_gram(Y: Tensor) -> Tensor:
    """``T^{-1}``, the upper triangle of ``Y^T Y`` with halved diagonal."""
    gram = Y.mT @ Y
    return gram.triu(1) + torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1) / 2)


def full_frame(parameters: Float[Tensor, "*b size"], d: int, r: int) -> Float[Tensor, "*b {d} {r}"]:
    r"""Frame of the full chart: a product of ``r`` reflectors, ``Q = E - Y T Y_top^T``.

    Args:
        parameters: the strictly lower part of ``Y``: first that of its top ``r x r`` block, row by
            row, then the ``(d - r) x r`` rest, row by row.
        d: rows of the frame.
        r: columns, ``r <= d``.

    Shape:
        - parameters: ``(*b, d r - r (r + 1) / 2)``
        - output: ``(*b, d, r)``, columns orthonormal to rounding

    Example:
        >>> Q = full_frame(torch.randn(7, dtype=torch.float64), 5, 2)
        >>> bool(torch.allclose(Q.mT @ Q, torch.eye(2, dtype=torch.float64)))
        True
    """
    split = r * (r - 1) // 2
    batch = parameters.shape[:-1]
    top = parameters.new_zeros(*batch, r * r)
    positions = _strictly_lower(r, parameters.device)
    top = top.index_copy(-1, positions, parameters[..., :split]).unflatten(-1, (r, r))
    eye = torch.eye(r, dtype=parameters.dtype, device=parameters.device)
    top = top + eye
    bottom = parameters[..., split:].unflatten(-1, (d - r, r))
    Y = torch.cat((top, bottom), -2)
    product = Y @ torch.linalg.solve_triangular(_half_gram(Y), top.mT, upper=True)
    return torch.cat((eye - product[..., :r, :], -product[..., r:, :]), -2)


def reduced_frame(
    parameters: Float[Tensor, "*b size"], d: int, r: int
) -> Float[Tensor, "*b {d} {r}"]:
    r"""Frame of the reduced chart, ``Q = [I - T; -B T]``; the constant ``-I`` if ``d = r``.

    Args:
        parameters: ``B``, row by row.
        d: rows of the frame.
        r: columns, ``r <= d``.

    Shape:
        - parameters: ``(*b, r (d - r))``
        - output: ``(*b, d, r)``, columns orthonormal to rounding; the top block is upper
          triangular with diagonal in ``[-1, 1)``
    """
    B = parameters.unflatten(-1, (d - r, r))
    eye = torch.eye(r, dtype=parameters.dtype, device=parameters.device)
    gram = B.mT @ B
    half = gram.triu(1) + torch.diag_embed((gram.diagonal(dim1=-2, dim2=-1) + 1) / 2)
    T = torch.linalg.solve_triangular(half, eye.expand_as(half), upper=True)
    return torch.cat((eye - T, -(B @ T)), -2)


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
    """
    d, r = Q.shape[-2:]
    rest, columns, signs = Q, [], []
    for _ in range(r):
        pivot = rest[..., :1, :1]
        sign = torch.where(pivot > 0, -1.0, 1.0).to(Q.dtype)
        reflector = -sign * rest[..., 1:, :1] / (1 + pivot.abs())
        rest = rest[..., 1:, 1:] - reflector @ rest[..., :1, 1:]
        columns.append(reflector)
        signs.append(sign[..., 0])
    Y = torch.cat([torch.nn.functional.pad(c, (0, 0, d - c.shape[-2], 0)) for c in columns], dim=-1)
    top = Y[..., :r, :].flatten(-2).index_select(-1, _strictly_lower(r, Q.device))
    return torch.cat((top, Y[..., r:, :].flatten(-2)), -1), torch.cat(signs, -1)


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
    """
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
