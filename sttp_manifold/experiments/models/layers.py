"""Which layers of a model the methods act on, and the sizes of their weights."""

from __future__ import annotations

from torch import nn

from sttp_manifold.nn.stock import row_of

__all__ = ["weight_sizes", "weights"]


def weights(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of a stock model whose weights a method may hold another way, by name."""
    return {name: module for name, module in model.named_modules() if row_of(module) is not None}


def weight_sizes(model: nn.Module) -> list[tuple[int, ...]]:
    """Sizes of the weights of :func:`weights`, in the order of the model.

    Example:
        >>> weight_sizes(nn.Sequential(nn.Conv2d(3, 8, 5), nn.ReLU(), nn.Conv2d(8, 4, 1)))
        [(8, 3, 5, 5), (4, 8, 1, 1)]
    """
    found = (layer.get_parameter("weight") for layer in weights(model).values())
    return [tuple(weight.shape) for weight in found]
