r"""Vertical and horizontal parts of a tangent vector under the gauge of a chain of cores.

The gauge acts by :math:`C_k \leftarrow Q_{k-1}^\top C_k Q_k`; its tangent at the identity sends
skew matrices :math:`\Omega_k`, one at each acting bond, to the vertical vector
:math:`\delta C_k = C_k \Omega_k - \Omega_{k-1} C_k`. The horizontal space is the orthogonal
complement of all vertical vectors in the Euclidean metric.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["vertical_part"]


def vertical_part(
    cores: Sequence[Tensor],
    vectors: Sequence[Tensor],
    bonds: Sequence[int],
    acting: Mapping[int, Tensor] | None = None,
) -> list[Tensor]:
    r"""Orthogonal projection of ``vectors`` onto the vertical space at ``cores``.

    With ``L`` the map from skew matrices to vertical vectors, the normal equations
    :math:`L^* L\,\Omega = L^* u` are solved by conjugate gradients: ``L`` is injective, because a
    vertical vector determines its :math:`\Omega_k` from the outside inwards.

    Args:
        cores: the chain, in its order.
        vectors: a vector of the total space, one array for each core.
        bonds: bonds ``1, 2, ...`` at which the gauge acts; bond ``k`` follows core ``k - 1``.
        acting: for a bond at which it does not act by all rotations, the pairs of columns that it
            may turn into each other.

    Shape:
        - cores, vectors: ``(*b, R_{k-1}, n_k, R_k)``
        - acting: ``(R_k, R_k)``, symmetric, of bools

    Returns:
        The vertical parts, one array for each core.
    """
    if not bonds:
        return [torch.zeros_like(v) for v in vectors]

    def lift(omega: list[Tensor]) -> list[Tensor]:
        at = dict(zip(bonds, omega, strict=True))
        lifted = []
        for k, core in enumerate(cores):
            vector = torch.zeros_like(core)
            if k + 1 in at:
                vector = vector + core @ at[k + 1].unsqueeze(-3)
            if k in at:
                vector = vector - (at[k] @ core.flatten(-2)).unflatten(-1, core.shape[-2:])
            lifted.append(vector)
        return lifted

    def lower(u: Sequence[Tensor]) -> list[Tensor]:
        lowered = []
        for bond in bonds:
            a, b = cores[bond - 1], cores[bond]
            before = a.flatten(-3, -2).mT @ u[bond - 1].flatten(-3, -2)
            after = u[bond].flatten(-2) @ b.flatten(-2).mT
            full = before - after
            if acting and bond in acting:
                full = torch.where(acting[bond], full, 0.0)
            lowered.append((full - full.mT) / 2)
        return lowered

    return lift(_conjugate_gradients(lambda omega: lower(lift(omega)), lower(vectors)))


def _conjugate_gradients(
    apply: Callable[[list[Tensor]], list[Tensor]], right_hand_side: list[Tensor]
) -> list[Tensor]:
    """Solve a positive definite system in every batch, to rounding."""
    residual = right_hand_side
    solution = [torch.zeros_like(t) for t in residual]
    direction = residual
    norm2 = start = _inner(residual, residual)
    eps, tiny = torch.finfo(start.dtype).eps, torch.finfo(start.dtype).tiny
    # Exact in as many steps as there are unknowns; rounding may ask for some more.
    for _ in range(20 + 2 * sum(t.shape[-1] ** 2 for t in residual)):
        active = norm2 > (eps**2) * start
        if not bool(active.any()):
            break
        image = apply(direction)
        curvature = _inner(direction, image)
        step = torch.where(active & (curvature > 0), norm2 / curvature.clamp_min(tiny), 0.0)
        solution = _add(solution, direction, step)
        residual = _add(residual, image, -step)
        previous, norm2 = norm2, _inner(residual, residual)
        ratio = torch.where(active, norm2 / previous.clamp_min(tiny), 0.0)
        direction = _add(residual, direction, ratio)
    return solution


def _inner(u: list[Tensor], v: list[Tensor]) -> Tensor:
    return torch.stack([(a * b).sum((-2, -1)) for a, b in zip(u, v, strict=True)]).sum(0)


def _add(u: list[Tensor], v: list[Tensor], factor: Tensor) -> list[Tensor]:
    return [a + factor[..., None, None] * b for a, b in zip(u, v, strict=True)]
