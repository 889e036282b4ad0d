"""Walks over networks: names, owners of parameters, replacement of modules at all their places."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, ValuesView
from contextlib import contextmanager
from types import MethodType

from torch import Tensor, nn

from sttp_manifold.errors import ConversionError, SttpError
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

    Attributes that torch does not register are followed as well: the module itself, its bound
    methods, and lists, tuples and dicts of them.
    """
    for parent in (*model.modules(), *new.values()):
        for name, child in parent._modules.items():
            if child is not None and child in new:
                parent._modules[name] = new[child]
        for name, value in _loose(parent):
            found = _replaced(value, new)
            if found is not value:
                parent.__dict__[name] = found
    return new.get(model, model)


# What every module has.
_OWN = frozenset(nn.Module().__dict__)


def _loose(module: nn.Module) -> list[tuple[str, object]]:
    """Attributes of a module that torch does not register."""
    return [(name, value) for name, value in module.__dict__.items() if name not in _OWN]


def _replaced(value: object, new: Mapping[nn.Module, nn.Module]) -> object:
    if isinstance(value, nn.Module):
        return new.get(value, value)
    if isinstance(value, MethodType) and isinstance(value.__self__, nn.Module):
        owner = value.__self__
        return getattr(new[owner], value.__name__, value) if owner in new else value
    if type(value) is list and any(item is not _replaced(item, new) for item in value):
        value[:] = [_replaced(item, new) for item in value]
    elif type(value) is dict:
        value.update({key: _replaced(item, new) for key, item in value.items()})
    elif type(value) is tuple:
        items = tuple(_replaced(item, new) for item in value)
        return items if any(a is not b for a, b in zip(items, value, strict=True)) else value
    return value


def _parameters_in(value: object) -> list[nn.Parameter]:
    """Parameters that an attribute is, or that its list, tuple or dict holds."""
    items = value.values() if isinstance(value, dict) else value
    items = items if isinstance(items, (list, tuple, ValuesView)) else [items]
    return [item for item in items if isinstance(item, nn.Parameter)]


class Owners:
    """Who holds each parameter of a network.

    Args:
        model: the network.
    """

    def __init__(self, model: nn.Module) -> None:
        self._by_parameter: dict[Tensor, list[tuple[nn.Module, str]]] = {}
        self._by_memory: dict[tuple[int, int], set[Tensor]] = {}
        self._names = {module: name for name, module in model.named_modules()}
        for module in self._names:
            for name, parameter in module._parameters.items():
                if parameter is None or nn.parameter.is_lazy(parameter):
                    continue
                self._by_parameter.setdefault(parameter, []).append((module, name))
                if parameter.numel() and has_values(parameter):
                    place = (parameter.data_ptr(), parameter.numel())
                    self._by_memory.setdefault(place, set()).add(parameter)
        for module in self._names:
            for name, value in _loose(module):
                for parameter in _parameters_in(value):
                    if parameter in self._by_parameter:
                        self._by_parameter[parameter].append((module, name))

    def of(self, parameter: Tensor) -> list[tuple[nn.Module, str]]:
        """Modules that hold a parameter, with its name there."""
        return self._by_parameter[parameter]

    def aliases(self, parameter: Tensor) -> list[tuple[nn.Module, str]]:
        """Holders of other parameters in the same memory, such as a transposed view."""
        if not has_values(parameter):
            return []
        same = self._by_memory.get((parameter.data_ptr(), parameter.numel()), set())
        return [owner for other in same if other is not parameter for owner in self.of(other)]

    def name(self, owner: tuple[nn.Module, str]) -> str:
        """Qualified name of a parameter at one of its holders."""
        module, name = owner
        return f"{self._names[module]}.{name}".removeprefix(".")
