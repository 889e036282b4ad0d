"""Where updates can be put in a network: beside layers, and behind tensors of modules that stay."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from sttp_manifold.errors import ConversionError
from sttp_manifold.nn.adapted import Adapted
from sttp_manifold.nn.adapted_layer import AdaptedLayer
from sttp_manifold.nn.adapted_tensor import adapted_in
from sttp_manifold.nn.held import held_in, held_order
from sttp_manifold.nn.layer import SpectralLayer
from sttp_manifold.nn.spectral_update import place_in, view_for
from sttp_manifold.nn.stack import MatrixView
from sttp_manifold.nn.stock import readings, row_of

__all__ = ["Place", "adapted_of", "place_at", "places"]


@dataclass(frozen=True)
class Place:
    """A layer, or a tensor of a module that keeps its forward.

    Args:
        module: the layer, an :class:`AdaptedLayer` around it, or the module.
        tensor: name of the tensor; None for a layer.
    """

    module: nn.Module
    tensor: str | None = None

    @property
    def adapted(self) -> Adapted | None:
        """What holds updates there; None if there are none."""
        if self.tensor is not None:
            return adapted_in(self.module).get(self.tensor)
        return self.module if isinstance(self.module, AdaptedLayer) else None

    @property
    def view(self) -> MatrixView:
        """How the tensor is read as matrices.

        Raises:
            ConversionError: a layer, or a tensor, that no update is for.
        """
        if (adapted := self.adapted) is not None:
            return adapted.view
        if self.tensor is None:
            return view_for(self.module)
        if self.tensor in (held := held_in(self.module)):
            return held[self.tensor].view
        known = readings(self.module)
        if self.tensor in known:
            return known[self.tensor][1]
        return MatrixView(tuple(self._parameter().shape))

    @property
    def where(self) -> tuple[torch.dtype, torch.device]:
        """Dtype and device of the tensor."""
        if (adapted := self.adapted) is not None:
            return adapted.place
        if self.tensor is None:
            return place_in(self.module)
        held = held_in(self.module).get(self.tensor)
        tensor = self._parameter() if held is None else held.weight
        return tensor.dtype, tensor.device

    def _parameter(self) -> nn.Parameter:
        assert self.tensor is not None
        parameter = self.module._parameters.get(self.tensor)
        if not isinstance(parameter, nn.Parameter) or parameter.ndim < 2:
            raise ConversionError(
                f"the {self.tensor} of a {type(self.module).__name__} is no matrix that a "
                "spectral update could be added to"
            )
        return parameter


def places(model: nn.Module) -> dict[Place, str]:
    """All places of a network that have updates or can have them, by first names.

    Layers have the names of their modules, tensors their own: ``"encoder.0.query"``,
    ``"self_attn.in_proj_weight"``.
    """
    found: dict[Place, str] = {}
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in inside:
            continue
        if isinstance(module, AdaptedLayer):
            inside.update(module.modules())
        if _is_layer(module):
            found[Place(module)] = name
            continue
        for tensor in _tensors(module):
            found[Place(module, tensor)] = f"{name}.{tensor}".removeprefix(".")
        inside.update(inner for ours in adapted_in(module).values() for inner in ours.modules())
    return found


def _is_layer(module: nn.Module) -> bool:
    """Whether updates are applied beside a module: it is in the table with one weight."""
    if isinstance(module, AdaptedLayer):
        return True
    if isinstance(module, SpectralLayer):
        return list(module.holds) == ["weight"]
    row = row_of(module)
    return row is not None and row.spectral is not None and list(row.spectral.holds) == ["weight"]


def _tensors(module: nn.Module) -> list[str]:
    """Tensors of a module that stays which are matrices, in the order of its parameters."""
    row = row_of(module)
    stock = readings(module) if row is not None and row.spectral is None else {}
    names = {*adapted_in(module), *held_in(module), *stock}
    order = [*held_order(module), *module._parameters]
    return sorted(names, key=order.index)


def place_at(model: nn.Module, name: str) -> Place:
    """The place of a name in a network.

    Raises:
        ConversionError: no module of that name, or one that no update is for.
    """
    for at, tensor in ((name, None), (name.rpartition(".")[0], name.rpartition(".")[2])):
        try:
            module = model.get_submodule(at)
        except AttributeError:
            continue
        place = Place(module, tensor)
        if tensor is None and not _is_layer(module):
            kind = type(module).__name__
            raise ConversionError(
                f"a {kind} can have no update; load it into the network that it was trained for"
            )
        if tensor is None or tensor in _tensors(module) or tensor in module._parameters:
            return place
    raise ConversionError(
        "the adapter has an update for a layer that the network has not; load it into the network "
        "that it was trained for"
    )


def adapted_of(model: nn.Module) -> dict[str, Adapted]:
    """Everything in a network that has updates, by first names."""
    return dict(_adapted(model))


def _adapted(model: nn.Module) -> Iterator[tuple[str, Adapted]]:
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLayer):
            yield name, module
        for tensor, adapted in adapted_in(module).items():
            yield f"{name}.{tensor}".removeprefix("."), adapted
