"""The tasks, and the one place where a new one is registered.

A task is data with fixed splits, a model, a loss and a metric, for the methods that train; or a
problem, for those that solve; or both. To add one::

    TASKS.add(Task(
        name="my-task", summary="…", data=1, load=my_splits, model=my_model,
        loss=nn.functional.cross_entropy, metric=ACCURACY, score=accuracy,
        ranks=(4, 8), epochs=20, batch_size=64,
    ))

A name that begins with ``hf:`` is a task as it stands: ``hf:NAME`` or ``hf:FOLDER``, with ``@SIZE``
where images have several sizes; ``gan-hf:NAME@SIZE`` is one for ``sttp gan``.
"""

from __future__ import annotations

import functools

from torch import nn

from sttp_manifold.experiments import models
from sttp_manifold.experiments.data import completion, digits, fashion_mnist
from sttp_manifold.experiments.gan.tasks import GAN_PREFIX, GAN_TASKS, gan_task_of
from sttp_manifold.experiments.image_models import ImageModel
from sttp_manifold.experiments.image_sets import CIFAR10, PREFIX, STL10, parse_source, scaled_splits
from sttp_manifold.experiments.problems import matrix_problem, network_problem, tensor_problem
from sttp_manifold.experiments.registry import Registry
from sttp_manifold.experiments.task import (
    ACCURACY,
    RELATIVE_ERROR,
    Budget,
    Task,
    accuracy,
    relative_error,
    relative_square,
)

__all__ = ["TASKS", "Tasks", "image_task"]

_PROBLEM_DRAWS = "the weight to find, the places that are seen and the start"


def image_task(name: str, source: str, size: int | None, summary: str) -> Task:
    """A task of any image classification set of Hugging Face.

    Args:
        name: what a user types.
        source: name of the data set, or a folder.
        size: bring all images to squares of so many pixels.
        summary: one line for people.
    """
    load = functools.partial(scaled_splits, source, size)
    return Task(
        name=name,
        summary=summary,
        data=1,
        load=load,
        model=ImageModel("resnet-20", load),
        loss=nn.functional.cross_entropy,
        metric=ACCURACY,
        score=accuracy,
        ranks=(4, 8, 16, 32),
        epochs=20,
        batch_size=128,
    )


class Tasks(Registry[Task]):
    """The tasks by name, and those that are named by the data set that they are made of."""

    def __getitem__(self, name: str) -> Task:
        if name not in self and name.startswith(GAN_PREFIX):
            return gan_task_of(name)
        if name in self or not name.startswith(PREFIX):
            return super().__getitem__(name)
        source, size = parse_source(name.removeprefix(PREFIX))
        at = "" if size is None else f", {size} x {size}"
        return image_task(name, source, size, f"images of the data set {source}{at}; a ResNet-20")


TASKS: Registry[Task] = Tasks("task")

TASKS.add(
    Task(
        name="digits",
        summary="1,797 images of digits, 8 x 8 (scikit-learn); a 64-128-64-10 network",
        data=1,
        load=digits,
        model=models.digits_mlp,
        loss=nn.functional.cross_entropy,
        metric=ACCURACY,
        score=accuracy,
        ranks=(4, 8),
        epochs=20,
        batch_size=64,
        # A run is a second.
        seeds=tuple(range(10)),
    )
)

TASKS.add(
    Task(
        name="fashion-mnist",
        summary="70,000 images of clothes, 28 x 28 (IDX files); two convolutions, two linear",
        data=1,
        load=fashion_mnist,
        model=models.fashion_convnet,
        loss=nn.functional.cross_entropy,
        metric=ACCURACY,
        score=accuracy,
        ranks=(4, 8),
        epochs=3,
        batch_size=128,
    )
)

TASKS.add(
    image_task(
        "cifar10", CIFAR10, None, "60,000 colour images, 32 x 32 (Hugging Face); a ResNet-20"
    )
)

TASKS.add(
    image_task(
        "stl10", STL10, 48, "13,000 colour images, 48 x 48 (Hugging Face, 96 x 96); a ResNet-20"
    )
)

TASKS.add(
    Task(
        name="completion",
        summary="a 64 x 60 matrix of TT rank 4, recovered from a quarter of its entries",
        data=1,
        load=completion,
        model=functools.partial(models.EntryModel, 64, 60),
        loss=relative_square,
        metric=RELATIVE_ERROR,
        score=relative_error,
        ranks=(4, 6),
        epochs=40,
        batch_size=None,
        repeats=20,
        dtype="float64",
        lrs=(1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0, 30.0),
        problem=network_problem,
        budget=Budget(),
    )
)

TASKS.add(
    Task(
        name="completion-tensor",
        summary="a tensor of nine modes of 4, recovered from a tenth of its entries",
        data=1,
        load=None,
        model=None,
        loss=relative_square,
        metric=RELATIVE_ERROR,
        score=relative_error,
        ranks=(4, 7, 10),
        epochs=None,
        batch_size=None,
        dtype="float64",
        lrs=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
        problem=tensor_problem,
        budget=Budget(),
        seed_draws=_PROBLEM_DRAWS,
    )
)

TASKS.add(
    Task(
        name="completion-matrix",
        summary="a 1000 x 1000 matrix, recovered from five times as many entries as dimensions",
        data=1,
        load=None,
        model=None,
        loss=relative_square,
        metric=RELATIVE_ERROR,
        score=relative_error,
        ranks=(5, 10),
        epochs=None,
        batch_size=None,
        dtype="float64",
        lrs=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
        problem=matrix_problem,
        kind="svdp",
        budget=Budget(),
        seed_draws=_PROBLEM_DRAWS,
    )
)

for _task in GAN_TASKS:
    TASKS.add(_task)
