"""Counts of networks: what the compression ratio Z is made of, and the rank for a budget."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable

from torch import nn

from sttp_manifold.errors import ConversionError

__all__ = ["count_elements", "largest_rank", "ratio"]

# Buffers that count as parts of a network; ``num_batches_tracked`` does not.
_STATISTICS = ("running_mean", "running_var")


def count_elements(model: nn.Module) -> int:
    """Elements of a network's parameters and running statistics, each tensor once.

    What is not initialized yet counts as nothing.
    """
    buffers = [
        buffer for name, buffer in model.named_buffers() if name.rpartition(".")[2] in _STATISTICS
    ]
    tensors = (*model.parameters(), *buffers)
    return sum(tensor.numel() for tensor in tensors if not nn.parameter.is_lazy(tensor))


def ratio(parameters: int, dense: int) -> float:
    """``100 parameters / dense``; 100 for nothing at all."""
    return 100.0 * parameters / dense if dense else 100.0


def largest_rank(
    count: Callable[[int], int], limit: int, dense: int, budget: float, *, monotone: bool
) -> int:
    """Largest uniform rank at which a network keeps to a budget.

    Args:
        count: elements of the compressed network at a rank.
        limit: rank from which on nothing changes.
        dense: elements of the dense network.
        budget: fraction of ``dense``.
        monotone: whether ``count`` does not decrease; then not every rank is tried.

    Raises:
        ConversionError: a budget outside of (0, 1], or one that no rank keeps to.
    """
    if not 0 < budget <= 1:
        raise ConversionError(
            f"budget is the fraction of elements to keep, above 0 and at most 1, got {budget}; "
            "budget=0.05 keeps a twentieth"
        )
    ranks, allowed = range(1, limit + 1), budget * dense
    if monotone:
        best = bisect_right(ranks, allowed, key=count)
    else:
        best = max((rank for rank in ranks if count(rank) <= allowed), default=0)
    if not best:
        least = count(1) if monotone else min(map(count, ranks))
        raise ConversionError(
            f"budget={budget} of {dense} elements is out of reach: at the least {least} are kept, "
            f"so that the smallest reachable budget is {math.ceil(1e6 * least / dense) / 1e6} "
            "(what is not compressed counts in full)"
        )
    return best
