"""Counts of networks: what the compression ratio Z is made of."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["count_elements", "counted_tensors", "ratio"]

# Buffers that count as parts of a network; ``num_batches_tracked`` does not.
_STATISTICS = ("running_mean", "running_var")


def counted_tensors(module: nn.Module) -> list[Tensor]:
    """Parameters and running statistics that a module itself holds and that have a shape."""
    own: list[Any] = [*module._parameters.values()]
    own += [module._buffers.get(name) for name in _STATISTICS]
    return [t for t in own if t is not None and not nn.parameter.is_lazy(t)]


def count_elements(model: nn.Module) -> int:
    """Elements of a network's parameters and running statistics, each tensor once.

    What is not initialized yet counts as nothing.
    """
    buffers = [
        buffer for name, buffer in model.named_buffers() if name.rpartition(".")[2] in _STATISTICS
    ]
    tensors = (*model.parameters(), *buffers)
    return sum(tensor.numel() for tensor in tensors if not nn.parameter.is_lazy(tensor))


def ratio(parameters: int, dense: int) -> float:
    """``100 parameters / dense``; 100 for nothing at all."""
    return 100.0 * parameters / dense if dense else 100.0
