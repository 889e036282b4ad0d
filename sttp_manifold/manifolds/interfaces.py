r"""One side of a train that is centred at its bond, and what the geometry needs of it.

With the right side written like the left one (outermost core first, see
:func:`~sttp_manifold.tt.contract.mirror`), a weight :math:`W = U S V^\top` looks the same from both
ends, and everything here is said once, for a half with cores :math:`U_1, \dots, U_D` and the bond
``S`` (for the other half ``S^T``).

*Interfaces*: :math:`W = U_{\le k}\, G_k\, Q_{k+1} \cdots Q_D V^\top` with orthonormal rows to the
right of :math:`G_k`; :math:`G_D = S`, and :math:`[U_{k+1} G_{k+1}] = G_k Q_{k+1}` is an LQ
factorization of a right unfolding. The matrix :math:`G_k` has the singular values of the
unfolding of ``W`` at bond ``k``.

*Tangent vectors* are gauged, :math:`U_k^\top \delta_k = 0` in left unfoldings, and stand for
:math:`\sum_k U_{<k}\, \delta_k\, Q_{>k} V^\top`: the velocity of the core itself is
:math:`\delta_k G_k^{-1}`. The terms are orthogonal to each other and the map from
:math:`\delta_k` to its term is an isometry (Holtz, Rohwedder & Schneider 2012, Sec. 3.3;
Steinlechner 2016, Sec. 3.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sttp_manifold.errors import ManifoldError
from sttp_manifold.tt.contract import environments, left_frame
from sttp_manifold.tt.decompose import qr_sweep

__all__ = ["Half", "derivative_cores", "gauged", "round_outwards", "tangent_cores"]

# Elements of an outer product that are held at a time.
_CHUNK = 2**24


def gauged(core: Tensor, vector: Tensor) -> Tensor:
    """Part of a vector that is orthogonal to the columns of a core: ``(I - U U^T) d``.

    Shape:
        - core, vector, output: ``(*b, R, n, R')``
    """
    frame, direction = left_frame(core), left_frame(vector)
    rest = direction - frame @ (frame.mT @ direction)
    return rest.unflatten(-2, core.shape[-3:-1])


@dataclass(frozen=True)
class Half:
    """Left-orthonormal cores and the bond behind them.

    Args:
        cores: ``U_1, ..., U_D``.
        bond: the centre as this half sees it.
        damping: relative size below which singular values of an interface are not divided by.

    Shape:
        - cores: ``(*b, R_{k-1}, n_k, R_k)``
        - bond: ``(*b, r, r)``
    """

    cores: tuple[Tensor, ...]
    bond: Tensor
    damping: float = 0.0

    @cached_property
    def _interfaces(self) -> tuple[list[Tensor], list[Tensor]]:
        gauge, gauges, facing = self.bond, [self.bond], []
        for core in reversed(self.cores[1:]):
            unfolding = (core @ gauge.unsqueeze(-3)).flatten(-2)
            q, triangle = torch.linalg.qr(unfolding.mT)
            gauge = triangle.mT
            gauges.append(gauge)
            facing.append(q.mT.unflatten(-1, (core.shape[-2], -1)))
        return gauges[::-1], facing[::-1]

    @property
    def gauges(self) -> list[Tensor]:
        """``G_1, ..., G_D``."""
        return self._interfaces[0]

    @property
    def facing(self) -> list[Tensor]:
        """``Q_2, ..., Q_D``, cores whose right unfoldings have orthonormal rows."""
        return self._interfaces[1]

    # -- velocities -----------------------------------------------------------------------------

    def velocities(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """Velocities ``d_k G_k^{-1}`` of the cores along a tangent vector."""
        return [self._divide(d, k, False) for k, d in enumerate(vectors)]

    def tangent_of_velocities(self, velocities: Sequence[Tensor]) -> list[Tensor]:
        """Tangent coordinates ``Pi_k(v_k G_k)`` of velocities: inverse of :meth:`velocities`."""
        return [
            gauged(core, v @ g.unsqueeze(-3))
            for core, v, g in zip(self.cores, velocities, self.gauges, strict=True)
        ]

    def gradient(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Riemannian gradient ``Pi_k(g_k G_k^{-T})`` of gradients in the entries of the cores."""
        return [
            gauged(core, self._divide(g, k, True))
            for k, (core, g) in enumerate(zip(self.cores, gradients, strict=True))
        ]

    def _divide(self, array: Tensor, k: int, transposed: bool) -> Tensor:
        """``array G_k^{-1}``, or by its transpose; damped if asked for."""
        gauge = self.gauges[k]
        rows = left_frame(array)
        if self.damping:
            # X G^{-1} = X G^T (G G^T)^{-1}, and G G^T is made no smaller than the damping.
            gauge = gauge.mT if transposed else gauge
            scale = torch.linalg.matrix_norm(gauge).square()[..., None, None]
            eye = torch.eye(gauge.shape[-1], dtype=gauge.dtype, device=gauge.device)
            gram = gauge @ gauge.mT + self.damping**2 * scale * eye
            quotient = torch.linalg.solve(gram, rows @ gauge.mT, left=False)
        elif k + 1 < len(self.cores):
            # Lower triangular by construction.
            gauge = gauge.mT if transposed else gauge
            quotient = torch.linalg.solve_triangular(gauge, rows, upper=transposed, left=False)
        else:
            try:
                gauge = gauge.mT if transposed else gauge
                quotient = torch.linalg.solve(gauge, rows, left=False)
            except torch.linalg.LinAlgError as error:
                raise ManifoldError(
                    "the bond of this point is singular, so that it lies on no manifold of this "
                    "rank; lower the rank by truncate(tt, rank=...), or pass "
                    "FixedTTRankManifold(shape, damping=1e-8)"
                ) from error
        result: Tensor = quotient.unflatten(-2, array.shape[-3:-1])
        return result

    # -- projections ----------------------------------------------------------------------------

    def project_rows(self, rows: Tensor) -> list[Tensor]:
        """Coordinates of the projection of ``A = Z V``, given densely.

        Shape:
            - rows: ``(*b, d, r)``
        """
        batch = rows.shape[:-2]
        tails = [torch.eye(rows.shape[-1], dtype=rows.dtype, device=rows.device)]
        for core in reversed(self.facing):
            tail = core.flatten(-3, -2) @ tails[-1]
            tails.append(tail.reshape(*tail.shape[:-2], core.shape[-3], -1))
        rest, vectors = rows.unsqueeze(-3), []
        for core, tail in zip(self.cores, reversed(tails), strict=True):
            a, n = core.shape[-3:-1]
            rest = rest.reshape(*batch, a * n, rest.shape[-2] * rest.shape[-1] // (a * n))
            vectors.append(gauged(core, (rest @ tail.mT).unflatten(-2, (a, n))))
            rest = left_frame(core).mT @ rest
        return vectors

    def project_chain(self, cores: Sequence[Tensor], end: Tensor) -> list[Tensor]:
        """Coordinates of the projection of a low-rank ``Z`` with ``Z V = L_1 ... L_D end``.

        Shape:
            - cores: ``(*b, P_{k-1}, n_k, P_k)``, of any ranks
            - end: ``(*b, P_D, r)``
        """
        before = environments(self.cores, cores)
        after, vectors = end, []
        for k in range(len(cores) - 1, -1, -1):
            pushed = cores[k] @ after.unsqueeze(-3)
            product = (before[k] @ pushed.flatten(-2)).unflatten(-1, pushed.shape[-2:])
            vectors.append(gauged(self.cores[k], product))
            if k:
                after = pushed.flatten(-2) @ self.facing[k - 1].flatten(-2).mT
        return vectors[::-1]

    def project_entries(
        self, digits: Sequence[Tensor], values: Tensor, rows: Tensor
    ) -> list[Tensor]:
        """Coordinates of the projection of ``Z V = sum_p values_p e_{i_p} rows_p^T``.

        Shape:
            - digits: ``(P,)`` for each mode
            - values: ``(*b, P)``
            - rows: ``(*b, P, r)``
        """
        after = [rows]
        for core, digit in zip(reversed(self.facing), reversed(digits[1:]), strict=True):
            picked = core.transpose(-3, -2).index_select(-3, digit)
            after.append((picked @ after[-1].unsqueeze(-1)).squeeze(-1))
        before, vectors = values.unsqueeze(-1), []
        for k, (core, digit) in enumerate(zip(self.cores, digits, strict=True)):
            product = _scatter(before, after[len(self.cores) - 1 - k], digit, core.shape[-2])
            vectors.append(gauged(core, product))
            if k + 1 < len(self.cores):
                picked = core.transpose(-3, -2).index_select(-3, digit)
                before = (before.unsqueeze(-2) @ picked).squeeze(-2)
        return vectors


def _scatter(left: Tensor, right: Tensor, digit: Tensor, mode: int) -> Tensor:
    """``sum_p left_p right_p^T`` for each value of a digit: ``(*b, A, mode, B)``."""
    left, right = _broadcast_rows(left, right)
    a, b = left.shape[-1], right.shape[-1]
    total = left.new_zeros(*left.shape[:-2], mode, a, b)
    count = max(1, _CHUNK // (a * b * max(1, left.shape[:-2].numel())))
    for start in range(0, left.shape[-2], count):
        part = slice(start, start + count)
        outer = left[..., part, :, None] * right[..., part, None, :]
        total = total.index_add(-3, digit[part], outer)
    return total.transpose(-3, -2)


def _broadcast_rows(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    batch = torch.broadcast_shapes(left.shape[:-1], right.shape[:-1])
    return left.expand(*batch, left.shape[-1]), right.expand(*batch, right.shape[-1])


def tangent_cores(half: Half, vectors: Sequence[Tensor]) -> list[Tensor]:
    r"""Cores of :math:`[\sum_k U_{<k} \delta_k Q_{>k},\; U]`, of ranks ``2R``.

    With the bond ``[[0, I], [I, dS]]`` between two of them they are a tangent vector, with
    ``S + dS`` the point moved along it.
    """
    return derivative_cores(half.facing, half.cores, vectors)


def derivative_cores(
    ahead: Sequence[Tensor], cores: Sequence[Tensor], vectors: Sequence[Tensor]
) -> list[Tensor]:
    r"""Cores of :math:`[\sum_k C_{<k} d_k A_{>k},\; C]`: first ``[d_1, C_1]``, then blocks.

    Each of the others is ``[[A_k, 0], [d_k, C_k]]``, of ranks ``2R``. With ``A = C`` the sum is
    the derivative of the product of the cores.

    Shape:
        - ahead: ``A_2, ..., A_D``, as ``cores`` from the second on
        - cores, vectors: ``(*b, R_{k-1}, n_k, R_k)``
    """
    blocks = [torch.cat(torch.broadcast_tensors(vectors[0], cores[0]), -1)]
    for a, core, d in zip(ahead, cores[1:], vectors[1:], strict=True):
        a, core, d = torch.broadcast_tensors(a, core, d)
        top = torch.cat((a, torch.zeros_like(core)), -1)
        blocks.append(torch.cat((top, torch.cat((d, core), -1)), -3))
    return blocks


def round_outwards(
    cores: Sequence[Tensor], end: Tensor, ranks: Sequence[int]
) -> tuple[list[Tensor], Tensor]:
    """Truncate the bonds of ``P_1 ... P_D end`` from the centre outwards, by SVDs.

    Args:
        cores: left-orthonormal cores.
        end: the factor behind them, ``(*b, P_D, r)``.
        ranks: ``R_1, ..., R_{D-1}``, to be kept.

    Returns:
        Left-orthonormal cores of these ranks, and the factor ``(*b, r, r)`` behind them.
    """
    rounded = []
    for k in range(len(cores) - 1, 0, -1):
        pushed = cores[k] @ end.unsqueeze(-3)
        a, s, bt = torch.linalg.svd(pushed.flatten(-2), full_matrices=False)
        rank = ranks[k - 1]
        rounded.append(bt[..., :rank, :].unflatten(-1, pushed.shape[-2:]))
        end = a[..., :rank] * s[..., None, :rank]
    rounded.append(cores[0] @ end.unsqueeze(-3))
    return qr_sweep(rounded[::-1])
