"""`AdaptedLayer`: a layer with spectral updates of its weight beside it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sttp_manifold._arguments import explained
from sttp_manifold.errors import ConversionError, ShapeError
from sttp_manifold.nn.layer import SpectralLayer
from sttp_manifold.nn.stack import MatrixView, WeightStack
from sttp_manifold.nn.state import EXTRA, from_tensor, to_tensor
from sttp_manifold.nn.stock import row_of
from sttp_manifold.nn.weight import SpectralWeight

__all__ = ["AdaptedLayer", "SpectralUpdate", "adapted_layers", "kind_for", "place_in", "view_for"]


class SpectralUpdate(nn.Module):
    r"""An update of a layer's weight, :math:`\alpha\, U \operatorname{diag}(s) V^\top`.

    Args:
        weight: the spectral weight, or a stack of them.
        alpha: factor in front of it.

    Raises:
        ShapeError: a ``weight`` that is none.

    References:
        [STTP] Sec. 3; docs/decisions/0012-adapters.md.

    Attributes:
        weight: the spectral weight or weights.
        alpha: factor in front of it.
    """

    weight: SpectralWeight | WeightStack

    @explained
    def __init__(self, weight: SpectralWeight | WeightStack, alpha: float = 1.0) -> None:
        super().__init__()
        if not isinstance(weight, (SpectralWeight, WeightStack)):
            raise ShapeError(
                f"a SpectralUpdate takes a spectral weight, got {type(weight).__name__}; "
                "make_weight('householder', shape, 'full') makes one"
            )
        self.weight = weight
        self.alpha = float(alpha)

    def dense(self, layer: nn.Module) -> Tensor:
        """What the update adds to the weight of a layer; differentiable.

        Args:
            layer: a stock or spectral layer.

        Shape:
            - output: the stock layer's weight
        """
        return self.alpha * self.twin(layer).weight

    def apply_like(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """What a layer with this update as its weight, and no bias, makes of an input.

        Args:
            layer: a stock or spectral layer, whose settings are taken.
            *args: its input.
            **kwargs: its options.

        Shape:
            - output: that of the layer
        """
        twin = self.twin(layer)
        dtype = self.weight.dtype
        args = tuple(_as(x, dtype) for x in args)
        out: Tensor = twin(*args, **{k: _as(x, dtype) for k, x in kwargs.items()})
        return self.alpha * out

    def twin(self, layer: nn.Module) -> SpectralLayer:
        """The spectral layer of the update alone: the settings of a layer, and no bias.

        Args:
            layer: a stock or spectral layer.
        """
        found: SpectralLayer | None = self.__dict__.get("_twin")
        if found is None or found.spectral_weight is not self.weight:
            found = kind_for(layer)._around(_stock_of(layer), {"weight": self.weight})
            self.__dict__["_twin"] = found  # no submodule, since it holds nothing of its own
        return found

    def get_extra_state(self) -> Tensor:
        """The factor, which a state dict holds beside the numbers.

        Shape:
            - output: ``(n,)``, bytes of JSON
        """
        return to_tensor({"sttp": 1, "alpha": self.alpha})

    def set_extra_state(self, state: object) -> None:
        """Nothing to set: the factor is compared before numbers are taken."""

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        held = from_tensor(state_dict.get(prefix + EXTRA))
        if held is not None and held.get("alpha") != self.alpha:
            args[-1].append(
                f"the update {prefix[:-1]!r} does not fit: the state holds one with "
                f"alpha={held.get('alpha')!r}, the module has alpha={self.alpha!r}; call "
                f"adapt(model, ..., alpha={held.get('alpha')!r}) and load again"
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """The factor."""
        return f"alpha={self.alpha:g}"


class AdaptedLayer(nn.Module):
    """A layer whose weight stands still, and spectral updates that are added to it.

    It takes the place of the layer; made by :func:`adapt`. What it has no attribute of its own for,
    such as ``in_features``, is the layer's.

    Attributes:
        base: the layer.
        updates: all updates, by the names of their adapters.
        active: names of the adapters that are added.
        merged: names of those that the weight of the layer contains now.
        probe: a tensor of zeros that is added to the weight, by which gradients are read, or None.
        weight: the dense weight with all that is added to it; differentiable.
    """

    base: nn.Module
    updates: nn.ModuleDict

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        kind_for(base)
        self.base = base
        self.updates = nn.ModuleDict()
        self.active: tuple[str, ...] = ()
        self._merged: dict[str, SpectralUpdate] = {}
        self.probe: Tensor | None = None
        self.train(base.training)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self.__dict__.get("_modules", {}).get("base")
            if base is None:
                raise
            return getattr(base, name)

    @property
    def merged(self) -> tuple[str, ...]:
        """Names of the adapters that the layer's own weight contains now."""
        return tuple(self._merged)

    @property
    def view(self) -> MatrixView:
        """How the weight is read as matrices."""
        return view_for(self.base)

    @property
    def weight(self) -> Tensor:
        """The dense weight in the stock layer's shape, with all that is added; differentiable."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        for update in self.added():
            weight = weight + update.dense(self.base).to(weight.dtype)
        return weight

    def added(self) -> Iterator[SpectralUpdate]:
        """The updates that a forward adds."""
        for name in self.active:
            update = self.updates[name]
            assert isinstance(update, SpectralUpdate)
            if name not in self._merged:
                yield update

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the layer makes of an input, and its updates.

        Args:
            *args: the layer's input.
            **kwargs: its options.

        Shape:
            - output: that of the layer
        """
        y: Tensor = self.base(*args, **kwargs)
        for update in self.added():
            y = y + update.apply_like(self.base, *args, **kwargs).to(y.dtype)
        if self.probe is not None:
            some = next(iter(self.updates.values()))
            assert isinstance(some, SpectralUpdate)
            stock = some.twin(self.base)._stock()
            y = y + torch.func.functional_call(stock, {"weight": self.probe}, args, kwargs)
        return y

    @explained
    def add(self, name: str, update: SpectralUpdate) -> None:
        """Hold an update beside the others.

        Args:
            name: of its adapter.
            update: the update.

        Raises:
            ConversionError: a name that is there already.
        """
        self.check_new(name)
        update.twin(self.base)
        self.updates[name] = update.train(self.training)

    def check_new(self, name: str) -> None:
        """Raise if there is an adapter of a name.

        Raises:
            ConversionError: there is.
        """
        if name in self.updates:
            raise ConversionError(
                f"there is an adapter {name!r} already; take another name=..., or "
                f"remove_adapter(model, {name!r}) first"
            )

    def drop(self, name: str) -> None:
        """Let an update go; what is merged stays in the weight."""
        del self.updates[name]
        self._merged.pop(name, None)
        self.active = tuple(other for other in self.active if other != name)

    @torch.no_grad()
    def fold(self, name: str, sign: int = 1) -> Tensor:
        """The layer's own weight with an update added to it, or taken from it, and checked.

        Computed in float32 at least, and rounded to the dtype of the layer once.

        Args:
            name: of the adapter.
            sign: 1 to add, -1 to take what was added.

        Shape:
            - output: as the layer's weight

        Raises:
            ConversionError: a base that is spectral itself, or a result that is not finite.
        """
        if isinstance(self.base, SpectralLayer):
            raise ConversionError(
                "its own weight is spectral, and the sum would be of higher rank; call "
                "decompress(model) first, then merge(model)"
            )
        weight = self.base._parameters["weight"]
        update: nn.Module = self.updates[name] if sign > 0 else self._merged[name]
        assert weight is not None
        assert isinstance(update, SpectralUpdate)
        update.to(weight.device)
        wide = torch.promote_types(weight.dtype, torch.float32)
        delta = update.dense(self.base).to(weight.device, wide)
        new = (weight.to(wide) + sign * delta).to(weight.dtype)
        if not bool(new.isfinite().all()):
            raise ConversionError(
                f"the weight with {name!r} has entries that are not finite in {weight.dtype}; "
                "call model.float() first, or lower the update"
            )
        return new

    @torch.no_grad()
    def put(self, name: str, weight: Tensor, sign: int) -> None:
        """Write what :meth:`fold` gave into the layer's own weight.

        Args:
            name: of the adapter.
            weight: the new weight.
            sign: as there.

        Shape:
            - weight: as the layer's weight
        """
        own = self.base._parameters["weight"]
        assert own is not None
        own.copy_(weight)
        if sign > 0:
            update = self.updates[name]
            assert isinstance(update, SpectralUpdate)
            # What was added is what will be taken, whatever is trained or loaded in between.
            self._merged[name] = copy.deepcopy(update).requires_grad_(False)
        else:
            del self._merged[name]

    def extra_repr(self) -> str:
        """Which adapters are added."""
        merged = f", merged={self.merged}" if self.merged else ""
        return f"active={self.active}{merged}"


def kind_for(layer: nn.Module) -> type[SpectralLayer]:
    """The spectral layer that holds a weight like a layer's.

    Raises:
        ConversionError: a layer whose weight no spectral layer of the table holds.
    """
    if isinstance(layer, SpectralLayer):
        return layer._kind()
    row = row_of(layer)
    if row is None or row.spectral is None or list(row.spectral.holds) != ["weight"]:
        raise ConversionError(
            f"a {type(layer).__name__} has no update; targets are layers with one weight of "
            "sttp_manifold.nn.stock.TABLE, such as nn.Linear and nn.Conv2d"
        )
    if getattr(layer, "mode", "sum") == "max":
        raise ConversionError("an EmbeddingBag with mode='max' is not linear in its weight")
    return row.spectral


def view_for(layer: nn.Module) -> MatrixView:
    """How the weight of a layer is read as matrices."""
    return kind_for(layer).views(_stock_of(layer))["weight"]


def place_in(layer: nn.Module) -> tuple[torch.dtype, torch.device]:
    """Dtype and device of the weight of a layer."""
    weight = layer.spectral_weight if isinstance(layer, SpectralLayer) else layer.weight
    dtype, device = weight.dtype, weight.device
    assert isinstance(dtype, torch.dtype)
    assert isinstance(device, torch.device)
    return dtype, device


def _stock_of(layer: nn.Module) -> Any:
    """A stock layer with the settings of a layer, without bias and without memory."""
    return layer._stock() if isinstance(layer, SpectralLayer) else layer


def _as(x: Any, dtype: torch.dtype) -> Any:
    """A floating tensor in a dtype, unless autocast sees to that."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dtype == dtype:
        return x
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return x
    return x.to(dtype)


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLayer]:
    """Adapted layers of a network, by their first names."""
    return {n: m for n, m in model.named_modules() if isinstance(m, AdaptedLayer)}
