"""Solving: a problem is taken whole, until its target is reached or its budget spent."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sttp_manifold.experiments.data import Examples, Splits
from sttp_manifold.experiments.problems import entries_of
from sttp_manifold.experiments.runs.trace import Trace
from sttp_manifold.experiments.runs.watch import Spent, Watch
from sttp_manifold.experiments.specs import RunSpec
from sttp_manifold.experiments.task import Problem, Task, relative_square

__all__ = ["Solve", "Solver", "SolverRun"]

Solve = Callable[[Problem, Watch], str]
"""Works on a problem under a watch, which stops it; if it ends by itself, it says why."""


@dataclass(frozen=True)
class Solver:
    """A geometry (or none) and an algorithm on it.

    Attributes:
        name: what a user types.
        summary: one line for people.
        parameterization: ``fixed-rank``, ``product``, ``householder`` or ``factors``.
        optimizer: ``cg``, ``tr``, ``lbfgs`` or ``adam``.
        spectrum: how singular values are held; None where they are not.
        solve: runs under a watch, and says why it stopped where the watch did not stop it.
        untuned_lr: the learning rate where a task has none tuned; None where there is none.
        svdp_only: whether it knows one mode a side only.
        requires: a package that is not always there.
        cpu_only: whether it computes outside of torch.
    """

    name: str
    summary: str
    parameterization: str
    optimizer: str
    spectrum: str | None
    solve: Solve
    untuned_lr: float | None = None
    svdp_only: bool = False
    requires: str | None = None
    cpu_only: bool = False

    momentum = None
    trains = False

    def applies_to(self, task: Task) -> bool:
        """Whether a task has a problem of the kind that this solves."""
        return task.problem is not None and (not self.svdp_only or task.kind == "svdp")

    @property
    def is_available(self) -> bool:
        """Whether the package that it requires is installed."""
        return self.requires is None or importlib.util.find_spec(self.requires) is not None


class SolverRun:
    """State of one run of a solver while it goes on, as that of a training run."""

    def __init__(self, spec: RunSpec, task: Task, solver: Solver) -> None:
        self.spec, self.task, self.solver = spec, task, solver
        self.trace = Trace()
        self.examples = {"train": 0, "val": 0, "test": 0}

    def run(self, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
        """Solve and evaluate; the numbers of the end.

        Args:
            device: where to compute.
            dtype: what in.

        Raises:
            DivergedError: the residual stopped being finite.
        """
        spec = self.spec
        assert self.task.problem is not None
        drawn = self.task.problem(self.task, spec.rank, spec.seed)
        shape = drawn.start.shape
        self.examples = {
            name: len(getattr(drawn.splits, name)) for name in ("train", "val", "test")
        }
        self.trace.facts = {
            "dimension": shape.dim("free"),
            "dense_elements": shape.numel,
            "other_parameters": 0,
            "w0_digest": drawn.digest,
        }
        problem = _moved(drawn, device, dtype)
        watch = Watch(spec, problem, self.trace)
        try:
            message = self.solver.solve(problem, watch)
        except Spent as spent:
            message = str(spent)
        end = watch.finish(message)
        val_metric = self.trace.curves["val_metric"][-1]
        if spec.purpose == "tune":
            return {"val_metric": val_metric}
        test = problem.splits.test
        with torch.no_grad():
            outputs = entries_of(end, test.inputs)
        return {
            "val_metric": val_metric,
            "test_loss": relative_square(outputs, test.targets).item(),
            "test_metric": self.task.score(outputs, test.targets),
        }


def _moved(problem: Problem, device: torch.device, dtype: torch.dtype) -> Problem:
    def moved(examples: Examples) -> Examples:
        return examples.to(device, dtype)

    splits = problem.splits
    return Problem(
        problem.start.to(device=device, dtype=dtype),
        Splits(moved(splits.train), moved(splits.val), moved(splits.test)),
        problem.digest,
    )
