"""pymanopt's solvers behind `minimize`: the same record, limits and counts."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from sttp_manifold.errors import ManifoldError
from sttp_manifold.manifolds.pymanopt import PointCache, make_problem, to_pymanopt
from sttp_manifold.optim._objective import Iterate, Objective, Status, Stopped
from sttp_manifold.optim._options import PymanoptOptions

__all__ = ["run_pymanopt"]

_NEVER = 10**9


def run_pymanopt(solver: str) -> Callable[[Objective, Iterate, PymanoptOptions], None]:
    """A method of `minimize` that drives the solver of this name."""

    def run(objective: Objective, at: Iterate, options: PymanoptOptions) -> None:
        if solver == "SteepestDescent" and options.preconditioner is not None:
            raise ManifoldError(
                "pymanopt's SteepestDescent takes no preconditioner; call "
                "minimize(..., method='steepest_descent', options={'preconditioner': ...})"
            )
        x, limits = at.x, objective.limits
        given = None if options.preconditioner is None else options.precondition
        if given is not None:
            options.check_definite(float(objective.inner(x, at.gradient, given(x, at.gradient))))
        theirs = to_pymanopt(
            objective.manifold, size=tuple(x.shape), dtype=x.dtype, device=x.device
        )
        watched = _Watched(theirs, objective, at, curvature=solver == "TrustRegions")
        problem = make_problem(theirs, watched, given)
        optimizers = importlib.import_module("pymanopt.optimizers")
        # Its own limits are out of the way, save those that end a search without an iterate.
        most = _NEVER if limits.iterations is None else limits.iterations + 1
        arguments: dict[str, Any] = {
            "max_time": math.inf,
            "max_iterations": most,
            "min_gradient_norm": 0.0,
            "min_step_size": 1e-300,
            "max_cost_evaluations": _NEVER,
            "verbosity": 0,
            **options.solver,
        }
        # Where an inner iteration has solved its system exactly, pymanopt divides zero by zero.
        with np.errstate(divide="ignore", invalid="ignore"):
            outcome = getattr(optimizers, solver)(**arguments).run(
                problem, initial_point=theirs.array(x), **options.run
            )
        why = outcome.stopping_criterion
        ended = Status.ITERATIONS if "max iterations" in why else Status.STALLED
        raise Stopped(ended, f"pymanopt: {why}")

    return run


class _Watched(PointCache):
    """Records an iterate where a gradient is asked for: pymanopt does so at iterates only."""

    def __init__(
        self, theirs: Any, objective: Objective, start: Iterate, *, curvature: bool
    ) -> None:
        super().__init__(theirs, objective.cost, curvature=curvature)
        self.hold(theirs.array(start.x), start.evaluation)
        self._objective = objective
        self._recorded = start.evaluation
        self._length = 0.0
        retraction = theirs.retraction

        def retract(point: Any, vector: Any) -> Any:
            self._length = theirs.norm(point, vector)
            return retraction(point, vector)

        theirs.retraction = retract

    def gradient_at(self, point: Any) -> Any:
        evaluation = self.at(point)
        if evaluation is not self._recorded:
            self._recorded = evaluation
            new = self._objective.iterate(evaluation)
            if not (math.isfinite(new.value) and math.isfinite(new.grad_norm)):
                raise Stopped(
                    Status.STALLED, "pymanopt stepped to where the cost or gradient is not finite"
                )
            self._objective.record(new, self._length)
        return evaluation.gradient()
