"""`AdaptedLayer`: a layer with spectral updates of its weight beside it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sttp_manifold._arguments import explained
from sttp_manifold.errors import ConversionError
from sttp_manifold.nn.layer import SpectralLayer
from sttp_manifold.nn.spectral_update import SpectralUpdate, kind_for, view_for
from sttp_manifold.nn.stack import MatrixView

__all__ = ["AdaptedLayer", "adapted_layers"]


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


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLayer]:
    """Adapted layers of a network, by their first names."""
    return {n: m for n, m in model.named_modules() if isinstance(m, AdaptedLayer)}
