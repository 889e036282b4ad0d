"""Images for generators: in [-1, 1], where their last layer ends, at the size of a network."""

from __future__ import annotations

import functools
from pathlib import Path

from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate, pad

from sttp_manifold.errors import ConfigError
from sttp_manifold.experiments.data import Examples, Splits, fashion_mnist
from sttp_manifold.experiments.image_sets import image_splits

__all__ = ["fashion_images", "named_images", "resized"]

# How the task of classification scales its pixels.
_MEAN, _DEVIATION = 0.2860, 0.3530


def resized(images: Tensor, size: int) -> Tensor:
    """Images at another size: padded with black to a multiple and averaged, or interpolated.

    Shape:
        - images: ``(n, channels, h, h)``, in [-1, 1]
        - output: ``(n, channels, size, size)``

    Raises:
        ConfigError: images that are not square.
    """
    height, width = images.shape[-2:]
    if height != width:
        raise ConfigError(f"images of {height} x {width} pixels; expected square ones")
    if height == size:
        return images
    # 28 pixels become 32, and these 16: no pixel is interpolated.
    padded = 1 << (height - 1).bit_length()
    if padded % size == 0 and padded - height <= height // 4:
        margin = padded - height
        images = pad(images, (margin // 2, margin - margin // 2) * 2, value=-1.0)
        return avg_pool2d(images, padded // size) if padded > size else images
    out: Tensor = interpolate(
        images, size=(size, size), mode="bilinear", antialias=True, align_corners=False
    )
    return out.clamp(-1, 1)


@functools.cache
def fashion_images(size: int, root: Path | None = None) -> Splits:
    """Fashion-MNIST as images between -1 and 1.

    Args:
        size: height and width: 28, or 32 by a black margin, or 16 by the mean of four of those.
        root: folder of the four files, see :func:`~sttp_manifold.experiments.data.fashion_mnist`.

    Shape:
        inputs: (n, 1, size, size)

    Raises:
        ConfigError: the files are not there.
    """
    splits = fashion_mnist(root)

    def images(examples: Examples) -> Examples:
        pixels = (examples.inputs * _DEVIATION + _MEAN) * 2 - 1
        return Examples(resized(pixels.clamp(-1, 1), size), examples.targets)

    return Splits(images(splits.train), images(splits.val), images(splits.test))


@functools.cache
def named_images(source: str, size: int, root: Path | None = None) -> Splits:
    """An image set of Hugging Face as images between -1 and 1.

    Args:
        source: name of a data set there, or a folder.
        size: height and width that images are brought to.
        root: folder to read in place of that name.

    Shape:
        inputs: (n, 1 or 3, size, size)

    Raises:
        ConfigError: as :func:`~sttp_manifold.experiments.image_sets.image_splits`.
    """
    sets = image_splits(source, root, size=size)
    parts = (sets[name] for name in ("train", "val", "test"))
    return Splits(*(Examples(part.images.float() / 127.5 - 1, part.labels) for part in parts))
