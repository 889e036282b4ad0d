"""`save_adapter` and `load_adapter`: an adapter in a file of its own, without its network."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sttp_manifold._arguments import explained
from sttp_manifold._files import replacing
from sttp_manifold.errors import ConversionError, SttpError
from sttp_manifold.nn.adapter_places import Place, adapted_of, place_at
from sttp_manifold.nn.adapter_switches import adapters
from sttp_manifold.nn.adapting import DEFAULT, attach, check_name
from sttp_manifold.nn.modules import naming
from sttp_manifold.nn.saving import opened
from sttp_manifold.nn.spectral_update import SpectralUpdate
from sttp_manifold.nn.stack import WeightStack, parts_of, rows_and_columns
from sttp_manifold.nn.together import together
from sttp_manifold.nn.weight_file import StoredWeight, pack, unpack

__all__ = ["load_adapter", "save_adapter"]

KEY = "sttp_manifold_adapter"
_VERSION = 1


@dataclass(frozen=True)
class _StoredUpdate:
    """What a file says of the update of a layer."""

    shape: tuple[int, ...]
    alpha: float
    weights: tuple[StoredWeight, ...]

    def to_dict(self) -> dict[str, Any]:
        weights = [weight.to_dict() for weight in self.weights]
        return {"shape": list(self.shape), "alpha": self.alpha, "weights": weights}

    @classmethod
    def from_dict(cls, said: Mapping[str, Any]) -> _StoredUpdate:
        weights = tuple(map(StoredWeight.from_dict, said["weights"]))
        if not weights:
            raise ValueError("no weights")
        return cls(tuple(map(int, said["shape"])), float(said["alpha"]), weights)


@explained
@torch.no_grad()
def save_adapter(
    model: nn.Module, path: str | os.PathLike[str], name: str = DEFAULT, *, exact: bool = False
) -> None:
    """Write an adapter of a network to a safetensors file, without the network.

    The file holds as many numbers as the updates have dimensions, and which layers they belong to,
    their plans, spectra and ``alpha`` in its metadata; see :func:`save`.

    Args:
        model: the network.
        path: the file; folders are made.
        name: of the adapter.
        exact: whether points of manifolds are stored as they are, bit for bit.

    Raises:
        ConversionError: an unknown name, or updates without numbers or with some that are not
            finite.
    """
    if name not in adapters(model):
        there = ", ".join(map(repr, adapters(model))) or "none"
        raise ConversionError(f"there is no adapter {name!r}; the network has {there}")
    said: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for at, layer in adapted_of(model).items():
        if name not in layer.updates:
            continue
        update = layer.updates[name]
        assert isinstance(update, SpectralUpdate)
        stored = []
        for i, weight in enumerate(parts_of(update.weight)):
            with naming(at):
                one, numbers = pack(weight, exact=exact)
            stored.append(one)
            tensors[_key(at, i, one)] = numbers.cpu().contiguous().clone()
        said[at] = _StoredUpdate(layer.view.shape, update.alpha, tuple(stored)).to_dict()
    text = json.dumps(
        {"format": _VERSION, "package": version("sttp-manifold"), "name": name, "layers": said}
    )
    with replacing(Path(path)) as temporary:
        save_file(tensors, str(temporary), {"format": "pt", KEY: text})


@explained
@torch.no_grad()
def load_adapter(
    path: str | os.PathLike[str], *, into: nn.Module, name: str | None = None
) -> nn.Module:
    """Read an adapter that :func:`save_adapter` wrote, and put it beside the layers of a network.

    It is the active one afterwards; a network without adapters is frozen, as by :func:`adapt`. If
    anything does not fit, nothing has changed.

    Args:
        path: the file.
        into: the network that it was trained for, with other adapters or without.
        name: of the adapter there; by default the one that it had.

    Returns:
        The network; the adapted layer if the network itself is a layer.

    Raises:
        ConversionError: a file that :func:`save_adapter` did not write, or a later version of it
            did; a network without those layers, or with layers of other sizes; a name that is
            there already; numbers that make no such update.
        FileNotFoundError: no such file.
    """
    with opened(Path(path)) as file:
        try:
            own, stored = _read((file.metadata() or {}).get(KEY))
            name = own if name is None else name
            check_name(name)
            updates = _updates(into, name, stored, file)
        except ConversionError as error:
            error.args = (f"{path}: {error}",)
            raise
    adapted = attach(into, name, updates, freeze=not adapted_of(into))
    return together(adapted)


def _read(text: str | None) -> tuple[str, dict[str, _StoredUpdate]]:
    if text is None:
        raise ConversionError(
            "it holds no adapter: sm.nn.save_adapter did not write it; load(path, into=model) "
            "reads what sm.nn.save wrote, and peft.PeftModel.from_pretrained PEFT's folders"
        )
    try:
        said = json.loads(text)
        if said["format"] > _VERSION:
            raise ConversionError(
                f"it was written by sttp-manifold {said.get('package')} in format "
                f"{said['format']}, and this version reads up to {_VERSION}; update the package"
            )
        layers = {str(at): _StoredUpdate.from_dict(one) for at, one in said["layers"].items()}
        return str(said["name"]), layers
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, SttpError):
            raise
        raise ConversionError(
            f"what it says of its updates cannot be read ({type(error).__name__}: {error})"
        ) from error


def _updates(
    model: nn.Module, name: str, stored: Mapping[str, _StoredUpdate], file: Any
) -> dict[Place, SpectralUpdate]:
    made: dict[Place, SpectralUpdate] = {}
    for at, one in stored.items():
        with naming(at):
            place = place_at(model, at)
            if place.adapted is not None:
                place.adapted.check_new(name)
            view = place.view
            sizes = rows_and_columns(view.sizes)
            plans = {(w.shape.d_out, w.shape.d_in) for w in one.weights}
            if view.shape != one.shape or len(one.weights) != view.count or plans != {sizes}:
                raise ConversionError(
                    f"its weight is of shape {view.shape}, and the update is for one of "
                    f"{one.shape}; load it into the network that it was trained for"
                )
            _, device = place.where
            device = torch.device("cpu") if device.type == "meta" else device
            parts = []
            for i, weight in enumerate(one.weights):
                key = _key(at, i, weight)
                if key not in list(file.keys()):
                    raise ConversionError(f"the file has no {key!r}: it is damaged")
                parts.append(unpack(weight, file.get_tensor(key), None, device))
            held = parts[0] if view.count == 1 else WeightStack(parts)
            made[place] = SpectralUpdate(held, one.alpha)
    return made


def _key(at: str, i: int, weight: StoredWeight) -> str:
    return f"{at}.{i}.{weight.tensor}".removeprefix(".")
