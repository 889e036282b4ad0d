"""Contractions of stacks of cores, each with its pull-back written out.

As ``torch.func.vjp`` of the functions of :mod:`sttp_manifold.tt.contract`, without a graph: a
function returns its value, and the map from cotangents of that to those of its arguments. Every
tensor has exactly one batch dimension, and nothing may be recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["left_matrix_vjp", "right_matrix_vjp", "times_bond_vjp"]


def left_matrix_vjp(cores: Sequence[Tensor]) -> tuple[Tensor, Callable[[Tensor], list[Tensor]]]:
    """Product of left cores as a matrix, ``(n, n_1 ... n_D, R_D)``, and its pull-back."""
    steps: list[tuple[Tensor, Tensor]] = []
    product = cores[0].flatten(1, 2)
    for core in cores[1:]:
        unfolding = core.flatten(2)
        steps.append((product, unfolding))
        product = torch.bmm(product, unfolding).view(len(core), -1, core.shape[-1])

    def pull(G: Tensor) -> list[Tensor]:
        found = []
        for core, (before, unfolding) in zip(reversed(cores), reversed(steps), strict=False):
            G = G.reshape(len(G), before.shape[1], -1)
            found.append(torch.bmm(before.mT, G).view(core.shape))
            G = torch.bmm(G, unfolding.mT)
        return [G.reshape(cores[0].shape), *reversed(found)]

    return product, pull


def right_matrix_vjp(cores: Sequence[Tensor]) -> tuple[Tensor, Callable[[Tensor], list[Tensor]]]:
    """Product of right cores as a matrix, ``(n, R_D, m_1 ... m_E)``, and its pull-back."""
    steps: list[tuple[Tensor, Tensor]] = []
    product = cores[-1].flatten(2)
    for core in reversed(cores[:-1]):
        unfolding = core.flatten(1, 2)
        steps.append((unfolding, product))
        product = torch.bmm(unfolding, product).view(len(core), core.shape[1], -1)

    def pull(G: Tensor) -> list[Tensor]:
        found = []
        for core, (unfolding, before) in zip(cores, reversed(steps), strict=False):
            G = G.reshape(len(G), unfolding.shape[1], -1)
            found.append(torch.bmm(G, before.mT).view(core.shape))
            G = torch.bmm(unfolding.mT, G)
        return [*found, G.reshape(cores[-1].shape)]

    return product, pull


def times_bond_vjp(
    matrix: Tensor, bond: Tensor
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor]]]:
    """``matrix @ diag(bond)`` or ``matrix @ bond``, and its pull-back to both."""
    if bond.ndim == 2:
        weights = bond.unsqueeze(1)
        return matrix * weights, lambda G: (G * weights, (G * matrix).sum(1))
    return torch.bmm(matrix, bond), lambda G: (torch.bmm(G, bond.mT), torch.bmm(matrix.mT, G))
