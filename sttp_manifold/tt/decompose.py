"""From matrices and loose cores to `SpectralTT`: TT-SVD, truncation, orthogonalization."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from sttp_manifold._arguments import explained
from sttp_manifold.errors import RankError, ShapeError
from sttp_manifold.tt.contract import left_matrix, mirror, right_matrix, times_bond
from sttp_manifold.tt.factors import positive_integer
from sttp_manifold.tt.leading import leading_svd
from sttp_manifold.tt.precision import is_half
from sttp_manifold.tt.ranks import clip_ranks
from sttp_manifold.tt.shape import TTShape
from sttp_manifold.tt.spectral import SpectralTT
from sttp_manifold.tt.validate import check_chain, check_finite, check_kinds

__all__ = ["orthogonalize", "qr_sweep", "truncate", "tt_svd"]


@explained
def tt_svd(W: Tensor, shape: TTShape) -> SpectralTT:
    r"""Quasi-optimal spectral tensor train of a matrix, by truncated SVDs.

    The centre bond is truncated first, then the bonds of either side from the outside inwards.
    Every step is an orthogonal projection whose error is at most that of the best approximation
    at its bond, so that the error is at most :math:`1 + \sqrt{D+E-2}` times the best one (proof in
    docs/math/spectral-form.md, after Oseledets 2011, who truncates from one end to the other and
    has :math:`\sqrt{D+E-1}`), and zero to rounding if the ranks of ``W`` allow it. Where the
    smaller side is over 1024 and the rank at most a quarter of it, the SVD at the centre is by
    subspace iteration, with a squared error within about ``1e-3`` of the best one. :func:`tt_fit`
    starts here and comes closer, in the metric of inputs if there are some.

    Args:
        W: the matrix, or a batch of them, in float32 or float64.
        shape: the plan; ranks are taken from it.

    Shape:
        - W: ``(*b, d_out, d_in)``
        - result: cores of ``shape.merged`` with batch dimensions ``b``; the spectrum is
          non-negative and descending

    Raises:
        ShapeError: a matrix of another size, a dtype other than float32 and float64, or entries
            that are not finite.

    Example:
        >>> W = torch.randn(24, 30, dtype=torch.float64)
        >>> tt = tt_svd(W, TTShape(out_modes=(3, 4, 2), in_modes=(2, 5, 3), rank=4))
        >>> tt.singular_values().shape
        torch.Size([4])
    """
    if W.ndim < 2 or tuple(W.shape[-2:]) != (shape.d_out, shape.d_in):
        raise ShapeError(
            f"tt_svd of {shape!r} takes a matrix (*b, {shape.d_out}, {shape.d_in}), got "
            f"{tuple(W.shape)}; a convolution kernel goes in as kernel.flatten(1)"
        )
    if W.dtype not in (torch.float32, torch.float64):
        raise ShapeError(
            f"tt_svd needs float32 or float64, got {W.dtype}; call tt_svd(W.float(), shape)"
        )
    check_finite([W], "W")
    return _from_svd(*leading_svd(W, shape.rank), shape)


@explained
def truncate(
    tt: SpectralTT, rank: int | None = None, *, ranks: Iterable[int] | None = None
) -> SpectralTT:
    r"""Lower the ranks of a spectral tensor train, quasi-optimally.

    As :func:`tt_svd` of ``tt.to_matrix()``, with its bound on the error, without ever forming the
    matrix. Half precision is computed in float32.

    Args:
        tt: the value, on the modes of ``tt.shape``.
        rank: one rank for all bonds, lowered where needed; or
        ranks: all ranks, none above that of ``tt``.

    Raises:
        RankError: a rank above the one that ``tt`` has.
        ShapeError: neither or both of ``rank`` and ``ranks``, or a value that is no weight or
            not finite.
    """
    if is_half(tt.dtype):
        return truncate(tt.to(torch.float32), rank, ranks=ranks).to(tt.dtype)
    check_finite([*tt.left, tt.spectrum, *tt.right], "this weight")
    old = tt.shape
    if ranks is None and rank is not None:
        rank = positive_integer(rank, "rank")
        ranks = clip_ranks(old.out_modes + old.in_modes, [min(rank, r) for r in old.ranks])
        new = TTShape(old.out_modes, old.in_modes, ranks=ranks)
    else:
        new = TTShape(old.out_modes, old.in_modes, rank, ranks=ranks)
    for bond, (above, below) in enumerate(zip(new.ranks, old.ranks, strict=True)):
        if above > below:
            raise RankError(
                f"truncate lowers ranks, but rank {above} at bond {bond} is above {below}, the "
                f"rank of {old!r}",
                bond=bond,
                rank=above,
                bound=below,
            )
    u, v = tt.frames()
    if tt.is_full:
        a, s, bt = torch.linalg.svd(tt.spectrum)
        u, vt = u @ a, bt @ v.mT
    else:
        s, order = tt.spectrum.abs().sort(dim=-1, descending=True)
        signs = torch.where(tt.spectrum < 0, -1.0, 1.0).to(tt.dtype)
        u = (u * signs.unsqueeze(-2)).take_along_dim(order.unsqueeze(-2), -1)
        vt = v.take_along_dim(order.unsqueeze(-2), -1).mT
    r = new.rank
    return _from_svd(u[..., :r], s[..., :r], vt[..., :r, :], new)


@explained
def orthogonalize(
    left: Sequence[Tensor], bond: Tensor | None, right: Sequence[Tensor]
) -> SpectralTT:
    r"""Spectral form of a product of any cores, orthonormal or not.

    QR sweeps from both ends, then an SVD at the centre; the product is unchanged to rounding.
    Ranks that the modes cannot carry are lowered, which loses nothing. Half precision is computed
    in float32.

    Args:
        left: cores ``(*b, R_{k-1}, n_k, R_k)``, outermost first.
        bond: matrix or spectrum at the centre, or None for the identity.
        right: cores ``(*b, R_{k-1}, m_k, R_k)``, from the centre outwards.

    Shape:
        - left: each ``(*b, R_{k-1}, n_k, R_k)``
        - bond: ``(*b, R, R')`` or ``(*b, R)``, between the last left rank and the first right one
        - right: each ``(*b, R_{k-1}, m_k, R_k)``

    Raises:
        ShapeError: cores that do not chain, a bond that does not fit between them, mixed dtypes,
            or numbers that are not finite.

    Example:
        >>> cores = [torch.randn(1, 3, 2), torch.randn(2, 4, 3)]
        >>> tt = orthogonalize(cores, None, [torch.randn(3, 5, 1)])
        >>> bool(tt.orthonormality_error() < 1e-5)
        True
    """
    left, right = tuple(left), tuple(right)
    _check_product(left, bond, right)
    if is_half(left[0].dtype):
        wide = None if bond is None else bond.float()
        single = orthogonalize([c.float() for c in left], wide, [c.float() for c in right])
        return single.to(left[0].dtype)
    left_q, left_r = qr_sweep(left)
    right_q, right_r = qr_sweep(mirror(right))
    if bond is not None:
        left_r = times_bond(left_r, bond, left_r.ndim - 2)
    centre = left_r @ right_r.mT
    check_finite([centre], "the product of these cores")
    a, s, bt = torch.linalg.svd(centre, full_matrices=False)
    left_q[-1] = left_q[-1] @ a.unsqueeze(-3)
    right_q[-1] = right_q[-1] @ bt.mT.unsqueeze(-3)
    inner = mirror(right_q)
    modes = [core.shape[-2] for core in (*left_q, *inner)]
    ranks = (1, *(core.shape[-1] for core in (*left_q, *inner)))
    if clip_ranks(modes, ranks) == ranks:
        return SpectralTT(tuple(left_q), s, inner)
    shape = TTShape(modes[: len(left)], modes[len(left) :], ranks=clip_ranks(modes, ranks))
    r = shape.rank
    u, vt = left_matrix(left_q), right_matrix(inner)
    return _from_svd(u[..., :r], s[..., :r], vt[..., :r, :], shape)


def _check_product(
    left: tuple[Tensor, ...], bond: Tensor | None, right: tuple[Tensor, ...]
) -> None:
    batch = check_chain(left, right)
    first, last, rows, columns = (
        left[0].shape[-3], right[-1].shape[-1], left[-1].shape[-1], right[0].shape[-3],
    )  # fmt: skip
    if (first, last) != (1, 1):
        raise ShapeError(f"the outer ranks are 1, got {first} and {last}")
    wanted = {(*batch, rows, columns)} | ({(*batch, rows)} if rows == columns else set())
    if bond is None:
        if rows != columns:
            raise ShapeError(f"the sides disagree at the centre: ranks {rows} and {columns}")
        return
    if tuple(bond.shape) not in wanted:
        raise ShapeError(
            f"a bond between ranks {rows} and {columns} is {' or '.join(map(str, sorted(wanted)))}"
            f" or None, got {tuple(bond.shape)}"
        )
    check_kinds((*left, bond, *right), "cores and bond")


def _from_svd(u: Tensor, s: Tensor, vt: Tensor, shape: TTShape) -> SpectralTT:
    """Compress the factors of a truncated SVD into trains, never leaving the low-rank form."""
    plan, batch = shape.merged, u.shape[:-2]
    left, left_rest = _svd_sweep(u * s.unsqueeze(-2), plan.out_modes, plan.ranks)
    # The right factor, with the order of its modes reversed, is a left factor.
    sides = range(len(batch) + len(plan.in_modes), len(batch), -1)
    tensor = (left_rest @ vt).reshape(*batch, plan.rank, *plan.in_modes)
    tensor = tensor.permute(*range(len(batch)), *sides, len(batch))
    mirrored, right_rest = _svd_sweep(
        tensor.reshape(*batch, plan.d_in, plan.rank), plan.in_modes[::-1], plan.ranks[::-1]
    )
    a, s, bt = torch.linalg.svd(right_rest.mT)
    left[-1] = left[-1] @ a.unsqueeze(-3)
    mirrored[-1] = mirrored[-1] @ bt.mT.unsqueeze(-3)
    return SpectralTT(tuple(left), s, mirror(mirrored), shape)


def _svd_sweep(
    matrix: Tensor, modes: Sequence[int], ranks: Sequence[int]
) -> tuple[list[Tensor], Tensor]:
    """Orthonormal cores of the rows of ``(*b, d, c)``, truncated to ``ranks``, and what is left."""
    batch, cores = matrix.shape[:-2], []
    rest = matrix
    for k, mode in enumerate(modes):
        rows = ranks[k] * mode
        unfolded = rest.reshape(*batch, rows, rest.shape[-2] * rest.shape[-1] // rows)
        if k < len(modes) - 1:
            q, s, vt = torch.linalg.svd(unfolded, full_matrices=False)
            rank = ranks[k + 1]
            q, rest = q[..., :rank], s[..., :rank, None] * vt[..., :rank, :]
        else:
            q, rest = torch.linalg.qr(unfolded)
        cores.append(q.reshape(*batch, ranks[k], mode, q.shape[-1]))
    return cores, rest


def qr_sweep(cores: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Orthonormal left cores with the same product up to a triangular factor at the inner end."""
    swept = []
    rest = torch.eye(1, dtype=cores[0].dtype, device=cores[0].device)
    for core in cores:
        pushed = rest @ core.flatten(-2)
        rows = pushed.unflatten(-1, core.shape[-2:])
        q, rest = torch.linalg.qr(rows.flatten(-3, -2))
        swept.append(q.unflatten(-2, rows.shape[-3:-1]))
    return swept, rest
