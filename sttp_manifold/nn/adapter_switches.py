"""Which adapters of a network act: chosen by name, merged into the weights, taken away."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from sttp_manifold._arguments import explained
from sttp_manifold.errors import ConversionError
from sttp_manifold.nn.adapted import Adapted
from sttp_manifold.nn.adapted_layer import AdaptedLayer
from sttp_manifold.nn.adapted_tensor import leave_tensors
from sttp_manifold.nn.adapter_places import adapted_of
from sttp_manifold.nn.modules import Owners, naming, replace, show
from sttp_manifold.nn.together import together as compute_together
from sttp_manifold.nn.weight import SpectralWeight

__all__ = [
    "adapters",
    "merge",
    "remove_adapter",
    "set_adapter",
    "unmerge",
    "without_adapters",
]


def _known(model: nn.Module, names: str | Iterable[str] | None) -> tuple[str, ...]:
    """Names of adapters, each checked."""
    there = adapters(model)
    if not there:
        raise ConversionError("the network has no adapters; adapt(model, rank=8) adds one")
    several = (names,) if isinstance(names, str) else tuple(names or ())
    for name in several:
        if name not in there:
            raise ConversionError(
                f"there is no adapter {name!r}; the network has {', '.join(map(repr, there))}"
            )
    return tuple(dict.fromkeys(several))


@explained
def adapters(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Adapters of a network by name, each with the names of its layers and tensors.

    Args:
        model: any network.
    """
    found: dict[str, list[str]] = {}
    for at, layer in adapted_of(model).items():
        for name in layer.updates:
            found.setdefault(name, []).append(at)
    return {name: tuple(layers) for name, layers in found.items()}


@explained
def set_adapter(model: nn.Module, names: str | Iterable[str] | None) -> nn.Module:
    """Choose which adapters a network adds: one, several, or none.

    Those that are added are trained, the parameters of the others are frozen.

    Args:
        model: the network.
        names: of the adapters; None or an empty list for none.

    Returns:
        The model.

    Raises:
        ConversionError: an unknown name, or an adapter that is merged and is to be left out.
    """
    chosen = _known(model, names)
    layers = adapted_of(model)
    for at, layer in layers.items():
        for name in layer.merged:
            if name not in chosen:
                raise ConversionError(
                    f"{name!r} is merged into the weight of {show(at)}; unmerge(model) first"
                )
    for layer in layers.values():
        layer.active = tuple(name for name in chosen if name in layer.updates)
        for name, update in layer.updates.items():
            update.requires_grad_(name in chosen)
    return model


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[nn.Module]:
    """The network as it was before its adapters, for the time of a block.

    Args:
        model: the network.

    Yields:
        The model.

    Raises:
        ConversionError: no adapters, or some that are merged.

    Example:
        >>> from sttp_manifold.nn import adapt
        >>> model = adapt(nn.Sequential(nn.Linear(8, 6)), rank=2)
        >>> with without_adapters(model):
        ...     y = model(torch.randn(3, 8))
    """
    _known(model, ())
    layers = adapted_of(model)
    if any(layer.merged for layer in layers.values()):
        raise ConversionError("adapters are merged into the weights; unmerge(model) first")
    before = {layer: layer.active for layer in layers.values()}
    try:
        for layer in before:
            layer.active = ()
        yield model
    finally:
        for layer, active in before.items():
            layer.active = active


@explained
@torch.no_grad()
def merge(model: nn.Module, names: str | Iterable[str] | None = None) -> nn.Module:
    """Add adapters to the weights of their layers, so that a forward costs what it did before them.

    The sum is computed in float32 at least and rounded to the dtype of the weight once. Updates
    stay where they are and are not added twice; :func:`unmerge` takes back what was added, and
    :func:`remove_adapter` leaves stock layers with the sum. If a layer fails, nothing has changed.

    Args:
        model: the network.
        names: of the adapters; by default those that are active.

    Returns:
        The model.

    Raises:
        ConversionError: an unknown name or no adapter, a weight that is shared with another module
            or is spectral itself, or a sum that is not finite in the dtype of the weight.
    """
    layers, owners = adapted_of(model), Owners(model)
    chosen = None if names is None else _known(model, names)
    _known(model, ())
    done: list[tuple[Adapted, str]] = []
    try:
        for at, layer in layers.items():
            with naming(at):
                for name in layer.active if chosen is None else chosen:
                    if name in layer.updates and name not in layer.merged:
                        _check_alone(layer, owners)
                        layer.put(name, layer.fold(name), 1)
                        done.append((layer, name))
    except ConversionError:
        for layer, name in reversed(done):
            layer.put(name, layer.fold(name, -1), -1)
        raise
    for layer in layers.values():  # what is merged acts, whether it was active or not
        layer.active = tuple(dict.fromkeys((*layer.active, *layer.merged)))
    return model


def _check_alone(adapted: Adapted, owners: Owners) -> None:
    module, name = adapted.owner
    weight = module._parameters.get(name)
    others = [] if weight is None else owners.of(weight)
    others = [owner for owner in others if owner != adapted.owner]
    if others:
        is_layer = isinstance(adapted, AdaptedLayer)
        own = "layer.base.weight" if is_layer else "module.parametrizations[name][0].base"
        raise ConversionError(
            f"its weight is shared with {', '.join(map(owners.name, others))}, which would change "
            f"as well; give it one of its own first: {own} = torch.nn.Parameter("
            f"{own}.detach().clone())"
        )


@explained
@torch.no_grad()
def unmerge(model: nn.Module) -> nn.Module:
    """Take back what :func:`merge` has added, to the rounding of the weights' dtype.

    Args:
        model: the network.

    Returns:
        The model.

    Raises:
        ConversionError: no adapters.
    """
    _known(model, ())
    for at, layer in adapted_of(model).items():
        with naming(at):
            for name in reversed(layer.merged):
                layer.put(name, layer.fold(name, -1), -1)
    return model


@explained
def remove_adapter(model: nn.Module, names: str | Iterable[str] | None = None) -> nn.Module:
    """Take adapters away; a layer without any is the layer again that it was before.

    What is merged stays in the weights. Parameters that were frozen stay so.

    Args:
        model: the network.
        names: of the adapters; by default all.

    Returns:
        The model; the layer if the model itself is an adapted one.

    Raises:
        ConversionError: an unknown name or no adapters.
    """
    chosen = _known(model, tuple(adapters(model)) if names is None else names)
    new: dict[nn.Module, nn.Module] = {}
    for layer in adapted_of(model).values():
        for name in chosen:
            if name in layer.updates:
                layer.drop(name)
        if isinstance(layer, AdaptedLayer) and not layer.updates:
            new[layer] = layer.base
    plain = replace(model, new)
    for module in list(plain.modules()):
        leave_tensors(module)
    if not any(isinstance(module, SpectralWeight) for module in plain.modules()):
        compute_together(plain, False)
    return plain
