"""The dense parameter that takes a spectral weight's place, and whether it may."""

from __future__ import annotations

import torch
from torch import nn

from sttp_manifold.nn.carry import check_bare, check_weight, mark_like
from sttp_manifold.nn.methods import plain_weight, weight_class
from sttp_manifold.nn.stack import MatrixView, WeightStack
from sttp_manifold.nn.weight import SpectralWeight

__all__ = ["check_replaceable", "dense_parameter"]


@torch.no_grad()
def dense_parameter(held: SpectralWeight | WeightStack, view: MatrixView) -> nn.Parameter:
    """The dense parameter of a stock layer, frozen if no parameter of the weights is trainable."""
    dense = view.joined(held()).detach().clone()
    parameter = nn.Parameter(dense.contiguous(), requires_grad=held.trainable)
    mark_like(held.parameters(), [parameter])
    return parameter


def check_replaceable(weight: SpectralWeight) -> None:
    """Raise unless nothing is lost where a dense parameter takes a weight's place.

    Raises:
        ConversionError: something that would be.
    """
    plain = plain_weight(weight)
    check_weight(weight, weight_class(weight.method), plain)
    check_bare(weight, plain)
