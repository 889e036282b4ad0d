"""Walks over networks: names, owners of parameters, replacement of modules at all their places."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sttp_manifold.errors import ConversionError, SttpError
from sttp_manifold.nn.references import loose, stale, swapped, tensors_in
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
    """Who holds each tensor of a network, registered by torch or not.

    Args:
        model: the network.
    """

    def __init__(self, model: nn.Module) -> None:
        self._names = {module: name for name, module in model.named_modules()}
        self._held: dict[int, list[tuple[tuple[nn.Module, str], Tensor]]] = {}
        for module in self._names:
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None and not nn.parameter.is_lazy(tensor):
                    self._held.setdefault(_storage(tensor), []).append(((module, name), tensor))
            for name, value in loose(module):
                for tensor in tensors_in(value):
                    self._held.setdefault(_storage(tensor), []).append(((module, name), tensor))

    def of(self, tensor: Tensor) -> list[tuple[nn.Module, str]]:
        """Modules that hold a tensor, or another in its memory as a transposed view or a part."""
        span = _span(tensor)
        return [
            owner
            for owner, other in self._held.get(_storage(tensor), ())
            if other is tensor or _overlap(span, _span(other))
        ]

    def name(self, owner: tuple[nn.Module, str]) -> str:
        """Qualified name of a parameter at one of its holders."""
        module, name = owner
        return f"{self._names[module]}.{name}".removeprefix(".")


def _storage(tensor: Tensor) -> int:
    """Address of a tensor's memory; of one without, that of the object."""
    if tensor.layout != torch.strided or not tensor.numel() or not has_values(tensor):
        return id(tensor)
    return tensor.untyped_storage().data_ptr()


def _span(tensor: Tensor) -> range | None:
    """Bytes of the memory from a tensor's first element to its last."""
    if tensor.layout != torch.strided or not tensor.numel():
        return None
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = tensor.storage_offset() + sum((size - 1) * step for size, step in steps)
    size = tensor.element_size()
    return range(tensor.storage_offset() * size, (last + 1) * size)


def _overlap(a: range | None, b: range | None) -> bool:
    return a is not None and b is not None and a.start < b.stop and b.start < a.stop
