r"""How a budget is spread over the weights of a network.

``"uniform"`` gives all one rank. ``"energy"`` is greedy: it minimizes the sum of the relative
squared errors of all weights, which their singular values tell beforehand. ``"balanced"`` is
half-way between: the geometric mean of the two ranks of each weight, scaled to the budget. Why,
with what was tried beside it, is in docs/decisions/.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor

from sttp_manifold.errors import ConversionError

__all__ = ["ALLOCATIONS", "check_allocation", "grid", "spread"]

ALLOCATIONS = ("uniform", "energy", "balanced")

U = TypeVar("U", bound=Hashable)

# Up to here every rank is looked at, beyond it one in 32.
_EVERY = 64


def grid(limit: int) -> list[int]:
    """Ranks at which costs and errors of a weight are looked at."""
    ranks = list(range(1, min(limit, _EVERY) + 1))
    while ranks[-1] < limit:
        ranks.append(min(limit, ranks[-1] + max(1, ranks[-1] // 32)))
    return ranks


def spread(
    how: str,
    limits: dict[U, int],
    kept: Callable[[U, int], int],
    allowed: float,
    errors: Callable[[U, Sequence[int]], Tensor],
) -> dict[U, int]:
    """A rank for each unit whose sum of kept numbers is within what is allowed.

    Args:
        how: one of :data:`ALLOCATIONS`.
        limits: rank of each unit from which on nothing changes.
        kept: numbers that a unit keeps at a rank; at rank 1 their sum is within.
        allowed: the most that is to be kept.
        errors: relative squared error of a unit at ranks.
    """
    kept = cache(kept)
    uniform = _uniform(limits, kept, allowed)
    if how == "uniform":
        return uniform
    greedy = _greedy(limits, kept, allowed, errors)
    if how == "energy":
        return _filled(greedy, limits, kept, allowed)
    middle = {u: (uniform[u] * greedy[u]) ** 0.5 for u in limits}
    return _filled(_scaled(middle, limits, kept, allowed), limits, kept, allowed)


def _total(ranks: dict[U, int], kept: Callable[[U, int], int]) -> int:
    return sum(kept(u, r) for u, r in ranks.items())


def _uniform(limits: dict[U, int], kept: Callable[[U, int], int], allowed: float) -> dict[U, int]:
    """The largest common rank; more rank is not always more numbers, so that all are looked at."""
    most = max(limits.values())
    ranks = grid(most)
    for k in range(len(ranks) - 1, -1, -1):
        at = {u: min(ranks[k], limits[u]) for u in limits}
        if _total(at, kept) <= allowed:
            break
    top = ranks[k + 1] if k + 1 < len(ranks) else most + 1
    for rank in range(top - 1, ranks[k], -1):  # between two points of the grid
        between = {u: min(rank, limits[u]) for u in limits}
        if _total(between, kept) <= allowed:
            return between
    return at


def _greedy(
    limits: dict[U, int],
    kept: Callable[[U, int], int],
    allowed: float,
    errors: Callable[[U, Sequence[int]], Tensor],
) -> dict[U, int]:
    """The least sum of errors for a price of a number, at the lowest price that can be paid."""
    table = {}
    for u, limit in limits.items():
        ranks = grid(limit)
        costs = torch.tensor([kept(u, r) for r in ranks], dtype=torch.float64)
        table[u] = (ranks, costs, errors(u, ranks).double().cpu())

    def at(log_price: float) -> dict[U, int]:
        price = 10.0**log_price
        return {u: r[int((e + price * c).argmin())] for u, (r, c, e) in table.items()}

    low, high = -30.0, 10.0
    for _ in range(60):
        middle = (low + high) / 2
        if _total(at(middle), kept) <= allowed:
            high = middle
        else:
            low = middle
    return at(high)


def _scaled(
    wanted: dict[U, float], limits: dict[U, int], kept: Callable[[U, int], int], allowed: float
) -> dict[U, int]:
    """The largest multiple of some ranks, rounded down, that is within."""

    def at(factor: float) -> dict[U, int]:
        return {u: max(1, min(limits[u], int(factor * w))) for u, w in wanted.items()}

    low, high = 0.0, 2.0 * max(limits[u] / max(w, 1e-9) for u, w in wanted.items())
    for _ in range(50):
        middle = (low + high) / 2
        if _total(at(middle), kept) <= allowed:
            low = middle
        else:
            high = middle
    return at(low)


def _filled(
    ranks: dict[U, int], limits: dict[U, int], kept: Callable[[U, int], int], allowed: float
) -> dict[U, int]:
    """What is left over, by one rank at a time, the units of least rank first."""
    ranks = dict(ranks)
    left = allowed - _total(ranks, kept)
    for u in sorted(ranks, key=lambda u: ranks[u] / limits[u]):
        if ranks[u] < limits[u]:
            more = kept(u, ranks[u] + 1) - kept(u, ranks[u])
            if 0 <= more <= left:
                ranks[u], left = ranks[u] + 1, left - more
    return ranks


def check_allocation(how: str) -> None:
    """Refuse an unknown way.

    Raises:
        ConversionError: any other name than those of :data:`ALLOCATIONS`.
    """
    if how not in ALLOCATIONS:
        names = ", ".join(map(repr, ALLOCATIONS))
        raise ConversionError(f"allocate is one of {names}, got {how!r}")
