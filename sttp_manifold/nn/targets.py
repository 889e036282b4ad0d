"""Which places of a network are meant: as for `compress`, by the ends of names, and by tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import nn
from torch.nn.utils import parametrize

from sttp_manifold.errors import ConversionError
from sttp_manifold.nn.adapted_layer import AdaptedLayer
from sttp_manifold.nn.adapter_places import Place, places
from sttp_manifold.nn.choose import Choice, chosen, own_tensors
from sttp_manifold.nn.held import BehindTensor
from sttp_manifold.nn.left import listed
from sttp_manifold.nn.modules import show
from sttp_manifold.nn.spectral_update import why_none_beside
from sttp_manifold.nn.weight import SpectralWeight

__all__ = ["Targets", "places_meant"]

Targets: TypeAlias = "Choice | None"

_SHOWN = 20


def places_meant(model: nn.Module, targets: Targets) -> tuple[dict[Place, str], list[str]]:
    """Places that targets mean, with their names, and why others are left.

    Args:
        model: the network.
        targets: what is meant, as for :func:`sttp_manifold.nn.choose.chosen`, where a string also
            means the modules, and the tensors, whose qualified name ends with it after a dot; None
            for all places that the table of layers knows and that can have an update.

    Returns:
        The places, and a sentence for each that None left out.

    Raises:
        ConversionError: a target that means no place, or no places at all.
    """
    known = places(model)
    if targets is None:
        if not known:
            raise ConversionError(
                f"the network has no layer of the table, such as nn.Linear{_whole(model.modules())}"
            )
        reasons = {place: why_none_beside(place.module) for place in known}
        left = [f"{show(known[place])}: {why}" for place, why in reasons.items() if why]
        if len(left) == len(known):
            raise ConversionError(
                f"no layer can have an update: {listed(left)}; adapt needs a layer such as "
                "nn.Linear beside them"
            )
        return {place: name for place, name in known.items() if not reasons[place]}, left
    several = [targets] if isinstance(targets, str) or callable(targets) else list(targets)
    if not several:
        raise ConversionError("targets is empty; name layers, as in targets=['query', 'value']")
    meant: dict[Place, str] = {}
    for target in several:
        meant |= _meant_by(model, target, known)
    order = [*known, *(place for place in meant if place not in known)]
    return {place: meant[place] for place in order if place in meant}, []


def _meant_by(model: nn.Module, target: object, known: Mapping[Place, str]) -> dict[Place, str]:
    found: dict[Place, str] = {}
    if isinstance(target, str):
        tensors = {place: name for place, name in known.items() if place.tensor is not None}
        found = {p: n for p, n in tensors.items() if _is_called(n, target)}
        found = found or {p: n for p, n in _other_matrices(model, known) if _is_called(n, target)}
    try:
        named = chosen(model, "targets", [target], ends=True)  # type: ignore[list-item]
    except ConversionError:
        if not found:
            raise
        named = set()
    found |= {place: name for place, name in known.items() if _module_of(place) in named}
    if not found:
        shown = [repr(name) for name in known.values()][:_SHOWN]
        has = f"; it has {', '.join(shown)}{' and more' if len(known) > _SHOWN else ''}"
        whole = _whole(m for m in model.modules() if m in named)
        raise ConversionError(
            f"targets has {target!r}, which means no layer of this network{has if shown else ''}"
            f"{whole}"
        )
    return found


def _is_called(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}") or fnmatchcase(name, target)


def _module_of(place: Place) -> nn.Module:
    return place.module.base if isinstance(place.module, AdaptedLayer) else place.module


def _other_matrices(model: nn.Module, known: Mapping[Place, str]) -> list[tuple[Place, str]]:
    """Matrices that modules hold themselves, of which the table of layers knows nothing."""
    inside = {inner for place in known for inner in place.module.modules() if place.tensor is None}
    return [
        (Place(module, key), f"{name}.{key}".removeprefix("."))
        for name, module in model.named_modules()
        for key in _matrices(module)
        if module not in inside and Place(module, key) not in known
    ]


def _matrices(module: nn.Module) -> list[str]:
    """Names of the matrices that a module of somebody's holds itself."""
    if isinstance(module, (SpectralWeight, BehindTensor, parametrize.ParametrizationList)):
        return []
    matrices = [id(p) for p in own_tensors(module) if p.ndim == 2]
    return [key for key, p in module._parameters.items() if id(p) in matrices]


def _whole(modules: Iterable[nn.Module]) -> str:
    """What to do about modules that compute with matrices of their own."""
    for module in modules:
        for key in _matrices(module):
            return (
                f". A {type(module).__name__} computes with its {key} itself: name that for an "
                f"update of its own, as in targets=[{key!r}]"
            )
    return ""
