"""Images of a run: how many of them, how large, and moved and mirrored while it trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from sttp_manifold.errors import ConfigError
from sttp_manifold.experiments.data import Examples, Splits

__all__ = ["crop_and_flip", "draw_crops", "first_of", "of_size"]

_BORDER = 4


def draw_crops(count: int, generator: torch.Generator) -> Tensor:
    """Places of windows and whether they are mirrored, one line an image.

    Shape:
        - output: ``(count, 3)``: down, right, mirrored
    """
    places = torch.randint(2 * _BORDER + 1, (count, 2), generator=generator)
    return torch.cat((places, torch.randint(2, (count, 1), generator=generator)), dim=1)


def crop_and_flip(images: Tensor, draws: Tensor) -> Tensor:
    """A window of each image, as large as the image, which has a border of four zeros; mirrored.

    Args:
        images: a batch.
        draws: of :func:`draw_crops`.

    Shape:
        - images: ``(n, channels, height, width)``
        - draws: ``(n, 3)``
        - output: ``(n, channels, height, width)``

    References:
        He, Zhang, Ren & Sun, *Deep residual learning for image recognition*, 2016, Sec. 4.2.
    """
    height, width = images.shape[-2:]
    down, right, mirrored = draws.to(images.device).unbind(1)
    rows = down[:, None] + torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device).expand(len(images), -1)
    columns = torch.where(mirrored[:, None] > 0, width - 1 - columns, columns) + right[:, None]
    framed = pad(images, (_BORDER,) * 4).permute(0, 2, 3, 1)
    batch = torch.arange(len(images), device=images.device)[:, None, None]
    return framed[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def of_size(splits: Splits, size: int) -> Splits:
    """Splits whose images are averaged down to squares of so many pixels.

    Raises:
        ConfigError: inputs that are no images, or smaller ones.
    """
    shape = splits.train.inputs.shape
    if len(shape) != 4 or min(shape[2:]) < size:
        raise ConfigError(
            f"--image-size {size}: expected images of at least as many pixels; inputs of this task "
            f"are {' x '.join(map(str, shape[1:]))}"
        )

    def small(part: Examples) -> Examples:
        return Examples(interpolate(part.inputs, (size, size), mode="area"), part.targets)

    return Splits(small(splits.train), small(splits.val), small(splits.test))


def first_of(splits: Splits, options: Mapping[str, Any]) -> Splits:
    """The first so many examples to train on and to validate on, which were put in random order.

    The test split stays whole.

    Args:
        splits: of a task.
        options: of a specification; ``train_examples`` and ``val_examples`` are looked at.

    Raises:
        ConfigError: there are not as many.
    """
    if not {"train_examples", "val_examples"} & set(options):
        return splits
    parts = {}
    for name in ("train", "val"):
        part: Examples = getattr(splits, name)
        count = options.get(f"{name}_examples")
        if count is not None and count > len(part):
            raise ConfigError(
                f"--{name}-examples {count}: the {name} split has {len(part):,}; expected that "
                "many or less"
            )
        parts[name] = part if count is None else part[torch.arange(count)]
    return Splits(parts["train"], parts["val"], splits.test)
