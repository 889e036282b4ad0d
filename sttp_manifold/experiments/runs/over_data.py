"""What runs that go through a task's data have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sttp_manifold.experiments.data import Splits
from sttp_manifold.experiments.runs.contract import Run
from sttp_manifold.experiments.specs import RunSpec
from sttp_manifold.experiments.task import Task

__all__ = ["RunOverData"]


class RunOverData(Run):
    """A run that goes through three splits, and counts its steps' seconds.

    Args:
        spec: of the run.
        task: with data.
        method: of the kind that takes this kind of run.
        splits: what it goes through.
    """

    def __init__(self, spec: RunSpec, task: Task, method: Any, splits: Splits) -> None:
        super().__init__(spec, task)
        self.method, self.splits = method, splits
        self.examples = {name: len(getattr(splits, name)) for name in ("train", "val", "test")}
        self.elapsed = 0.0

    @classmethod
    def of(cls, spec: RunSpec, task: Task, method: Any, data_dir: Path | None) -> RunOverData:
        """See :meth:`Run.of`.

        Raises:
            ConfigError: the task's data is not there.
        """
        assert task.load is not None
        return cls(spec, task, method, task.load(data_dir))
