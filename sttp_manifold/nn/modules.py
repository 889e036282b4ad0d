"""Walks over networks: names, owners of parameters, replacement of modules at all their places."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sttp_manifold.errors import ConversionError, SttpError
from sttp_manifold.nn.references import loose, parameters_in, stale, swapped
from sttp_manifold.nn.torch_state import has_values

__all__ = ["Owners", "naming", "replace", "show"]


def show(name: str) -> str:
    """A qualified name for people; the root module has an empty one."""
    return repr(name) if name else "the root module"


@contextmanager
def naming(layer: str) -> Iterator[None]:
    """Put the name of a layer in front of the message of any error of this package."""
    try:
        yield
    except SttpError as error:
        error.args = (f"{show(layer)}: {error}", *error.args[1:])
        if isinstance(error, ConversionError):
            error.layer = layer
        raise


def replace(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Replace modules in place at every name they have; the root is returned instead.

    Attributes that torch does not register are followed as well, see
    :mod:`sttp_manifold.nn.references`.

    Raises:
        ConversionError: a reference that cannot be followed, before anything has changed.
    """
    names = {module: name for name, module in model.named_modules()}
    for module, name in names.items():
        for attribute, found in stale(module, new):
            raise ConversionError(
                f"{attribute!r} of {show(name)} refers to the layer {show(names.get(found, '?'))} "
                "where that cannot be followed, as in a closure, a weak reference or an object of "
                "another class: it would go on computing with the old layer; refer to the layer by "
                "a registered name, or convert the network without it (skip=[its name])",
                layer=names.get(found, ""),
            )
        inner = module._modules.get("_orig_mod")
        if inner in new and type(module).__name__ == "OptimizedModule":
            raise ConversionError(
                f"torch.compile has compiled this layer, and would go on computing with the old "
                f"one: compile after the conversion (here {show(name)} is torch.compile's)",
                layer=name,
            )
    for parent in (*names, *new.values()):
        for name, child in parent._modules.items():
            if child is not None and child in new:
                parent._modules[name] = new[child]
        for name, value in loose(parent):
            other = swapped(value, new)
            if other is not value:
                parent.__dict__[name] = other
    return new.get(model, model)


class Owners:
    """Who holds each parameter of a network.

    Args:
        model: the network.
    """

    def __init__(self, model: nn.Module) -> None:
        self._by_parameter: dict[Tensor, list[tuple[nn.Module, str]]] = {}
        self._by_storage: dict[int, list[tuple[range, Tensor]]] = {}
        self._names = {module: name for name, module in model.named_modules()}
        for module in self._names:
            for name, parameter in module._parameters.items():
                if parameter is None or nn.parameter.is_lazy(parameter):
                    continue
                self._by_parameter.setdefault(parameter, []).append((module, name))
                if (place := _place(parameter)) is not None:
                    storage, span = place
                    self._by_storage.setdefault(storage, []).append((span, parameter))
        for module in self._names:
            for name, value in loose(module):
                for parameter in parameters_in(value):
                    if parameter in self._by_parameter:
                        self._by_parameter[parameter].append((module, name))

    def of(self, parameter: Tensor) -> list[tuple[nn.Module, str]]:
        """Modules that hold a parameter, with its name there."""
        return self._by_parameter[parameter]

    def aliases(self, parameter: Tensor) -> list[tuple[nn.Module, str]]:
        """Holders of other parameters in the same memory, such as a transposed view or a part."""
        place = _place(parameter)
        if place is None:
            return []
        storage, own = place
        same = {
            other
            for span, other in self._by_storage.get(storage, ())
            if span.start < own.stop and own.start < span.stop and other is not parameter
        }
        return [owner for other in same for owner in self.of(other)]

    def name(self, owner: tuple[nn.Module, str]) -> str:
        """Qualified name of a parameter at one of its holders."""
        module, name = owner
        return f"{self._names[module]}.{name}".removeprefix(".")


def _place(tensor: Tensor) -> tuple[int, range] | None:
    """Address of a tensor's storage and the bytes of it from the first to the last element."""
    if not tensor.numel() or tensor.layout != torch.strided or not has_values(tensor):
        return None
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = tensor.storage_offset() + sum((size - 1) * step for size, step in steps)
    size = tensor.element_size()
    storage = tensor.untyped_storage().data_ptr()
    return storage, range(tensor.storage_offset() * size, (last + 1) * size)
