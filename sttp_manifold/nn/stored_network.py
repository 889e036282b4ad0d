"""What a file says of a network: its spectral layers and weights, ties, and versions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from sttp_manifold.errors import ConversionError
from sttp_manifold.nn.modules import naming
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
        weights: names of the stock layer's parameters, each with the name of a weight in the file.
    """

    kind: str
    weights: Mapping[str, str]


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
                "layers": {
                    name: {"kind": layer.kind, "weights": dict(layer.weights)}
                    for name, layer in self.layers.items()
                },
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
        layers = {
            name: StoredLayer(str(layer["kind"]), dict(layer["weights"]))
            for name, layer in said["layers"].items()
        }
        for name, layer in layers.items():
            for weight in layer.weights.values():
                if weight not in weights:
                    raise ConversionError(f"layer {name!r} has a weight {weight!r} that is none")
        aliases = {str(name): str(first) for name, first in said["aliases"].items()}
        return cls(weights, layers, aliases, bool(said["together"]), str(said["package"]))
