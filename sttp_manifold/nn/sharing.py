"""Whether stock layers can express how spectral weights are shared."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from sttp_manifold.errors import ConversionError
from sttp_manifold.nn.held import held_in
from sttp_manifold.nn.layer import SpectralLayer
from sttp_manifold.nn.modules import show
from sttp_manifold.nn.stack import MatrixView, parts_of
from sttp_manifold.nn.weight import SpectralWeight
from sttp_manifold.nn.weights_of import held_of, views_of

__all__ = ["check_sharing"]


def check_sharing(model: nn.Module, layers: Mapping[nn.Module, str]) -> None:
    """Raise for weights whose sharing stock layers cannot express.

    Args:
        model: the network.
        layers: its modules that hold spectral weights, with their names.

    Raises:
        ConversionError: such weights, by the names of the layers.
    """
    readings: dict[nn.Module, tuple[str, MatrixView]] = {}
    places: dict[SpectralWeight, tuple[nn.Module, str]] = {}
    holders: set[nn.Module] = set(layers)
    alone: dict[nn.Module, str] = {}
    for layer, name in layers.items():
        views = views_of(layer)
        holders |= {*held_in(layer).values(), *held_of(layer).values()}
        for key, held in held_of(layer).items():
            first, view = readings.setdefault(held, (name, views[key]))
            if view.shape != views[key].shape:
                _refuse(name, first, f"in two shapes, {views[key].shape} and {view.shape}")
            if view != views[key]:
                _refuse(name, first, "in two ways, one the transpose of the other")
            if isinstance(layer, SpectralLayer) and layer._is_alone:
                alone[held] = name
            if held in alone and first != name:
                raise ConversionError(
                    f"{show(name)} and {show(first)} share a weight, and the row for padding of "
                    f"{show(alone[held])} is not that of the weight, which one stock table cannot "
                    "hold; set its padding_row = None to have there the row of the weight",
                    layer=name,
                )
            parts = parts_of(held)
            for weight in parts:
                place, first = places.setdefault(weight, (held, name))
                if place is not held or len(set(parts)) < len(parts):
                    _refuse(name, first, "as a part of another")
    for name, module in model.named_modules():
        if module in holders:
            continue
        for child in module._modules.values():
            if isinstance(child, SpectralWeight) and child in places:
                raise ConversionError(
                    f"{show(name)} shares the weight of {show(places[child][1])} and is no layer "
                    "of this package; give it a weight of its own",
                    layer=name,
                )


def _refuse(name: str, first: str, how: str) -> None:
    raise ConversionError(
        f"{show(name)} and {show(first)} share a weight that stock layers would hold {how}; give "
        "one of them a weight of its own",
        layer=name,
    )
