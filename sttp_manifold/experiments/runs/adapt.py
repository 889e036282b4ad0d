"""Training in which ranks change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sttp_manifold.experiments.distributed import wrapped
from sttp_manifold.experiments.rank_schedule import AdaptiveTrainer, plans_of, with_plans
from sttp_manifold.experiments.runs.train import TrainingRun
from sttp_manifold.experiments.specs import derived_seed
from sttp_manifold.experiments.task import Task
from sttp_manifold.nn import SpectralWeight
from sttp_manifold.optim import follow

__all__ = ["AdaptiveRun"]


class AdaptiveRun(TrainingRun):
    """A training whose ranks are raised before it and lowered between epochs.

    The optimizer follows. The curve ``dimension`` says what is left; the fields ``dimension`` and
    ``stored_parameters`` of the record are those of the end, and singular values that are gone are
    null.
    """

    kind = "adapt"
    method: AdaptiveTrainer

    @classmethod
    def spec_fields(
        cls, task: Task, method: Any, lr: float | None, given: Mapping[str, Any]
    ) -> dict[str, Any]:
        """See :meth:`Run.spec_fields`."""
        fields = super().spec_fields(task, method, lr, given)
        return {**fields, "rank_schedule": method.ranks.in_words}

    def begin(self, device: torch.device, dtype: torch.dtype) -> None:
        """See :meth:`Run.begin`.

        Args:
            device: where to compute.
            dtype: what in.

        Raises:
            ConfigError: the method does not hold the common initial weight.
            DivergedError: the loss is not finite at the start.
        """
        self.stage = 0
        super().begin(device, dtype)

    def advance(self) -> bool:
        """Lower the ranks where that is due, then as without.

        Raises:
            DivergedError: a loss is not finite.
        """
        assert self.spec.epochs is not None
        while self.stage < self.method.ranks.stage(self.epoch, self.spec.epochs):
            begin = self._clock()
            self.stage += 1
            self.method.ranks.lower(self.model, self.spec.rank, self.stage)
            follow(self.optimizer, self.model)
            self.forward = wrapped(self.model, self.device)
            self.elapsed += self._clock() - begin
            self._count_numbers(self.model)
        return super().advance()

    def state_dict(self) -> dict[str, Any]:
        """See :meth:`Run.state_dict`."""
        return {**super().state_dict(), "stage": self.stage, "plans": plans_of(self.model)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :meth:`Run.load_state_dict`.

        Args:
            state: of a run of the same specification.
        """
        assert self.spec.lr is not None
        self.stage = state["stage"]
        with_plans(self.model, state["plans"])
        self.forward = wrapped(self.model, self.device)
        self.optimizer = self.method.make_optimizer(self.model.parameters(), self.spec.lr)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, self.schedule.lr_lambdas[0]
        )
        super().load_state_dict(state)

    def _start(self) -> nn.Module:
        seed = derived_seed("ranks", self.spec.task, self.spec.seed)
        model = self.method.ranks.grow(super()._start(), self.spec.rank, seed)
        self._count_numbers(model)
        return model

    def _count_numbers(self, model: nn.Module) -> None:
        held = [m for m in model.modules() if isinstance(m, SpectralWeight)]
        stored = sum(p.numel() for weight in held for p in weight.parameters())
        dimension = sum(weight.shape.dim(weight.spectrum) for weight in held)
        self.trace.facts.update(stored_parameters=stored, dimension=dimension)

    def _observe(self, epoch: int, loss: float, lr: float) -> None:
        super()._observe(epoch, loss, lr)
        self.trace.curves.setdefault("dimension", []).append(self.trace.facts["dimension"])
        for entries in self.trace.spectra.values():
            entries[-1] = [*entries[-1], *[None] * (len(entries[0]) - len(entries[-1]))]  # type: ignore[list-item]
