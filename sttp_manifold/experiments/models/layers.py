"""Which layers of a model the methods act on."""

from __future__ import annotations

from torch import nn

__all__ = ["weights"]


def weights(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of a stock model whose weights a method may hold another way, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    }
