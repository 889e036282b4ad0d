"""Gradients of parameters on manifolds, block by block."""

from __future__ import annotations

from torch import Tensor

from sttp_manifold.optim._blocks import decay_gradient
from sttp_manifold.optim._stacks import Block, Stacks

__all__ = ["Gradients"]


class Gradients:
    r"""Euclidean gradients of what is minimized, block by block; ``.grad`` stays as it is.

    Args:
        stacks: parameters that have gradients.
        maximize: whether the objective is to grow.
        weight_decay: weight of the L2 penalty that is added.
    """

    def __init__(self, stacks: Stacks, *, maximize: bool, weight_decay: float = 0.0) -> None:
        self._pieces = stacks.take([p.grad for p in stacks.params])  # type: ignore[misc]
        self._maximize = maximize
        self._decay = weight_decay
        self._penalties: list[list[Tensor]] = []
        if weight_decay:
            self._penalties = stacks.take([decay_gradient(p) for p in stacks.params])

    def of(self, block: Block, k: int) -> Tensor:
        """Those of block ``k``, as one flat vector."""
        gradient = block.fetch(self._pieces[k])
        if self._maximize:
            gradient.neg_()
        if self._penalties:
            gradient.add_(block.fetch(self._penalties[k]), alpha=self._decay)
        return gradient
