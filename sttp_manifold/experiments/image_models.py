"""Networks of a task's images: by name, for as many channels and classes as the images have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from sttp_manifold.errors import ConfigError
from sttp_manifold.experiments.data import Splits
from sttp_manifold.experiments.models import classifier
from sttp_manifold.experiments.task import Task

__all__ = ["ImageModel", "with_model"]


@dataclass(frozen=True)
class ImageModel:
    """A :func:`~sttp_manifold.experiments.models.classifier` for the images that ``load`` gives.

    Attributes:
        name: of the network, ``resnet-D`` or ``wrn-D-K``.
        load: gives the splits, from a folder where it reads one.
        root: that folder.
    """

    name: str
    load: Callable[[Path | None], Splits]
    root: Path | None = None

    def __call__(self) -> nn.Module:
        """The network, with its own initialization.

        Raises:
            ConfigError: an unknown name, or inputs that are no images.
        """
        train = self.load(self.root).train
        if train.inputs.ndim != 4:
            raise ConfigError(
                f"--model {self.name}: expected a task of images, as fashion-mnist; inputs of this "
                f"one are {' x '.join(map(str, train.inputs.shape[1:]))}"
            )
        classes = int(train.targets.max()) + 1
        return classifier(self.name, channels=train.inputs.shape[1], classes=classes)


def with_model(task: Task, name: str | None, root: Path | None) -> Task:
    """The task with another network.

    Args:
        task: one of images.
        name: of a :func:`~sttp_manifold.experiments.models.classifier`; None keeps the task's own.
        root: folder of the task's files, which a network is fitted to.

    Raises:
        ConfigError: the task trains nothing.
    """
    if isinstance(task.model, ImageModel):
        return replace(task, model=replace(task.model, name=name or task.model.name, root=root))
    if name is None:
        return task
    if task.load is None:
        raise ConfigError(f"--model {name}: the task {task.name!r} trains no network")
    return replace(task, model=ImageModel(name, task.load, root))
