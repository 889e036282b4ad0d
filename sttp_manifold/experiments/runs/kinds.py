"""The kinds of runs, one row each."""

from __future__ import annotations

from sttp_manifold.experiments.runs.adapt import AdaptiveRun
from sttp_manifold.experiments.runs.contract import Run
from sttp_manifold.experiments.runs.gan import GanRun
from sttp_manifold.experiments.runs.solve import SolverRun
from sttp_manifold.experiments.runs.train import TrainingRun

__all__ = ["RUNS"]

RUNS: dict[str, type[Run]] = {
    TrainingRun.kind: TrainingRun,
    AdaptiveRun.kind: AdaptiveRun,
    SolverRun.kind: SolverRun,
    GanRun.kind: GanRun,
}
"""Kind of run to its class; a method names its kind, see :class:`Method`."""
