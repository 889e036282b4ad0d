"""Two thin stock layers in the place of a spectral one: `decompress(form="factors")`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from sttp_manifold.nn.carry import mark_like
from sttp_manifold.nn.layer import SpectralLayer
from sttp_manifold.nn.modules import naming
from sttp_manifold.nn.weights_of import held_of

__all__ = ["thin_pairs"]


def thin_pairs(
    layers: Mapping[SpectralLayer, str], others: Iterable[nn.Module]
) -> dict[SpectralLayer, nn.Sequential]:
    """Two thin layers for each layer; none for those that share a weight with one that stays.

    Args:
        layers: the layers, each with its name.
        others: all modules that hold spectral weights.

    Raises:
        ConversionError: as for :meth:`SpectralLayer.dense_layer`.
    """
    found: dict[SpectralLayer, nn.Sequential] = {}
    for layer, name in layers.items():
        with naming(name):
            two = _pair(layer)
        if two is not None:
            found[layer] = two
    dense = {held for m in others if m not in found for held in held_of(m).values()}
    return {k: two for k, two in found.items() if dense.isdisjoint(held_of(k).values())}


@torch.inference_mode(False)
@torch.no_grad()
def _pair(layer: SpectralLayer) -> nn.Sequential | None:
    """Two stock layers that apply the factors one after the other, without bias.

    None where that is not cheaper than the dense layer, by multiplications (which for these layers
    are as the numbers stored), or where two layers cannot hold what hangs on this one: submodules,
    or a bias that is no parameter.
    """
    layer.check_goes()
    stock, pair = layer._stock(), layer._thin()
    plain = layer._kind()._around(stock, layer.held)
    if (
        pair is None
        or _numbers(pair) >= _numbers(stock)
        or ("bias" in plain._parameters and "bias" not in layer._parameters)
        or layer._modules.keys() != plain._modules.keys()
    ):
        return None
    weight = layer.spectral_weight
    factors = layer._thin_factors(*weight.factors())
    for half, factor in zip(pair, factors, strict=True):
        thin = factor.detach().clone().reshape(half._parameters["weight"].shape)  # type: ignore[union-attr]
        half.weight = nn.Parameter(thin, requires_grad=weight.trainable)
    mark_like(weight.parameters(), pair.parameters())
    return pair


def _numbers(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
