"""Recurrent layers whose matrices are formed from spectral weights: what torch keeps beside them.

An ``nn.RNNBase`` (LSTM, GRU, RNN) hands its kernels a list of tensors that it fills when it is
made, and on CUDA lays them in one buffer for cuDNN. Formed tensors live for one forward, so that
here the list is made at each reading.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from sttp_manifold.nn.stack import MatrixView

__all__ = ["MEMBERS", "adopt", "part_with", "views"]


def views(module: nn.Module) -> dict[str, MatrixView]:
    """The matrices of a recurrent layer or cell: the gates below each other are one matrix.

    They read one input, and at a rank share what they take from it, as in the low-rank LSTMs of
    Prabhavalkar et al., *On the compression of recurrent neural networks*, 2016.
    """
    return {
        name: MatrixView(tuple(p.shape))
        for name, p in module._parameters.items()
        if name.startswith("weight_") and p is not None and p.ndim == 2
    }


def adopt(module: nn.Module) -> None:
    """Make the list of a layer one that is made at each reading; it has its class already."""
    module.__dict__.pop("_flat_weights", None)
    module._init_flat_weights()  # type: ignore[operator]


def part_with(module: nn.Module) -> None:
    """Give a layer, that has its own class and parameters again, a list of them."""
    module._init_flat_weights()  # type: ignore[operator]


def _flat(module: nn.RNNBase) -> list[Tensor | None]:
    weights = [getattr(module, name, None) for name in module._flat_weights_names]
    if torch.compiler.is_compiling() or not all(_is_on_cuda(w) for w in weights):
        return weights
    return _in_one_buffer(module, weights)


def _is_on_cuda(weight: object) -> bool:
    return isinstance(weight, Tensor) and weight.is_cuda


def _in_one_buffer(module: nn.RNNBase, weights: list[Any]) -> list[Any]:
    """Copies that lie as cuDNN wants them, with the gradients of the originals."""
    if torch.is_grad_enabled() and any(w.requires_grad for w in weights):
        return list(_InOneBuffer.apply(module, *weights))  # type: ignore[no-untyped-call]
    return _laid_out(module, weights)


def _laid_out(module: nn.RNNBase, weights: Sequence[Tensor]) -> list[Tensor]:
    """Copies in one buffer, by torch's own code, which looks at nothing but such attributes."""
    with torch.no_grad():
        copies = [w.detach().clone(memory_format=torch.contiguous_format) for w in weights]
    settings = {**module.__dict__, "_flat_weights": copies}
    nn.RNNBase.flatten_parameters(SimpleNamespace(**settings))  # type: ignore[arg-type]
    return copies


class _InOneBuffer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, module: nn.RNNBase, *weights: Tensor) -> tuple[Tensor, ...]:
        return tuple(_laid_out(module, weights))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, *gradients)


def _forget(module: nn.RNNBase) -> None:
    """Torch compares these with the tensors of a forward: nothing is the same tensor as before."""
    dead = weakref.ref(torch.empty(0))
    module._flat_weight_refs = [dead for _ in module._flat_weights_names]  # type: ignore[misc]


MEMBERS: dict[str, Any] = {
    # What torch assigns is dropped: the list follows by itself.
    "_flat_weights": property(_flat, lambda module, value: None),
    "_init_flat_weights": _forget,
    "_update_flat_weights": lambda module: None,
    "flatten_parameters": lambda module: None,
}
"""Members of the class of a layer with spectral weights."""
