"""One run, of whatever kind: what planning, execution, checkpoints and reading ask of it.

A kind is one file with one class, and one row of
:data:`~sttp_manifold.experiments.runs.kinds.RUNS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch

from sttp_manifold.experiments.runs.trace import Trace
from sttp_manifold.experiments.specs import RunSpec
from sttp_manifold.experiments.task import Task

__all__ = ["Run"]


class Run(ABC):
    """State of one run while it goes on.

    :meth:`begin` once, :meth:`advance` until it says that nothing is left, :meth:`end` once. What
    it has to tell so far is always in :attr:`trace`: a run that diverges or fails leaves that.

    Attributes:
        kind: what records say in their field ``run``.
        command: of ``sttp``, that repeats it.
        reads: what records of this kind are read for, the record's field ``reads``: ``score``
            (ranked by the metric at the end), ``curves`` (drawn against epochs), ``effort`` (judged
            by what it took to reach the target), ``gan`` (images and spectra, against steps).
        options: the settings that it heeds, each a field of the specification, with the option of
            the command line.
        spec: what is to be done.
        task: what on.
        trace: what is recorded.
        examples: sizes of the splits.
    """

    kind: ClassVar[str]
    command: ClassVar[str] = "compare"
    reads: ClassVar[tuple[str, ...]]
    options: ClassVar[Mapping[str, str]]

    def __init__(self, spec: RunSpec, task: Task) -> None:
        self.spec, self.task = spec, task
        self.trace = Trace()
        self.examples = {"train": 0, "val": 0, "test": 0}

    @classmethod
    @abstractmethod
    def of(cls, spec: RunSpec, task: Task, method: Any, data_dir: Path | None) -> Run:
        """The run of a specification; nothing is computed yet.

        Args:
            spec: what is to be done.
            task: what on.
            method: of the kind that takes this kind of run.
            data_dir: folder of the task's files.
        """

    @classmethod
    @abstractmethod
    def spec_fields(
        cls, task: Task, method: Any, lr: float | None, given: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Fields of the specification that are this kind's own, and decide its numbers.

        Args:
            task: whose defaults count where nothing is given.
            method: of the kind that takes this kind of run.
            lr: learning rate, if there is one.
            given: settings by name, those of :attr:`options` among them.
        """

    @classmethod
    def rates(cls, task: Task, method: Any) -> tuple[float, ...]:
        """The learning rates that a method's is chosen from.

        Args:
            task: its grid is the one of all methods, unless a kind of run has another.
            method: of the kind that takes this kind of run.
        """
        return task.lrs

    @classmethod
    def rank_of(cls, method: Any, rank: int, given: Mapping[str, Any]) -> int:
        """The rank of the specification; 0 where none of its numbers depend on a rank.

        Such a run is done once for all ranks of a comparison, and read at each of them.

        Args:
            method: of the kind that takes this kind of run.
            rank: one of the comparison.
            given: settings by name.
        """
        return rank

    @property
    def progress(self) -> tuple[int, int] | None:
        """Steps done and in all, while the run goes on; None where they are not known."""
        return None

    @abstractmethod
    def begin(self, device: torch.device, dtype: torch.dtype) -> None:
        """Make everything that moves, at the common start.

        Args:
            device: where to compute.
            dtype: what in.

        Raises:
            ConfigError: the method does not hold the common start.
        """

    @abstractmethod
    def advance(self) -> bool:
        """Do the next piece; whether there is more to do.

        Raises:
            DivergedError: a number that matters is not finite.
        """

    @abstractmethod
    def end(self) -> dict[str, float]:
        """Look at the test split, once and never when tuning; the numbers of the end."""

    def products(self) -> dict[str, bytes]:
        """Files that it leaves beside its record, by name, once it has ended well."""
        return {}

    def state_dict(self) -> dict[str, Any] | None:
        """All that :meth:`advance` goes on from, for a checkpoint; None where a run is not cut.

        Tensors, numbers, texts, lists and dictionaries of these, and nothing else.
        """
        return None

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave, after :meth:`begin`.

        Args:
            state: of a run of the same specification.
        """
        raise NotImplementedError(f"{type(self).__name__} has no state to go on from")
