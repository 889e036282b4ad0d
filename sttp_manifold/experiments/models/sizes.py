"""Checks of sizes that the networks share.

Those of a forward are leaves to ``torch.fx``, which does not trace conditions on tensors; the
modules that call them say so by ``torch.fx.wrap``.
"""

from __future__ import annotations

from torch import Tensor

from sttp_manifold.errors import ConfigError, ShapeError
from sttp_manifold.tt.factors import positive_integer

__all__ = ["check_images", "check_sizes", "check_vectors"]


def check_sizes(example: str, **sizes: int) -> None:
    """Check that sizes of a network are positive integers.

    Args:
        example: a call that works.
        sizes: the sizes by their names.

    Raises:
        ConfigError: one of them is not.
    """
    for name, value in sizes.items():
        try:
            positive_integer(value, name)
        except ShapeError as error:
            raise ConfigError(f"{error}; as in {example}") from None


def check_images(x: Tensor, channels: int, multiple: int = 1) -> None:
    """Check a batch of images before the first convolution.

    Args:
        x: the images.
        channels: the channels that the network was made for.
        multiple: by what it divides height and width.

    Shape:
        - x: ``(n, channels, height, width)``

    Raises:
        ShapeError: another number of dimensions or of channels, or a height or width that is no
            multiple of ``multiple``.
    """
    if x.ndim != 4 or x.shape[1] != channels:
        raise ShapeError(
            f"this network was made with channels={channels} and takes images of shape "
            f"(n, {channels}, height, width), got {tuple(x.shape)}"
        )
    height, width = x.shape[2:]
    if height < 1 or width < 1 or height % multiple or width % multiple:
        raise ShapeError(
            f"this network takes images whose height and width are multiples of {multiple}, "
            f"got {height} x {width}"
        )


def check_vectors(z: Tensor, length: int) -> None:
    """Check a batch of vectors before the first linear layer.

    Shape:
        - z: ``(n, length)``

    Raises:
        ShapeError: another number of dimensions, or another length.
    """
    if z.ndim != 2 or z.shape[1] != length:
        raise ShapeError(
            f"the generator takes vectors of shape (n, {length}), got {tuple(z.shape)}"
        )
