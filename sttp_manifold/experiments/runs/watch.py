"""What a solver runs under: its counts, clock, records and stopping rules."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor

from sttp_manifold.errors import ConfigError
from sttp_manifold.experiments.problems import entries_of
from sttp_manifold.experiments.runs.trace import MAX_SINGULAR_VALUES, DivergedError, Effort, Trace
from sttp_manifold.experiments.specs import RunSpec
from sttp_manifold.experiments.task import Problem, relative_error, relative_square
from sttp_manifold.tt import SpectralTT, TTShape, orthogonalize

__all__ = ["Spent", "Watch"]

# Every iterate up to here is recorded, then those that are this factor apart, and the last one.
_ALL_UP_TO = 100
_APART = 1.03
# Between two pieces a run can be cut; a clock decides where, and changes no number.
_SECONDS_OF_A_PIECE = 10.0


class Spent(StopIteration):
    """Leaves a solver: the target is reached, or the budget spent.

    A ``StopIteration``, which scipy's solvers and ours understand when a callback raises it.
    """


class Watch:
    """What a solver runs under: the cost, counted; iterates, recorded; target and budget, kept.

    Time spent on looking is not counted as the solver's.

    Args:
        spec: of the run.
        problem: on the run's device and in its dtype.
        trace: what is recorded.

    Attributes:
        effort: the counts. A solver adds the gradients and Hessian products that it computes.
        stopped: why the run is to end, once it is.
        state: what the solver goes on from, by its own account; None at the start, and always of
            one that cannot be cut.
    """

    def __init__(self, spec: RunSpec, problem: Problem, trace: Trace) -> None:
        assert spec.target is not None
        self.spec, self.problem, self.trace = spec, problem, trace
        self.effort = trace.effort = Effort(spec.target)
        self.stopped: str | None = None
        self.state: dict[str, Any] | None = None
        self._train = problem.splits.train
        self._norm = self._train.targets.square().sum()
        self._latest: SpectralTT | None = None
        self._recorded = -1
        self._seconds = 0.0
        self.go_on()

    # -- what a solver calls ---------------------------------------------------------------------

    @property
    def due(self) -> bool:
        """Whether a solver that can be cut is to leave :attr:`state`, and return."""
        return self._clock() - self._piece >= _SECONDS_OF_A_PIECE

    def cost(self, tt: SpectralTT, *, again: bool = False) -> Tensor:
        """Half the squared relative residual on the observed entries, a differentiable scalar.

        The call is counted, unless it is made again where a run goes on.

        Raises:
            Spent: the calls that the budget allows are made.
        """
        if not again:
            self.count()
        errors = entries_of(tt, self._train.inputs) - self._train.targets
        return errors.square().sum() / (2 * self._norm)

    def count(self) -> None:
        """Count an evaluation of the cost that is not made by :meth:`cost`.

        Raises:
            Spent: the calls that the budget allows are made.
        """
        most = self.spec.max_evaluations
        if most is not None and self.effort.evaluations >= most:
            raise self._end(f"max_evaluations = {most} calls of the cost made")
        self.effort.evaluations += 1

    def stores(self, numbers: int) -> None:
        """Told how many numbers the solver moves."""
        self.trace.facts["stored_parameters"] = numbers

    @torch.no_grad()
    def iterate(self, tt: SpectralTT, cost: float | None = None) -> None:
        """Take note of an iterate, the start first.

        Args:
            tt: the weight.
            cost: as :meth:`cost`, where the solver knows it.

        Raises:
            Spent: the target is reached, or the budget spent.
            DivergedError: the residual is not finite.
            ConfigError: the first iterate is not the common start.
        """
        begin = self._clock()
        seconds = begin - self._begin - self._away
        effort, spec = self.effort, self.spec
        if self._latest is None:
            self._check_start(tt)
        else:
            effort.iterations += 1
        square = self._square(tt) if cost is None else 2 * cost
        if not math.isfinite(square):
            raise DivergedError(f"residual {square} after {effort.iterations} iterations")
        reached = effort.see(math.sqrt(max(square, 0.0)), seconds)
        self._latest = tt.detach().clone()
        self._seconds = seconds
        if effort.iterations <= _ALL_UP_TO or effort.iterations >= _APART * self._recorded:
            self._record()
        self._away += self._clock() - begin
        if reached:
            raise self._end(f"residual {effort.residual:.2g} <= target = {effort.target:g}")
        if spec.max_iterations is not None and effort.iterations >= spec.max_iterations:
            raise self._end(f"max_iterations = {spec.max_iterations} made")
        if spec.max_seconds is not None and seconds >= spec.max_seconds:
            raise self._end(f"max_seconds = {spec.max_seconds:g} spent")

    # -- what the run calls ----------------------------------------------------------------------

    def go_on(self) -> None:
        """Begin a piece: time that went by since the last iterate is not the solver's."""
        self._piece = self._clock()
        self._begin, self._away = self._piece - self._seconds, 0.0

    def state_dict(self) -> dict[str, Any]:
        """All of it but the trace, for a checkpoint."""
        tt = self._latest
        assert tt is not None
        return {
            "state": self.state,
            "left": list(tt.left),
            "spectrum": tt.spectrum,
            "right": list(tt.right),
            "recorded": self._recorded,
            "seconds": self._seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What :meth:`state_dict` gave, after the trace has what it had.

        Args:
            state: of a watch over the same run.
        """
        assert self.trace.effort is not None
        self.effort = self.trace.effort
        self.state, self._recorded = state["state"], state["recorded"]
        self._seconds = state["seconds"]
        shape: TTShape = self.problem.start.shape
        left, right = (tuple(state[side]) for side in ("left", "right"))
        self._latest = SpectralTT(left, state["spectrum"], right, shape)

    def finish(self, message: str) -> SpectralTT:
        """Record the last iterate if it is not on record; what the solver ended with.

        Args:
            message: the solver's own reason, where it was not stopped from here.
        """
        assert self._latest is not None
        if self._recorded < self.effort.iterations:
            self._record()
        self.effort.stopped = self.stopped or message
        return self._latest

    # -- inside ----------------------------------------------------------------------------------

    def _end(self, why: str) -> Spent:
        self.stopped = why
        return Spent(why)

    def _square(self, tt: SpectralTT) -> float:
        outputs = entries_of(tt, self._train.inputs)
        return relative_square(outputs, self._train.targets).item()

    def _check_start(self, tt: SpectralTT) -> None:
        start, splits = self.problem.start, self.problem.splits
        gaps, sizes = [], []
        for split in (splits.train, splits.val):
            expected = entries_of(start, split.inputs)
            gaps.append((entries_of(tt, split.inputs) - expected).abs().max().item())
            sizes.append(expected.abs().max().item())
        self.trace.facts["w0_gap"] = max(gaps)
        if max(gaps) > 1e3 * torch.finfo(tt.dtype).eps * max(sizes):
            raise ConfigError(
                f"{self.spec.method} does not hold the common initial weight: off by "
                f"{max(gaps):.1e}"
            )

    @torch.no_grad()
    def _record(self) -> None:
        tt, effort = self._latest, self.effort
        assert tt is not None
        assert effort.residual is not None
        # Plain factors are no frames, and their singular values have to be found.
        plain = self.spec.parameterization == "factors"
        framed = orthogonalize(tt.left, tt.bond, tt.right) if plain else tt
        val = self.problem.splits.val
        outputs = entries_of(tt, val.inputs)
        self.trace.add(
            {"matrix": framed.singular_values()[:MAX_SINGULAR_VALUES].tolist()},
            epoch=None,
            iteration=effort.iterations,
            evaluations=effort.evaluations,
            seconds=self._seconds,
            train_loss=effort.residual**2,
            val_loss=relative_square(outputs, val.targets).item(),
            val_metric=relative_error(outputs, val.targets),
            drift=None if plain else float(tt.to(dtype=torch.float64).orthonormality_error()),
            lr=None,
        )
        self._recorded = effort.iterations

    def _clock(self) -> float:
        if self.problem.start.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()
