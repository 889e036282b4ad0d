"""The one table of layers: which stock layer becomes which spectral one, and what can be converted.

A new layer is a file with its class and a row here: `compress`, `decompress` and `switch` are loops
over the table, and a layer may hold any number of weights.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from sttp_manifold.errors import ConversionError, ShapeError
from sttp_manifold.nn import attention, recurrent
from sttp_manifold.nn.carry import check_kept, check_stock, mark_like
from sttp_manifold.nn.conv import SpectralConv1d, SpectralConv2d, SpectralConv3d
from sttp_manifold.nn.conv_transpose import (
    SpectralConvTranspose1d,
    SpectralConvTranspose2d,
    SpectralConvTranspose3d,
)
from sttp_manifold.nn.embedding import SpectralEmbedding
from sttp_manifold.nn.embedding_bag import SpectralEmbeddingBag
from sttp_manifold.nn.fast_path import leave_fast_paths
from sttp_manifold.nn.held import HeldWeight, held_in, put_behind
from sttp_manifold.nn.layer import SpectralLayer
from sttp_manifold.nn.linear import SpectralLinear
from sttp_manifold.nn.linear_transposed import SpectralTransposedLinear, loaded_type
from sttp_manifold.nn.modules import Owners, naming, replace, show
from sttp_manifold.nn.recipe import Recipe
from sttp_manifold.nn.stack import MatrixView, WeightStack
from sttp_manifold.nn.weight import SpectralWeight
from sttp_manifold.tt.shape import TTShape
from sttp_manifold.tt.spectral import SpectralTT

__all__ = [
    "TABLE",
    "Group",
    "Row",
    "follows",
    "groups_of",
    "put_in_place",
    "row_of",
    "stock_layers",
    "stock_weights",
]


Views = Callable[[Any], dict[str, MatrixView]]


@dataclass(frozen=True)
class Row:
    """A stock layer, and the spectral one that stands for it or the parameters that are held.

    Attributes:
        stock: type of the stock layer; its subclasses are other layers, unless they stay.
        spectral: the layer of this package; None for a module that stays, with spectral weights
            behind its parameters (:mod:`sttp_manifold.nn.held`).
        lazy: type of the stock layer before its first input.
        views: for a module that stays: which parameters, and how each is read as matrices.
        echoes: attributes of the module that refer to its parameters, and follow them by
            themselves.
    """

    stock: type[nn.Module]
    spectral: type[SpectralLayer] | None = None
    lazy: type[nn.Module] | None = None
    views: Views | None = None
    echoes: frozenset[str] = frozenset()

    def names(self, layer: nn.Module) -> list[str]:
        """Names of the parameters that become spectral weights."""
        return list(self.views_of(layer) if self.spectral is None else self.spectral.holds)

    def views_of(self, layer: nn.Module) -> dict[str, MatrixView]:
        """The parameters that become spectral weights, and how each is read as matrices."""
        if self.spectral is not None:
            return self.spectral.views(layer)
        assert self.views is not None
        return self.views(layer)

    def check(self, layer: nn.Module) -> None:
        """Raise for a module that the row is of, and that cannot be converted.

        Raises:
            ConversionError: such a module.
        """
        if self.spectral is None:
            check_kept(layer, self.names(layer))
        else:
            check_stock(layer, self.stock, self.names(layer))


TABLE = [
    Row(nn.Linear, SpectralLinear, nn.LazyLinear),
    Row(nn.Conv1d, SpectralConv1d, nn.LazyConv1d),
    Row(nn.Conv2d, SpectralConv2d, nn.LazyConv2d),
    Row(nn.Conv3d, SpectralConv3d, nn.LazyConv3d),
    Row(nn.ConvTranspose1d, SpectralConvTranspose1d, nn.LazyConvTranspose1d),
    Row(nn.ConvTranspose2d, SpectralConvTranspose2d, nn.LazyConvTranspose2d),
    Row(nn.ConvTranspose3d, SpectralConvTranspose3d, nn.LazyConvTranspose3d),
    Row(nn.Embedding, SpectralEmbedding),
    Row(nn.EmbeddingBag, SpectralEmbeddingBag),
    Row(nn.MultiheadAttention, views=attention.attention),
    Row(NonDynamicallyQuantizableLinear, views=attention.output_projection),
    Row(nn.RNNBase, views=recurrent.views, echoes=frozenset({"_flat_weights"})),
    Row(nn.RNNCellBase, views=recurrent.views),
    Row(nn.Bilinear, views=attention.bilinear),
    Row(attention.Experts, views=attention.experts),
]
"""The rows; a layer of your own may be appended."""

LATER: dict[str, type[SpectralLayer]] = {
    "transformers.pytorch_utils.Conv1D": SpectralTransposedLinear
}
"""Layers for stock types that are not imported here: rows of the table once somebody has."""


def _add_loaded() -> None:
    for name, spectral in LATER.items():
        stock = loaded_type(name)
        if stock is not None and all(row.stock is not stock for row in TABLE):
            TABLE.append(Row(stock, spectral))


def row_of(module: nn.Module) -> Row | None:
    """The row of a stock layer, whatever parametrizations it has; None for any other module.

    A subclass that could have another forward is no stock layer; where the module stays, it is.
    """
    _add_loaded()
    kind = parametrize.type_before_parametrizations(module)
    exact = next((row for row in TABLE if kind in (row.stock, row.lazy)), None)
    kept = (row for row in TABLE if row.spectral is None and isinstance(module, row.stock))
    return exact or next(kept, None)


def stock_weights(module: nn.Module) -> dict[str, Tensor]:
    """Parameters of a stock layer (or a subclass) that would be held as spectral weights."""
    return {name: tensor for name, (tensor, _) in readings(module).items()}


def readings(module: nn.Module) -> dict[str, tuple[nn.Parameter, MatrixView]]:
    """The same, each with how it is read as matrices."""
    row = row_of(module) or next((row for row in TABLE if isinstance(module, row.stock)), None)
    own = module._parameters
    if row is None or any(p is not None and nn.parameter.is_lazy(p) for p in own.values()):
        return {}
    try:
        views = row.views_of(module)
    except ShapeError:  # a subclass whose weight is no matrix
        return {}
    found = ((n, own.get(n), view) for n, view in views.items())
    return {name: (tensor, view) for name, tensor, view in found if tensor is not None}


@dataclass(frozen=True, eq=False)
class Group:
    """Layers that share weights; mostly one layer.

    Attributes:
        layers: stock layers, each with its first name.
        weights: their weights, each once, with the name of the first layer that holds it.
        views: how each of them is read as matrices.
    """

    layers: dict[nn.Module, str]
    weights: dict[Tensor, str]
    views: dict[Tensor, MatrixView]

    @property
    def numel(self) -> int:
        """Elements of the dense weights."""
        return sum(weight.numel() for weight in self.weights)

    def plans(self, recipe: Recipe) -> list[TTShape]:
        """Plans of the weights, one for each matrix."""
        found = []
        for weight, name in self.weights.items():
            view = self.views[weight]
            with naming(name):
                found += [recipe.plan(view.sizes)] * view.count
        return found

    def convert(
        self, recipe: Recipe, values: Mapping[Tensor, Sequence[SpectralTT]]
    ) -> dict[nn.Module, nn.Module | dict[str, HeldWeight]]:
        """What takes the place of each layer, or what comes behind its parameters.

        What is shared stays shared; nothing is changed before :func:`put_in_place`.

        Args:
            recipe: the options of the weights.
            values: for pretrained weights, what they are to be, one value a matrix; a weight that
                is not named is truncated by TT-SVD.
        """
        made: dict[Tensor, SpectralWeight | WeightStack] = {}
        for weight, name in self.weights.items():
            with naming(name):
                made[weight] = recipe.make_behind(weight, self.views[weight], values.get(weight))
        new: dict[nn.Module, nn.Module | dict[str, HeldWeight]] = {}
        for layer, name in self.layers.items():
            row = row_of(layer)
            assert row is not None
            with naming(name):
                own = readings(layer)
                if row.spectral is not None:
                    weights = {n: made[weight] for n, (weight, _) in own.items()}
                    new[layer] = row.spectral.in_place_of(layer, weights)
                else:
                    new[layer] = {n: HeldWeight(made[w], view) for n, (w, view) in own.items()}
                    for weight, _ in own.values():
                        mark_like([weight], made[weight].parameters())
        if len(new) > 1:
            for put in new.values():
                if isinstance(put, SpectralLayer):
                    put._shared()
        return new

    def __str__(self) -> str:
        return " and ".join(map(show, self.layers.values()))


def stock_layers(
    model: nn.Module, meant: Container[nn.Module]
) -> tuple[dict[nn.Module, str], list[str]]:
    """Stock layers among the modules that are meant, and why others cannot be converted.

    Returns:
        The layers with their first names, and a sentence for each that is none.
    """
    layers: dict[nn.Module, str] = {}
    unfit: list[str] = []
    for name, module in model.named_modules():
        row = row_of(module)
        if row is None or module not in meant:
            continue
        if held_in(module) and not (row.spectral is None and stock_weights(module)):
            continue  # in spectral form already
        try:
            row.check(module)
        except ConversionError as error:
            unfit.append(f"{show(name)}: {error}")
        else:
            layers[module] = name
    return layers, unfit


def follows(module: nn.Module, attribute: str) -> bool:
    """Whether an attribute that refers to parameters follows them by itself."""
    row = row_of(module)
    return row is not None and attribute in row.echoes


def put_in_place(
    model: nn.Module, new: Mapping[nn.Module, nn.Module | dict[str, HeldWeight]]
) -> nn.Module:
    """Put what was made in the places of stock layers and of their parameters.

    Returns:
        The model; the new layer if the model itself is a layer that goes.

    Raises:
        ConversionError: a reference that cannot be followed, before anything has changed.
    """
    layers = {old: made for old, made in new.items() if isinstance(made, nn.Module)}
    converted = replace(model, layers)
    for module, made in new.items():
        if not isinstance(made, nn.Module):
            put_behind(module, made)
    leave_fast_paths(converted)
    return converted


def groups_of(model: nn.Module, layers: dict[nn.Module, str]) -> tuple[list[Group], list[str]]:
    """Layers by the weights that they share, and why others cannot be converted."""
    owners, groups, left = Owners(model), [], []
    seen: set[nn.Module] = set()
    for first in layers:
        if first in seen:
            continue
        members, others = {first}, []
        weights: dict[Tensor, str] = {}
        views: dict[Tensor, MatrixView] = {}
        while new := [m for m in layers if m in members - seen]:
            seen.update(new)
            for layer in new:
                for weight, view in readings(layer).values():
                    if weight in weights:
                        continue
                    weights[weight], views[weight] = layers[layer], view
                    for owner, name in owners.of(weight):
                        if owner in layers and follows(owner, name):
                            continue
                        reading = readings(owner).get(name) if owner in layers else None
                        if reading is not None and reading[0] is weight and reading[1] == view:
                            members.add(owner)
                        else:
                            others.append((owner, name))
        mine = {layer: name for layer, name in layers.items() if layer in members}
        group = Group(mine, weights, views)
        if others:
            names = ", ".join(repr(owners.name(owner)) for owner in others)
            left.append(f"{group} shares its weight with {names}, which is not compressed")
        else:
            groups.append(group)
    return groups, left
