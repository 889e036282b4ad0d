"""Solving: a problem is taken whole, until its target is reached or its budget spent."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from sttp_manifold.experiments.data import Examples, Splits
from sttp_manifold.experiments.problems import entries_of
from sttp_manifold.experiments.runs.contract import Run
from sttp_manifold.experiments.runs.watch import Spent, Watch
from sttp_manifold.experiments.specs import RunSpec
from sttp_manifold.experiments.task import Budget, Problem, Task, relative_square

__all__ = ["Solve", "Solver", "SolverRun"]

Solve = Callable[[Problem, Watch], str | None]
"""Works on a problem under a watch, which stops it; if it ends by itself, it says why.

One that can be cut returns None soon after the watch says that it is due, with what it goes on from
as the watch's state, and begins there the next time."""


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

    run = "solve"
    momentum = None
    largest_lr = math.inf

    def applies_to(self, task: Task) -> bool:
        """Whether a task has a problem of the kind that this solves."""
        return task.problem is not None and (not self.svdp_only or task.kind == "svdp")

    @property
    def is_available(self) -> bool:
        """Whether the package that it requires is installed."""
        return self.requires is None or importlib.util.find_spec(self.requires) is not None


class SolverRun(Run):
    """A problem is solved, by a solver that can be cut in pieces of some seconds."""

    kind = "solve"
    reads = ("effort",)
    options: ClassVar[Mapping[str, str]] = {
        "max_evaluations": "--max-evaluations",
        "max_iterations": "--max-iterations",
        "max_seconds": "--max-seconds",
    }

    def __init__(self, spec: RunSpec, task: Task, solver: Solver) -> None:
        super().__init__(spec, task)
        self.solver = solver

    @classmethod
    def of(cls, spec: RunSpec, task: Task, method: Solver, data_dir: Path | None) -> SolverRun:
        """See :meth:`Run.of`."""
        return cls(spec, task, method)

    @classmethod
    def spec_fields(
        cls, task: Task, method: Solver, lr: float | None, given: Mapping[str, Any]
    ) -> dict[str, Any]:
        """See :meth:`Run.spec_fields`."""
        budget = task.budget or Budget()
        seconds = given.get("max_seconds")
        return {
            "kind": task.kind,
            "spectrum": method.spectrum,
            "schedule": None if lr is None else "cosine",
            "target": budget.target,
            "max_iterations": given.get("max_iterations"),
            "max_evaluations": given.get("max_evaluations") or budget.evaluations,
            "max_seconds": None if seconds is None else float(seconds),
        }

    def begin(self, device: torch.device, dtype: torch.dtype) -> None:
        """See :meth:`Run.begin`.

        Args:
            device: where to compute.
            dtype: what in.
        """
        assert self.task.problem is not None
        drawn = self.task.problem(self.task, self.spec.rank, self.spec.seed)
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
        self.problem = _moved(drawn, device, dtype)
        self.watch = Watch(self.spec, self.problem, self.trace)

    def advance(self) -> bool:
        """Solve for some seconds, or to the end; whether there is more to do.

        Raises:
            ConfigError: the solver does not hold the common start.
            DivergedError: the residual stopped being finite.
        """
        self.watch.go_on()
        try:
            message = self.solver.solve(self.problem, self.watch)
        except Spent as spent:
            message = str(spent)
        if message is None:
            return True
        self.found = self.watch.finish(message)
        return False

    def state_dict(self) -> dict[str, Any] | None:
        """See :meth:`Run.state_dict`."""
        return {"watch": self.watch.state_dict(), "trace": self.trace.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :meth:`Run.load_state_dict`.

        Args:
            state: of a run of the same specification.
        """
        self.trace.load_state_dict(state["trace"])
        self.watch.load_state_dict(state["watch"])

    def end(self) -> dict[str, float]:
        """See :meth:`Run.end`."""
        end = {"val_metric": self.trace.curves["val_metric"][-1]}
        if self.spec.purpose != "tune":
            test = self.problem.splits.test
            with torch.no_grad():
                outputs = entries_of(self.found, test.inputs)
            end["test_loss"] = relative_square(outputs, test.targets).item()
            end["test_metric"] = self.task.score(outputs, test.targets)
        return end


def _moved(problem: Problem, device: torch.device, dtype: torch.dtype) -> Problem:
    def moved(examples: Examples) -> Examples:
        return examples.to(device, dtype)

    splits = problem.splits
    return Problem(
        problem.start.to(device=device, dtype=dtype),
        Splits(moved(splits.train), moved(splits.val), moved(splits.test)),
        problem.digest,
    )
