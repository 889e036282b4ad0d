"""What a method is to a comparison: a name, and words for the record.

A *method* is an entry of a comparison. Its kinds are told apart by the kind of run that they take:
a :class:`~sttp_manifold.experiments.trainers.Trainer` trains, a
:class:`~sttp_manifold.experiments.runs.solve.Solver` solves.
"""

from __future__ import annotations

from typing import Protocol

from sttp_manifold.experiments.task import Task

__all__ = ["Method"]


class Method(Protocol):
    """What planning, records and lists ask of every method."""

    @property
    def name(self) -> str:
        """What a user types."""
        ...

    @property
    def summary(self) -> str:
        """One line for people."""
        ...

    @property
    def run(self) -> str:
        """Kind of run that it takes: a key of ``RUNS``, and a field of every record."""
        ...

    @property
    def parameterization(self) -> str:
        """How a weight is held."""
        ...

    @property
    def optimizer(self) -> str:
        """What moves it."""
        ...

    @property
    def momentum(self) -> float | None:
        """Momentum of SGD and Muon; None for all others."""
        ...

    @property
    def untuned_lr(self) -> float | None:
        """The learning rate where a task has none tuned; None where there is none."""
        ...

    @property
    def largest_lr(self) -> float:
        """Beyond it there is no learning rate."""
        ...

    @property
    def requires(self) -> str | None:
        """A package that is not always there."""
        ...

    @property
    def is_available(self) -> bool:
        """Whether that package is installed."""
        ...

    @property
    def cpu_only(self) -> bool:
        """Whether it computes outside of torch."""
        ...

    def applies_to(self, task: Task) -> bool:
        """Whether a task has what it takes."""
        ...
