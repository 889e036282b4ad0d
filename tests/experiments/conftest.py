"""A task that takes a fraction of a second, for tests that train."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from sttp_manifold.experiments.data import Examples, Splits
from sttp_manifold.experiments.methods import METHODS
from sttp_manifold.experiments.problems import drawn_problem
from sttp_manifold.experiments.task import Problem, Task
from sttp_manifold.experiments.tasks import TASKS
from sttp_manifold.experiments.trainers import Trainer
from sttp_manifold.tt import TTShape

TRAINING = [method for method in METHODS if isinstance(method, Trainer)]


def tiny_splits(root: Path | None = None) -> Splits:
    """Three classes, by which of the first three coordinates is largest."""
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(96, 12, generator=generator)
    targets = inputs[:, :3].argmax(dim=1)
    cuts = (slice(0, 48), slice(48, 72), slice(72, 96))
    train, val, test = (Examples(inputs[cut], targets[cut]) for cut in cuts)
    return Splits(train, val, test)


def tiny_model() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Task:
    """The task ``tiny``, registered for one test."""
    task = replace(
        TASKS["digits"],
        name="tiny",
        summary="a tiny task",
        load=tiny_splits,
        model=tiny_model,
        ranks=(2,),
        epochs=2,
        batch_size=16,
        lrs=(1e-3, 1e-2),
    )
    entries = {**TASKS._entries, "tiny": task}
    monkeypatch.setattr(TASKS, "_entries", entries)
    return task


def tiny_problem(task: Task, rank: int, seed: int) -> Problem:
    """A 12 x 10 matrix, two thirds of it seen; a seed draws all of it."""
    shape = TTShape((3, 4), (2, 5), rank=rank)
    if task.kind == "svdp":
        shape = TTShape.svd(12, 10, rank=rank)
        seed += 1  # from seed 0 some solvers end in a local minimum
    return drawn_problem(task, shape, (84, 12, 24), seed)


@pytest.fixture(params=["sttp", "svdp"])
def puzzle(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Task:
    """The task ``puzzle``, a problem to solve and nothing to train, registered for one test."""
    task = replace(
        TASKS["completion-tensor"],
        name="puzzle",
        problem=tiny_problem,
        kind=request.param,
        ranks=(2,),
        lrs=(1e-2, 3e-2),
    )
    monkeypatch.setattr(TASKS, "_entries", {**TASKS._entries, "puzzle": task})
    return task
