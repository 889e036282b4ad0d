"""A task whose GAN trains in a second: three classes of bright corners, 16 x 16."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sttp_manifold.experiments.data import Examples, Splits
from sttp_manifold.experiments.task import Task
from sttp_manifold.experiments.tasks import TASKS

OPTIONS = {
    "steps": 6, "every": 3, "ngf": 4, "ndf": 4, "latent": 8, "batch_size": 8, "samples": 64,
    "classifier_epochs": 1,
}  # fmt: skip


def tiny_images(root: Path | None = None) -> Splits:
    generator = torch.Generator().manual_seed(3)
    targets = torch.randint(3, (240,), generator=generator)
    images = -1 + 0.2 * torch.rand(240, 1, 16, 16, generator=generator)
    for k, (row, column) in enumerate(((0, 0), (0, 8), (8, 8))):
        images[targets == k, :, row : row + 8, column : column + 8] += 1.5
    cuts = (slice(0, 96), slice(96, 168), slice(168, 240))
    return Splits(*(Examples(images[cut], targets[cut]) for cut in cuts))


def tiny_task() -> Task:
    return replace(
        TASKS["gan-fashion-mnist-16"], name="gan-tiny", summary="corners", load=tiny_images,
        ranks=(4,),
    )  # fmt: skip


@pytest.fixture
def gan_task(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Task:
    """The task ``gan-tiny``, registered for one test, with a cache of its own."""
    task = tiny_task()
    monkeypatch.setattr(TASKS, "_entries", {**TASKS._entries, task.name: task})
    monkeypatch.setenv("STTP_CACHE", str(tmp_path_factory.getbasetemp() / "gan-cache"))
    return task
