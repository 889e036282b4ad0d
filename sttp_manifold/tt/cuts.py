"""Where a chain is cut in two so that the dense ``W`` is formed at the least cost.

``W`` is the product of what is left of a bond and what is right of it, at any bond: its size and
the rank decide what that product costs, and hardly the bond. What it costs to contract the two
parts beforehand is least where they are of about the same size, which for a kernel of
``64 x 576`` is not between its rows and its columns.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from sttp_manifold.tt.costs import Costs, costs
from sttp_manifold.tt.work import Work, gemm, left_forming, right_forming

if TYPE_CHECKING:
    from sttp_manifold.tt.shape import TTShape

__all__ = ["cheapest_cut", "cut_work"]


def cut_work(shape: TTShape, cut: int) -> Work:
    """Work of forming ``W`` from the first ``cut`` cores of a chain and the others."""
    cores = (*shape.left_core_shapes, *shape.right_core_shapes)
    first, second = cores[:cut], cores[cut:]
    rows = math.prod([n for _, n, _ in first])
    product = gemm(rows, second[0][0], shape.numel // rows)
    return left_forming(first).plus(right_forming(second)).plus(product)


def cheapest_cut(shape: TTShape) -> int:
    """How many cores to contract from the left, so that forming ``W`` costs least by the model.

    Args:
        shape: the chain, as its cores are stored.

    Returns:
        A number from one to all cores but one.
    """
    if torch.compiler.is_compiling():
        return _choose(shape, costs())  # a cache is nothing to trace
    return _chosen(shape, costs())


def _choose(shape: TTShape, unit: Costs) -> int:
    # Where all cost the same, the bond of the spectrum.
    best = len(shape.out_modes)
    least = cut_work(shape, best).cost(unit)
    for cut in range(1, len(shape.core_shapes)):
        cost = cut_work(shape, cut).cost(unit)
        if cost < least:
            best, least = cut, cost
    return best


_chosen = lru_cache(maxsize=4096)(_choose)
