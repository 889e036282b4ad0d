"""`AdaptedLayer`: a layer with spectral updates of its weight beside it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sttp_manifold.errors import ConversionError
from sttp_manifold.nn.adapted import Adapted
from sttp_manifold.nn.layer import SpectralLayer
from sttp_manifold.nn.spectral_update import SpectralUpdate, kind_for, place_in, view_for
from sttp_manifold.nn.stack import MatrixView

__all__ = ["AdaptedLayer"]


class AdaptedLayer(Adapted):
    """A layer whose weight stands still, and spectral updates that are added to it.

    It takes the place of the layer; made by :func:`adapt`. What it has no attribute of its own for,
    such as ``in_features``, is the layer's.

    Attributes:
        base: the layer.
        weight: the dense weight with all that is added to it; differentiable.
    """

    base: nn.Module

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        kind_for(base)
        self.base = base
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
    def view(self) -> MatrixView:
        """How the weight is read as matrices."""
        return view_for(self.base)

    @property
    def place(self) -> tuple[torch.dtype, torch.device]:
        """Dtype and device of the weight."""
        return place_in(self.base)

    @property
    def owner(self) -> tuple[nn.Module, str]:
        """The layer, and what it calls its weight."""
        return self.base, "weight"

    def delta(self, update: SpectralUpdate) -> Tensor:
        """What an update adds to the weight; differentiable.

        Args:
            update: the update.

        Shape:
            - output: as the layer's weight
        """
        return update.dense(self.base)

    @property
    def weight(self) -> Tensor:
        """The dense weight in the stock layer's shape, with all that is added; differentiable."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        for update in self.added():
            weight = weight + self.delta(update).to(weight.dtype)
        return weight

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

    def check_fits(self, update: SpectralUpdate) -> None:
        """Raise if an update is not for this layer.

        Raises:
            ConversionError: it is not.
        """
        update.twin(self.base)

    def own(self) -> nn.Parameter:
        """The weight of the layer, which updates are merged into.

        Raises:
            ConversionError: a layer that is spectral itself, or a weight that is computed.
        """
        if isinstance(self.base, SpectralLayer):
            raise ConversionError(
                "its own weight is spectral, and the sum would be of higher rank; call "
                "decompress(model) first, then merge(model)"
            )
        return super().own()
