"""What a run leaves behind: curves, spectra, facts, and what it cost to reach its target."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from sttp_manifold.experiments.records import CURVES, EFFORT

__all__ = ["MAX_SINGULAR_VALUES", "DivergedError", "Effort", "Trace"]

# Of a layer, in a record.
MAX_SINGULAR_VALUES = 64


class DivergedError(Exception):
    """A run whose numbers stopped being numbers. Its text is the record's reason."""


@dataclass
class Effort:
    """What a run has spent so far, and when it reached the target.

    Attributes:
        target: relative residual on the observed entries that is to be reached.
        residual: the last one known.
        iterations: iterations done.
        evaluations: calls of the cost function.
        gradients: gradients computed.
        hessian_products: products of the Hessian and a vector computed.
        stopped: why the run ended.
        reached: iterations, evaluations and seconds at the first iterate that met the target.
    """

    target: float
    residual: float | None = None
    iterations: int = 0
    evaluations: int = 0
    gradients: int = 0
    hessian_products: int = 0
    stopped: str | None = None
    reached: tuple[int, int, float] | None = None

    def see(self, residual: float, seconds: float) -> bool:
        """Take note of an iterate; whether it is the first to meet the target."""
        self.residual = residual
        first = self.reached is None and residual <= self.target
        if first:
            self.reached = (self.iterations, self.evaluations, seconds)
        return first

    def to_dict(self) -> dict[str, Any]:
        """As records hold it."""
        iterations, evaluations, seconds = self.reached or (None, None, None)
        values = {
            "iterations_to_target": iterations,
            "evaluations_to_target": evaluations,
            "seconds_to_target": seconds,
        }
        return {name: values[name] if name in values else getattr(self, name) for name in EFFORT}


@dataclass
class Trace:
    """What a run has to tell so far. A run that stops early leaves what it has."""

    curves: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in CURVES})
    spectra: dict[str, list[list[float]]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    effort: Effort | None = None

    def state_dict(self) -> dict[str, Any]:
        """All of it, for a checkpoint."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What :meth:`state_dict` gave.

        Args:
            state: of a trace of the same run.
        """
        self.curves, self.spectra, self.facts = state["curves"], state["spectra"], state["facts"]
        self.effort = None if state["effort"] is None else Effort(**state["effort"])

    def add(self, spectra: dict[str, list[float]], **values: Any) -> None:
        """Add an entry to every curve, those of one kind of run too, and to every spectrum."""
        for name in CURVES:
            self.curves[name].append(values.pop(name))
        for name, value in values.items():
            self.curves.setdefault(name, []).append(value)
        for name, s in spectra.items():
            self.spectra.setdefault(name, []).append(s)
