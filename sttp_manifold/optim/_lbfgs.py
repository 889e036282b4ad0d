"""Limited-memory BFGS: pairs of steps and gradient changes, transported along."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sttp_manifold.optim._line_search import LineSearch
from sttp_manifold.optim._objective import Iterate, Objective
from sttp_manifold.optim._options import LBFGSOptions

__all__ = ["lbfgs"]


class _Pairs:
    """The last few pairs, oldest first, all in one tangent space.

    One call transports them all, as a stack. Then each has memory of its own again: products may
    depend on how numbers are aligned, and a run that goes on from a state is to repeat every bit.
    """

    def __init__(self, objective: Objective, memory: int) -> None:
        self._objective = objective
        self._memory = memory
        self._s: list[Tensor] = []
        self._y: list[Tensor] = []

    def __len__(self) -> int:
        return len(self._s)

    def clear(self) -> None:
        self._s, self._y = [], []

    def add(self, s: Tensor, y: Tensor) -> None:
        self._s = [*self._s, s][-self._memory :]
        self._y = [*self._y, y][-self._memory :]

    def state(self) -> dict[str, list[Tensor]]:
        return {"s": self._s, "y": self._y}

    def move(self, x: Tensor, y: Tensor, extra: Tensor) -> Tensor:
        """Transport all pairs and one more vector, which is returned."""
        vectors = torch.stack([*self._s, *self._y, extra])
        moved = [v.clone() for v in self._objective.transp(x, y, vectors)]
        count = len(self._s)
        self._s, self._y = moved[:count], moved[count : 2 * count]
        return moved[2 * count]

    def apply(self, at: Iterate, options: LBFGSOptions) -> Tensor:
        """The inverse Hessian times the gradient (Nocedal & Wright 2006, algorithm 7.4)."""
        inner, x = self._objective.inner, at.x
        q = at.gradient
        weights = []
        for s, y in zip(reversed(self._s), reversed(self._y), strict=True):
            rho = 1 / inner(x, s, y)
            a = rho * inner(x, s, q)
            q = q - a * y
            weights.append((rho, a))
        z = options.precondition(x, q)
        if self._s:
            s, y = self._s[-1], self._y[-1]
            z = z * (inner(x, s, y) / inner(x, y, options.precondition(x, y)))
        for s, y, (rho, a) in zip(self._s, self._y, reversed(weights), strict=True):
            z = z + s * (a - rho * inner(x, y, z))
        return z


def lbfgs(objective: Objective, at: Iterate, options: LBFGSOptions) -> None:
    """Run until the objective stops it."""
    inner = objective.inner
    line = LineSearch(objective, options.decrease, options.curvature, options.max_trials)
    pairs = _Pairs(objective, options.memory)
    for s, y in zip(objective.own.get("s", ()), objective.own.get("y", ()), strict=True):
        pairs.add(s, y)
    first_norm = objective.own.get("first_norm", at.grad_norm)
    while True:
        d = -pairs.apply(at, options)
        terms = [inner(at.x, at.gradient, d), inner(at.x, d, d)]
        slope, square = torch.stack(terms).tolist()
        if not (slope < 0 and math.isfinite(square)) and len(pairs):
            pairs.clear()
            continue
        if not len(pairs):
            options.check_definite(-slope)
        length = math.sqrt(max(square, 0.0))
        trial = line.search(at, d, slope, 1.0 if len(pairs) else options.initial_step / length)
        if trial is None:
            if not len(pairs):
                raise objective.stalled(at, "no step along the negative gradient lowers the cost")
            pairs.clear()
            continue
        new = trial.iterate()
        assert trial.direction is not None
        y = new.gradient - pairs.move(at.x, new.x, at.gradient)
        s = trial.step * trial.direction
        curvature, size = torch.stack([inner(new.x, s, y), inner(new.x, s, s)]).tolist()
        if curvature > options.cautious * size * new.grad_norm / first_norm:
            pairs.add(s, y)
        at = new
        objective.record(at, trial.step * length, first_norm=first_norm, **pairs.state())
