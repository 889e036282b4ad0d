"""What a file says of a network: its spectral layers and weights, ties, and versions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from itertools import chain
from typing import Any

from sttp_manifold.errors import ConversionError
from sttp_manifold.nn.modules import naming
from sttp_manifold.nn.stack import MatrixView
from sttp_manifold.nn.weight_file import StoredWeight

__all__ = ["KEY", "StoredLayer", "StoredNetwork"]

KEY = "sttp_manifold"
"""Under which a safetensors file holds this in its metadata."""

_VERSION = 1


@dataclass(frozen=True)
class StoredLayer:
    """A spectral layer.

    Attributes:
        kind: name of its class.
        weights: names of the stock layer's parameters, each with the names of its weights in the
            file: one, or those of a stack.
        views: how a module that stays reads its parameters as matrices; empty for a layer of this
            package, which knows.
    """

    kind: str
    weights: Mapping[str, tuple[str, ...]]
    views: Mapping[str, MatrixView] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        weights = {key: list(names) for key, names in self.weights.items()}
        views = {key: asdict(view) for key, view in self.views.items()}
        return {"kind": self.kind, "weights": weights} | ({"views": views} if views else {})

    @classmethod
    def from_dict(cls, said: Mapping[str, Any]) -> StoredLayer:
        """Back; what makes no layer raises whatever it raises."""
        weights = {str(key): tuple(map(str, names)) for key, names in said["weights"].items()}
        views = {key: _view(view) for key, view in said.get("views", {}).items()}
        if views and views.keys() != weights.keys():
            raise ValueError(f"views of {list(views)} for weights of {list(weights)}")
        return cls(str(said["kind"]), weights, views)


def _view(said: Mapping[str, Any]) -> MatrixView:
    order = said["order"]
    return MatrixView(
        tuple(map(int, said["shape"])),
        int(said["count"]),
        bool(said["stacked"]),
        None if order is None else tuple(map(int, order)),
        int(said.get("rows", 1)),
    )


@dataclass(frozen=True)
class StoredNetwork:
    """A network.

    Attributes:
        weights: spectral weights, each once, by their first names.
        layers: spectral layers, by their first names.
        aliases: names of dense tensors that are others, which the file holds.
        together: whether a forward of the network forms all its weights together.
        package: version that wrote the file.
    """

    weights: dict[str, StoredWeight] = field(default_factory=dict)
    layers: dict[str, StoredLayer] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    together: bool = False
    package: str = field(default_factory=lambda: version("sttp-manifold"))

    def to_text(self) -> str:
        """As JSON."""
        return json.dumps(
            {
                "format": _VERSION,
                "package": self.package,
                "together": self.together,
                "weights": {name: weight.to_dict() for name, weight in self.weights.items()},
                "layers": {name: layer.to_dict() for name, layer in self.layers.items()},
                "aliases": self.aliases,
            }
        )

    @classmethod
    def from_text(cls, text: str) -> StoredNetwork:
        """Back from JSON.

        Raises:
            ConversionError: another format, or none.
        """
        try:
            said = json.loads(text)
            number = said["format"]
            if number > _VERSION:
                raise ConversionError(
                    f"it was written by sttp-manifold {said.get('package')} in format {number}, "
                    f"and this version reads up to {_VERSION}; update the package"
                )
            return cls._from_dict(said)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if isinstance(error, ConversionError):
                raise
            raise ConversionError(
                f"what it says of its weights cannot be read ({type(error).__name__}: {error})"
            ) from error

    @classmethod
    def _from_dict(cls, said: Mapping[str, Any]) -> StoredNetwork:
        weights = {}
        for name, weight in said["weights"].items():
            with naming(name):
                weights[name] = StoredWeight.from_dict(weight)
        layers = {name: StoredLayer.from_dict(layer) for name, layer in said["layers"].items()}
        for name, layer in layers.items():
            for weight in chain.from_iterable(layer.weights.values()):
                if weight not in weights:
                    raise ConversionError(f"layer {name!r} has a weight {weight!r} that is none")
        aliases = {str(name): str(first) for name, first in said["aliases"].items()}
        return cls(weights, layers, aliases, bool(said["together"]), str(said["package"]))
