"""The parts of `compress`: what there is, of what rank each is to be, and what stays dense."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn.utils import parametrize

from sttp_manifold.errors import ConversionError
from sttp_manifold.nn.allocate import check_allocation, spread
from sttp_manifold.nn.calibration import second_moments
from sttp_manifold.nn.choose import own_tensors
from sttp_manifold.nn.counts import count_elements
from sttp_manifold.nn.left import listed
from sttp_manifold.nn.modules import show
from sttp_manifold.nn.moments import Moments
from sttp_manifold.nn.recipe import PRETRAINED, Recipe
from sttp_manifold.nn.stock import TABLE, groups_of, stock_layers
from sttp_manifold.nn.units import Made, SpectralUnit, StockUnit, spectral_units

__all__ = [
    "Found",
    "find_units",
    "left_dense",
    "made_of",
    "nothing_to_compress",
    "ranks_by_rule",
    "ranks_within",
    "stock_to_fit",
]

Unit: TypeAlias = "StockUnit | SpectralUnit"
_LARGEST = 5


@dataclass
class Found:
    """What there is to compress.

    Attributes:
        units: stock layers and spectral weights.
        left: sentences on what cannot be.
    """

    units: list[Unit]
    left: list[str] = field(default_factory=list)


def find_units(
    model: nn.Module,
    meant: set[nn.Module],
    recipe: Recipe,
    grow: str,
    data: Any,
    options: Mapping[str, object],
) -> Found:
    """Stock layers and spectral weights of the modules that are meant.

    Raises:
        ConversionError: nothing at all, or data where nothing is pretrained.
    """
    layers, unfit = stock_layers(model, meant)
    groups, tied = groups_of(model, layers)
    there = spectral_units(model, meant, options)
    found = Found([*there], unfit + tied)
    if not groups and not there:
        raise nothing_to_compress(found)
    moments = None
    if data is not None:
        if recipe.init != PRETRAINED or not groups:
            raise ConversionError(
                "data is for taking pretrained weights over, and here "
                + (
                    f"they start anew (init={recipe.init!r})"
                    if groups
                    else "all are in spectral form already; call decompress(model) first"
                )
            )
        weights = [w for g in groups for w in g.weights]
        known = isinstance(data, Moments) and data.watches(weights)
        moments = data if known else second_moments(model, weights, data)
    stock = [StockUnit(group, recipe, grow, moments) for group in groups]
    found.units = [*stock, *there]
    unseen = [name for unit in stock for name in unit.unseen()]
    if unseen:
        names = ", ".join(map(show, unseen))
        found.left.append(f"data shows no input of {names}: truncated without")
    return found


def nothing_to_compress(found: Found) -> ConversionError:
    """The error for a network without any layer to convert."""
    kinds = ", ".join(f"nn.{row.stock.__name__}" for row in TABLE)
    at_rank = [str(u) for u in found.units if isinstance(u, SpectralUnit)]
    if at_rank and not found.left:
        return ConversionError(
            f"nothing to compress: {', '.join(at_rank)} are spectral already, and of no higher rank"
        )
    why = listed(found.left) or f"no layer of {kinds} is left"
    error = ConversionError(f"nothing to compress: {why}")
    if found.left and found.left[0].startswith("'"):
        error.layer = found.left[0].split("'")[1]
    return error


# -- ranks ---------------------------------------------------------------------------------------


def ranks_by_rule(
    rule: Callable[[str, nn.Module], int | None], units: Sequence[Unit]
) -> dict[Unit, int]:
    """The rank of each unit that has one.

    Raises:
        ConversionError: layers that share a weight and have different ranks.
    """
    ranks: dict[Unit, int] = {}
    for unit in units:
        each = {name: rule(name, layer) for layer, name in unit.layers.items()}
        if len(set(each.values())) > 1:
            said = ", ".join(f"{show(name)}: {rank}" for name, rank in each.items())
            raise ConversionError(
                f"layers that share a weight have one rank, got {said}", layer=next(iter(each))
            )
        rank = next(iter(each.values()))
        if rank is not None:
            ranks[unit] = rank
    return ranks


def ranks_within(
    budget: float, of: str, allocate: str, model: nn.Module, units: Sequence[Unit]
) -> dict[Unit, int]:
    """The ranks at which a network keeps to a budget.

    Raises:
        ConversionError: a budget outside of (0, 1] or out of reach, or an unknown ``of`` or
            ``allocate``.
    """
    check_allocation(allocate)
    if of not in ("treated", "model"):
        raise ConversionError(f"of is 'treated' or 'model', got {of!r}")
    if not 0 < budget <= 1:
        raise ConversionError(
            f"budget is the fraction of elements to keep, above 0 and at most 1, got {budget}; "
            "budget=0.05 keeps a twentieth"
        )
    treated = sum(unit.numel for unit in units)
    held = sum(unit.stored if isinstance(unit, SpectralUnit) else unit.numel for unit in units)
    outside = count_elements(model) - held if of == "model" else 0
    allowed = budget * (treated + outside) - outside
    limits = {unit: unit.limit for unit in units}
    least = sum(min(unit.kept(1), unit.kept(limits[unit])) for unit in units)
    if least > allowed:
        raise _out_of_reach(budget, of, model, units, least + outside, treated + outside)

    def errors(unit: Unit, ranks: Sequence[int]) -> torch.Tensor:
        return unit.errors(ranks)

    return spread(allocate, limits, lambda unit, rank: unit.kept(rank), allowed, errors)


def _out_of_reach(
    budget: float, of: str, model: nn.Module, units: Sequence[Unit], least: int, dense: int
) -> ConversionError:
    sizes = Counter({f"{unit} at rank 1": unit.kept(1) for unit in units})
    if of == "model":
        ours = {p for unit in units for p in _parameters_of(unit)}
        for name, module in model.named_modules():
            size = sum(p.numel() for p in own_tensors(module) if p not in ours)
            if size:
                sizes[f"{show(name)} ({type(module).__name__})"] = size
    largest = ", ".join(f"{name}: {size:,}" for name, size in sizes.most_common(_LARGEST))
    what = "the layers" if of == "treated" else "the network (what is left dense counts in full)"
    return ConversionError(
        f"budget={budget} of {dense} elements is out of reach: at the least {least} are kept of "
        f"{what}, so that the smallest reachable budget is {math.ceil(1e6 * least / dense) / 1e6}; "
        f"the largest in its way are {largest}"
    )


def _parameters_of(unit: Unit) -> list[torch.Tensor]:
    if isinstance(unit, StockUnit):
        return list(unit.group.weights)
    return [p for part in unit.parts for p in part.parameters()]


# -- what is made, and what is left --------------------------------------------------------------


def stock_to_fit(ranks: Mapping[Unit, int], data: object) -> dict[StockUnit, int]:
    """Stock layers that will be converted, with their ranks.

    Raises:
        ConversionError: no data to fit them on.
    """
    if data is None:
        raise ConversionError(
            "in_turn=True fits weights on data, as in compress(model, budget=0.2, data=batches, "
            "in_turn=True); got none"
        )
    return {
        unit: rank
        for unit, rank in ranks.items()
        if isinstance(unit, StockUnit) and unit.grown(rank) is None
    }


def made_of(ranks: Mapping[Unit, int], left: list[str]) -> Made:
    """What takes the place of layers and parameters; why others stay goes to ``left``."""
    new: Made = {}
    growing = False
    for unit, rank in ranks.items():
        size = unit.grown(rank)
        if size is not None:
            growing = True
            left.append(
                f"{unit} would grow from {unit.numel} to {size} stored numbers at rank {rank}"
            )
            continue
        try:
            new |= unit.made(rank)
        except ConversionError as error:
            if isinstance(unit, SpectralUnit):
                raise
            left.append(str(error))
    if growing:
        left.append("a lower rank shrinks what would grow, grow='allow' converts it anyway")
    return new


def left_dense(
    model: nn.Module,
    meant: set[nn.Module],
    new: Made,
    ranks: Mapping[Unit, int],
    units: Sequence[Unit],
) -> list[str]:
    """Types of modules that were meant and whose matrices no row of the table is for."""
    said = {layer for unit in units for layer in unit.layers}
    treated = {p for unit in units for p in _parameters_of(unit)}
    total = count_elements(model)
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for module in model.modules():
        if module not in meant or module in said or module in new:
            continue
        own = [p for p in own_tensors(module) if p not in treated]
        matrices = [p for p in own if sum(size > 1 for size in p.shape) > 1]
        if matrices:
            kind = parametrize.type_before_parametrizations(module).__name__
            counts[kind] += 1
            sizes[kind] += sum(p.numel() for p in matrices)
    return [
        f"{counts[kind]} {kind}, dense ({100 * size / total:.1f} % of the parameters)"
        for kind, size in sizes.most_common()
    ]
