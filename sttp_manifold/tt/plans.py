"""Plans by their cost: how ``W`` is cut and formed, applied to vectors, convolved with.

A plan is chosen by a model of the work (:mod:`sttp_manifold.tt.cost_model`): floating-point
operations, kernel calls, elements that matrix products touch, elements that are permuted.
Operations alone choose badly.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal, NamedTuple

import torch

from sttp_manifold.tt.cost_model import (
    Costs,
    Work,
    cheapest,
    costs,
    gemm,
    left_forming,
    right_forming,
)
from sttp_manifold.tt.shape import TTShape

__all__ = [
    "LinearPlan",
    "Plan",
    "cheapest_cut",
    "conv_plan",
    "cut_work",
    "linear_plan",
    "linear_plans",
    "linear_steps",
]

Plan = Literal["dense", "lowrank", "cores"]


def cut_work(shape: TTShape, cut: int) -> Work:
    """Work of forming ``W`` from the first ``cut`` cores of a chain and the others."""
    cores = (*shape.left_core_shapes, *shape.right_core_shapes)
    first, second = cores[:cut], cores[cut:]
    rows = math.prod([n for _, n, _ in first])
    product = gemm(rows, second[0][0], shape.numel // rows)
    return left_forming(first).plus(right_forming(second)).plus(product)


def cheapest_cut(shape: TTShape) -> int:
    """How many cores to contract from the left, so that forming ``W`` costs least by the model.

    ``W`` is the product of what is left of a bond and what is right of it, at any bond: its size
    and the rank decide what that product costs, and hardly the bond. What it costs to contract the
    two parts beforehand is least where they are of about the same size, which for a kernel of
    ``64 x 576`` is not between its rows and its columns.

    Args:
        shape: the chain, as its cores are stored.

    Returns:
        A number from one to all cores but one.
    """
    if torch.compiler.is_compiling():
        return _choose_cut(shape, costs())  # a cache is nothing to trace
    return _chosen_cut(shape, costs())


def _choose_cut(shape: TTShape, unit: Costs) -> int:
    # The bond of the spectrum comes first, for where all cost the same.
    cuts = [len(shape.out_modes), *range(1, len(shape.core_shapes))]
    return cheapest([(cut, cut_work(shape, cut)) for cut in cuts], unit)


_chosen_cut = lru_cache(maxsize=4096)(_choose_cut)


class LinearPlan(NamedTuple):
    """How a linear map is applied.

    Attributes:
        name: ``"dense"`` (form ``W``), ``"lowrank"`` (form ``U`` and ``V``), or ``"cores"`` (form
            less than that).
        formed: how many right cores, the last ones, are contracted to one before they are applied.
        left: whether ``U`` is formed; otherwise its cores are applied one by one.
    """

    name: Plan
    formed: int
    left: bool

    @classmethod
    def named(cls, plan: LinearPlan | Plan, cores: int) -> LinearPlan:
        """A plan by its name, for so many right cores: ``"cores"`` then forms nothing."""
        if isinstance(plan, LinearPlan):
            return plan
        formed = plan != "cores"
        return cls(plan, cores if formed else 1, formed)


def linear_plans(shape: TTShape, count: int) -> list[tuple[LinearPlan, Work]]:
    """Every way to apply a chain to ``count`` vectors, and its work.

    Args:
        shape: the chain, as its cores are stored.
        count: how many vectors are multiplied at once.
    """
    right = shape.right_core_shapes
    forming, direct = left_forming(shape.left_core_shapes), _left_direct(shape, count)
    plans = []
    for formed in range(1, len(right) + 1):
        work = _right_applied(shape, count, formed)
        formed_right = right_forming(right[len(right) - formed :])
        applied = work.plus(gemm(count, shape.rank, shape.d_out))
        if formed == len(right):
            dense = cut_work(shape, cheapest_cut(shape))
            dense = dense.plus(gemm(count, shape.d_in, shape.d_out))
            plans.append((LinearPlan("dense", formed, True), dense))
            factors = forming.plus(formed_right)
            plans.append((LinearPlan("lowrank", formed, True), factors.plus(applied)))
        else:
            part = applied.plus(forming).plus(formed_right)
            plans.append((LinearPlan("cores", formed, True), part))
        if len(shape.out_modes) > 1:
            part = work.plus(direct).plus(formed_right)
            plans.append((LinearPlan("cores", formed, False), part))
    return plans


def _left_direct(shape: TTShape, count: int) -> Work:
    """Work of applying the left cores one by one."""
    work, size = Work(), 1
    for a, n, b in shape.left_core_shapes:
        size *= n
        # The core itself is permuted first, the rows once at the end.
        work = work.plus(gemm(count * (shape.d_out // size), b, a * n))
        work = work.plus(Work(calls=1.0, permuted=a * n * b))
    return work.plus(Work(calls=1.0, permuted=count * shape.d_out))


def _right_applied(shape: TTShape, count: int, formed: int) -> Work:
    """Work of applying the last cores, contracted to one, and the others."""
    right = shape.right_core_shapes
    size = 1
    for core in right[len(right) - formed :]:
        size *= core[1]
    work = gemm(count * (shape.d_in // size), size, right[-formed][0])
    for a, m, b in reversed(right[:-formed]):
        size *= m
        work = work.plus(gemm(count * (shape.d_in // size), m * b, a))
    return work


def _choose_steps(shape: TTShape, count: int, unit: Costs) -> LinearPlan:
    return cheapest(linear_plans(shape, count), unit)


_chosen_steps = lru_cache(maxsize=4096)(_choose_steps)


def linear_steps(shape: TTShape, count: int) -> LinearPlan:
    """Cheapest way to apply a chain to ``count`` vectors, by the cost model.

    Args:
        shape: the chain, as its cores are stored.
        count: how many vectors are multiplied at once.
    """
    if torch.compiler.is_compiling():
        return _choose_steps(shape, count, costs())  # a cache is nothing to trace
    return _chosen_steps(shape, count, costs())


def linear_plan(shape: TTShape, count: int) -> Plan:
    """Name of the cheapest way to apply ``W`` to ``count`` vectors, by the cost model.

    Args:
        shape: the plan of the weight; its merged chain is what is contracted.
        count: how many vectors are multiplied at once.

    Returns:
        ``"dense"`` (form ``W``), ``"lowrank"`` (form ``U`` and ``V``), or ``"cores"`` (form
        less). The result of the map is the same up to rounding.
    """
    return linear_steps(shape.merged, count).name


def conv_plan(shape: TTShape, positions: int) -> Literal["dense", "factorized"]:
    """Cheapest way to convolve with a kernel ``W`` read as ``c_out x (c_in k)``.

    Args:
        shape: the plan of the kernel.
        positions: places of the output, over the batch, at which the kernel is applied.

    Returns:
        ``"dense"`` (form ``W``), or ``"factorized"`` (``r`` kernels from ``V^T``, then a pointwise
        convolution by ``U S``). The result is the same up to rounding.
    """
    d_out, d_in, r = shape.d_out, shape.d_in, shape.rank
    unit = costs()
    dense = _convolution(positions, d_in, d_out, unit)
    factorized = _convolution(positions, d_in, r, unit) + _convolution(positions, r, d_out, unit)
    chain = shape.merged
    dense += cut_work(chain, cheapest_cut(chain)).cost(unit)
    factorized += left_forming(chain.left_core_shapes).cost(unit)
    factorized += right_forming(chain.right_core_shapes).cost(unit)
    return "dense" if dense <= factorized else "factorized"


def _convolution(positions: int, inner: int, channels: int, unit: Costs) -> float:
    # Kernels compute output channels in blocks: four cost as much as sixteen.
    blocked = math.ceil(channels / unit.channels) * unit.channels
    return positions * (2.0 * inner * blocked + unit.patch * channels) + unit.call
