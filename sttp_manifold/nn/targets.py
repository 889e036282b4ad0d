"""Which layers of a network are meant: by names, ends of names, wildcards, classes, predicates."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import nn

from sttp_manifold.errors import ConversionError

__all__ = ["Target", "Targets", "layers_meant"]

Target: TypeAlias = "str | type[nn.Module] | Callable[[str, nn.Module], bool]"
Targets: TypeAlias = "Target | Iterable[Target] | None"

_SHOWN = 20


def layers_meant(
    model: nn.Module, targets: Targets, may: Callable[[nn.Module], bool]
) -> dict[nn.Module, str]:
    """Layers that targets name, with their first names.

    A string means the modules whose qualified name is it, or ends with it after a dot, or fits it
    as a wildcard (``"encoder.*.query"``); a class those of that class; a callable those for which
    ``f(name, module)`` is true. Layers inside of a module that is meant are meant as well.

    Args:
        model: the network.
        targets: what is meant, one or several; None for all layers.
        may: whether a module is a layer that can be meant.

    Raises:
        ConversionError: a target that means no layer, or no layers at all.
    """
    names = {module: name for name, module in model.named_modules()}
    all_layers = {module: name for module, name in names.items() if may(module)}
    if not all_layers:
        raise ConversionError("the network has no layer of the table, such as nn.Linear")
    if targets is None:
        return all_layers
    several = (targets,) if isinstance(targets, str) or callable(targets) else tuple(targets)
    meant: set[nn.Module] = set()
    for target in several:
        found = {m for m, name in names.items() if _fits(target, name, m)}
        found = {inner for m in found for inner in m.modules() if inner in all_layers}
        if not found:
            shown = [repr(name) for name in all_layers.values()][:_SHOWN]
            more = " and more" if len(all_layers) > _SHOWN else ""
            raise ConversionError(
                f"targets has {target!r}, which means no layer of this network; it has "
                f"{', '.join(shown)}{more}"
            )
        meant |= found
    if not meant:
        raise ConversionError("targets is empty; name layers, as in targets=['query', 'value']")
    return {module: name for module, name in all_layers.items() if module in meant}


def _fits(target: Target, name: str, module: nn.Module) -> bool:
    if isinstance(target, str):
        return name == target or name.endswith(f".{target}") or fnmatchcase(name, target)
    if isinstance(target, type):
        return isinstance(module, target)
    if not callable(target):
        raise ConversionError(
            f"a target is a name, a class or a function of name and module, got {target!r}"
        )
    return bool(target(name, module))
