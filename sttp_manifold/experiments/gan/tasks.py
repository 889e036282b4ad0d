"""The tasks of ``sttp gan``: images, and the networks that their size asks for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from sttp_manifold.errors import ConfigError
from sttp_manifold.experiments.data import Splits
from sttp_manifold.experiments.gan.images import fashion_images, named_images
from sttp_manifold.experiments.image_sets import CIFAR10, PREFIX, STL10, parse_source
from sttp_manifold.experiments.task import Metric, Task

__all__ = ["FRECHET", "GAN_PREFIX", "GAN_TASKS", "gan_task_of"]

FRECHET = Metric("Fréchet distance", "", higher=False, log=False, spec=".2f")
"""Of features of the task's own classifier: not FID."""

GAN_PREFIX = f"gan-{PREFIX}"

_DRAWS = "the initial weights of both networks, the order of images and the noise"
_SIZES = (16, 28, 32, 48)


def _no_score(outputs: Tensor, targets: Tensor) -> float:
    raise NotImplementedError("images are judged as sets, by the run")


def _task(name: str, summary: str, size: int, load: Callable[[Path | None], Splits]) -> Task:
    return Task(
        name=name,
        summary=summary,
        data=1,
        load=load,
        model=None,
        loss=nn.functional.cross_entropy,
        metric=FRECHET,
        score=_no_score,
        ranks=(16,),
        epochs=None,
        batch_size=None,
        seed_draws=_DRAWS,
        gan={"size": size},
    )


def _fashion(size: int) -> Task:
    return _task(
        f"gan-fashion-mnist-{size}",
        f"images of clothes, {size} x {size} (Fashion-MNIST, IDX files), from noise",
        size,
        functools.partial(fashion_images, size),
    )


def _named(name: str, source: str, size: int) -> Task:
    return _task(
        name,
        f"images of the data set {source} (Hugging Face), {size} x {size}, from noise",
        size,
        functools.partial(named_images, source, size),
    )


def gan_task_of(name: str) -> Task:
    """The task of a name that begins with :data:`GAN_PREFIX`: ``gan-hf:NAME@SIZE``.

    Raises:
        ConfigError: no size, or one that there are no networks for.
    """
    source, size = parse_source(name.removeprefix(GAN_PREFIX))
    if size not in _SIZES:
        sizes = ", ".join(map(str, _SIZES))
        raise ConfigError(
            f"task {name!r}: expected the size of the images behind it, one of {sizes}, as in "
            f"{GAN_PREFIX}{source}@32"
        )
    return _named(name, source, size)


GAN_TASKS = (
    *map(_fashion, (16, 28, 32)),
    _named("gan-cifar10", CIFAR10, 32),
    _named("gan-stl10", STL10, 48),
)
