"""The one table of layers: which stock layer becomes which spectral one, and what can be converted.

A new layer is a file with its class and a row here: `compress`, `decompress` and `switch` are loops
over the table, and a layer may hold any number of weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.utils import parametrize

from sttp_manifold.errors import ConversionError
from sttp_manifold.nn.carry import check_stock
from sttp_manifold.nn.conv import SpectralConv2d
from sttp_manifold.nn.layer import SpectralLayer
from sttp_manifold.nn.linear import SpectralLinear
from sttp_manifold.nn.modules import Owners, naming, show
from sttp_manifold.nn.recipe import Recipe
from sttp_manifold.nn.weight import SpectralWeight
from sttp_manifold.tt.shape import TTShape

__all__ = ["TABLE", "Group", "Row", "groups_of", "row_of", "stock_layers", "stock_weights"]


@dataclass(frozen=True)
class Row:
    """A stock layer and the spectral one that stands for it.

    Attributes:
        stock: type of the stock layer; its subclasses are other layers.
        spectral: the layer of this package.
        lazy: type of the stock layer before its first input.
    """

    stock: type[nn.Module]
    spectral: type[SpectralLayer]
    lazy: type[nn.Module] | None = None


TABLE = [
    Row(nn.Linear, SpectralLinear, nn.LazyLinear),
    Row(nn.Conv2d, SpectralConv2d, nn.LazyConv2d),
]
"""The rows; a layer of your own may be appended."""


def row_of(module: nn.Module) -> Row | None:
    """The row of a stock layer, whatever parametrizations it has; None for any other module."""
    kind = parametrize.type_before_parametrizations(module)
    return next((row for row in TABLE if kind in (row.stock, row.lazy)), None)


def stock_weights(module: nn.Module) -> dict[str, Tensor]:
    """Parameters of a stock layer (or a subclass) that a spectral layer would hold as weights."""
    for row in TABLE:
        if isinstance(module, row.stock):
            found = {name: module._parameters.get(name) for name in row.spectral.holds}
            return {
                name: tensor
                for name, tensor in found.items()
                if tensor is not None and not nn.parameter.is_lazy(tensor)
            }
    return {}


@dataclass(frozen=True, eq=False)
class Group:
    """Layers that share weights; mostly one layer.

    Attributes:
        layers: stock layers, each with its first name.
        weights: their weights, each once, with the name of the first layer that holds it.
    """

    layers: dict[nn.Module, str]
    weights: dict[Tensor, str]

    @property
    def numel(self) -> int:
        """Elements of the dense weights."""
        return sum(weight.numel() for weight in self.weights)

    def plans(self, recipe: Recipe) -> list[TTShape]:
        """Plans of the weights."""
        found = []
        for weight, name in self.weights.items():
            with naming(name):
                found.append(recipe.plan(weight.shape))
        return found

    def convert(self, recipe: Recipe) -> dict[nn.Module, nn.Module]:
        """A spectral layer for each layer; what is shared stays shared."""
        made: dict[Tensor, SpectralWeight] = {}
        for weight, name in self.weights.items():
            with naming(name):
                made[weight] = recipe.make_for(weight)
        new: dict[nn.Module, nn.Module] = {}
        for layer, name in self.layers.items():
            row = row_of(layer)
            assert row is not None
            with naming(name):
                weights = {n: made[weight] for n, weight in stock_weights(layer).items()}
                new[layer] = row.spectral.in_place_of(layer, weights)
        return new

    def __str__(self) -> str:
        return " and ".join(map(show, self.layers.values()))


def stock_layers(model: nn.Module, skip: Iterable[str]) -> dict[nn.Module, str]:
    """Stock layers of a network that are not skipped, with their first names.

    Raises:
        ConversionError: an unknown name in ``skip``, or a layer that cannot be converted.
    """
    names = dict(model.named_modules(remove_duplicate=False))
    skip = (skip,) if isinstance(skip, str) else tuple(skip)
    unknown = [name for name in skip if name not in names]
    if unknown:
        kinds: tuple[type[nn.Module], ...] = (SpectralLayer, *(row.stock for row in TABLE))
        there = [name for name, module in names.items() if isinstance(module, kinds)]
        raise ConversionError(
            f"skip names {', '.join(map(repr, unknown))}, which this network does not have; its "
            f"layers are {', '.join(map(repr, there)) or 'none'}",
            layer=str(unknown[0]),
        )
    skipped = {module for name in skip for module in names[name].modules()}
    layers: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        row = row_of(module)
        if row is not None and module not in skipped:
            with naming(name):
                check_stock(module, row.stock, row.spectral.holds)
            layers[module] = name
    return layers


def groups_of(model: nn.Module, layers: dict[nn.Module, str]) -> tuple[list[Group], list[str]]:
    """Layers by the weights that they share, and why others cannot be converted."""
    owners, groups, left = Owners(model), [], []
    seen: set[nn.Module] = set()
    for first in layers:
        if first in seen:
            continue
        members, others = {first}, []
        weights: dict[Tensor, str] = {}
        while new := [m for m in layers if m in members - seen]:
            seen.update(new)
            for layer in new:
                for weight in stock_weights(layer).values():
                    if weight in weights:
                        continue
                    weights[weight] = layers[layer]
                    for owner, name in owners.of(weight):
                        if owner in layers and stock_weights(owner).get(name) is weight:
                            members.add(owner)
                        else:
                            others.append((owner, name))
        group = Group({layer: name for layer, name in layers.items() if layer in members}, weights)
        if others:
            names = ", ".join(repr(owners.name(owner)) for owner in others)
            left.append(f"{group} shares its weight with {names}, which is not compressed")
        else:
            groups.append(group)
    return groups, left
