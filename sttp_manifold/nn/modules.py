"""Walks over networks: names, owners of parameters, replacement of modules at all their places."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from sttp_manifold.errors import ConversionError, SttpError

__all__ = ["Owners", "carry_over", "naming", "replace", "show"]

# Where torch keeps the hooks that users register on a module.
_HOOKS = (
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks",
    "_forward_hooks_always_called",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_is_full_backward_hook",
)


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


def carry_over(old: nn.Module, new: nn.Module) -> nn.Module:
    """Give a module the training mode and the hooks of the one it replaces."""
    for name in _HOOKS:
        if name in old.__dict__:
            new.__dict__[name] = old.__dict__[name]
    return new.train(old.training)


def replace(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Replace modules in place at every name they have; the root is returned instead."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in new:
                parent._modules[name] = new[child]
    return new.get(model, model)


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
                if parameter.numel() and not parameter.is_meta:
                    place = (parameter.data_ptr(), parameter.numel())
                    self._by_memory.setdefault(place, set()).add(parameter)

    def of(self, parameter: Tensor) -> list[tuple[nn.Module, str]]:
        """Modules that hold a parameter, with its name there."""
        return self._by_parameter[parameter]

    def aliases(self, parameter: Tensor) -> list[tuple[nn.Module, str]]:
        """Holders of other parameters in the same memory, such as a transposed view."""
        same = self._by_memory.get((parameter.data_ptr(), parameter.numel()), set())
        return [owner for other in same if other is not parameter for owner in self.of(other)]

    def name(self, owner: tuple[nn.Module, str]) -> str:
        """Qualified name of a parameter at one of its holders."""
        module, name = owner
        return f"{self._names[module]}.{name}".removeprefix(".")
