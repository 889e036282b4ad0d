"""Which layers of a network are meant: as for `compress`, and by the ends of names as well."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias

from torch import nn

from sttp_manifold.errors import ConversionError
from sttp_manifold.nn.choose import Choice, chosen, own_tensors

__all__ = ["Targets", "layers_meant"]

Targets: TypeAlias = "Choice | None"

_SHOWN = 20


def layers_meant(
    model: nn.Module, targets: Targets, may: Callable[[nn.Module], bool]
) -> dict[nn.Module, str]:
    """Layers that targets name, with their first names.

    Args:
        model: the network.
        targets: what is meant, as for :func:`sttp_manifold.nn.choose.chosen`, where a string also
            means the modules whose qualified name ends with it after a dot; None for all layers.
        may: whether a module is a layer that can be meant.

    Raises:
        ConversionError: a target that means no layer, or no layers at all.
    """
    layers = {module: name for name, module in model.named_modules() if may(module)}
    if not layers:
        whole = _whole(model.modules())
        raise ConversionError(f"the network has no layer of the table, such as nn.Linear{whole}")
    if targets is None:
        return layers
    several = [targets] if isinstance(targets, str) or callable(targets) else list(targets)
    if not several:
        raise ConversionError("targets is empty; name layers, as in targets=['query', 'value']")
    meant: set[nn.Module] = set()
    for target in several:
        named = chosen(model, "targets", [target], ends=True)
        found = named & layers.keys()
        if not found:
            shown = [repr(name) for name in layers.values()][:_SHOWN]
            more = " and more" if len(layers) > _SHOWN else ""
            whole = _whole(m for m in model.modules() if m in named)
            raise ConversionError(
                f"targets has {target!r}, which means no layer of this network; it has "
                f"{', '.join(shown)}{more}{whole}"
            )
        meant |= found
    return {module: name for module, name in layers.items() if module in meant}


def _whole(modules: Iterable[nn.Module]) -> str:
    """What to do about modules that compute with matrices of their own."""
    module = next((m for m in modules if any(p.ndim > 1 for p in own_tensors(m))), None)
    if module is None:
        return ""
    tensor = next(key for key, p in module._parameters.items() if p is not None and p.ndim > 1)
    return (
        f". A {type(module).__name__} computes with its {tensor} itself, and nothing can be added "
        "beside it: train it as it is, by module.requires_grad_() after adapt(model, ...) of other "
        "layers, or compress(model, rank) it"
    )
