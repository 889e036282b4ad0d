"""A task that takes a fraction of a second, for tests that train."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from sttp_manifold.experiments.data import Examples, Splits
from sttp_manifold.experiments.tasks import TASKS, Task


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
