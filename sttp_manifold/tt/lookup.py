"""Rows of ``W`` at indices, without forming it: plans and the contraction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from sttp_manifold.tt.contract import left_matrix
from sttp_manifold.tt.cost_model import (
    Costs,
    Work,
    cheapest,
    costs,
    gemm,
    left_forming,
    right_forming,
)
from sttp_manifold.tt.plans import Plan, cheapest_cut, cut_work
from sttp_manifold.tt.shape import TTShape

__all__ = ["LookupPlan", "look_up", "lookup_plan", "lookup_plans"]


class LookupPlan(NamedTuple):
    """How rows are looked up.

    Attributes:
        name: ``"dense"`` (form ``W``), ``"lowrank"`` (form ``U`` and ``V``), or ``"cores"`` (form
            less of ``U`` than that).
        formed: how many left cores, the first ones, are contracted to one beforehand.
    """

    name: Plan
    formed: int


def lookup_plans(shape: TTShape, count: int) -> list[tuple[LookupPlan, Work]]:
    """Every way to look up ``count`` rows, and its work.

    Args:
        shape: the chain, as its cores are stored.
        count: how many rows are looked up at once.
    """
    left, right = shape.left_core_shapes, right_forming(shape.right_core_shapes)
    product = gemm(count, shape.rank, shape.d_in).plus(right)
    plans = []
    for formed in range(1, len(left) + 1):
        work = product.plus(left_forming(left[:formed]))
        work = work.plus(Work(calls=1.0, touched=2.0 * count * left[formed - 1][2]))
        for a, n, b in left[formed:]:
            # All rows of a core at once, and then one of each n.
            work = work.plus(gemm(count, a, n * b)).plus(Work(calls=4.0, touched=2.0 * count * b))
        name: Plan = "lowrank" if formed == len(left) else "cores"
        plans.append((LookupPlan(name, formed), work))
    dense = cut_work(shape, cheapest_cut(shape))
    dense = dense.plus(Work(calls=1.0, touched=2.0 * count * shape.d_in))
    plans.append((LookupPlan("dense", len(left)), dense))
    return plans


def _choose(shape: TTShape, count: int, unit: Costs) -> LookupPlan:
    return cheapest(lookup_plans(shape, count), unit)


_chosen = lru_cache(maxsize=4096)(_choose)


def lookup_plan(shape: TTShape, count: int) -> LookupPlan:
    """Cheapest way to look up ``count`` rows, by the cost model.

    Args:
        shape: the chain, as its cores are stored.
        count: how many rows are looked up at once.
    """
    if torch.compiler.is_compiling():
        return _choose(shape, count, costs())  # a cache is nothing to trace
    return _chosen(shape, count, costs())


def look_up(cores: Sequence[Tensor], index: Tensor, formed: int) -> Tensor:
    """Rows of the product of left cores, without batch dimensions.

    The first cores are contracted, and their rows taken by the leading digits of the index. Each
    core after them is multiplied as a whole, for all values of its digit, of which one is kept: to
    fetch a slice of the core for each row instead moves ``R^2`` numbers a row, and is ten to thirty
    times slower at rank 64.

    Args:
        cores: left cores, from the outermost.
        index: row-major over the modes of the cores.
        formed: how many cores to contract beforehand, at least one.

    Shape:
        - index: ``(P,)``
        - output: ``(P, R_D)``
    """
    rest = math.prod([core.shape[-2] for core in cores[formed:]])
    rows = left_matrix(cores[:formed]).index_select(0, index // rest if rest > 1 else index)
    if formed == len(cores):
        return rows
    places = torch.arange(index.shape[0], device=index.device)
    for core in cores[formed:]:
        n, rank = core.shape[-2:]
        rest //= n
        every = (rows @ core.flatten(-2)).reshape(index.shape[0] * n, rank)
        rows = every.index_select(0, places * n + index // rest % n)
    return rows
