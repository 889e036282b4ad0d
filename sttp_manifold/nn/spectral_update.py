"""`SpectralUpdate`: what is added to a weight, and the layer that it would be alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sttp_manifold._arguments import explained
from sttp_manifold.errors import ConversionError, ShapeError
from sttp_manifold.nn.embedding_bag import SpectralEmbeddingBag
from sttp_manifold.nn.layer import SpectralLayer
from sttp_manifold.nn.stack import MatrixView, WeightStack
from sttp_manifold.nn.state import EXTRA, from_tensor, to_tensor
from sttp_manifold.nn.stock import row_of
from sttp_manifold.nn.weight import SpectralWeight

__all__ = ["SpectralUpdate", "kind_for", "place_in", "view_for", "why_none_beside"]


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


def kind_for(layer: nn.Module) -> type[SpectralLayer]:
    """The spectral layer that holds a weight like a layer's.

    Raises:
        ConversionError: a layer whose weight no spectral layer of the table holds, or which is not
            linear in it.
    """
    if why := why_none_beside(layer):
        raise ConversionError(
            f"{why}; leave it out of the targets, as adapt(model, rank=8) without any does. "
            "To train its own weight, call requires_grad_() of the layer afterwards"
        )
    if isinstance(layer, SpectralLayer):
        return layer._kind()
    row = row_of(layer)
    if row is None or row.spectral is None or list(row.spectral.holds) != ["weight"]:
        raise ConversionError(
            f"a {type(layer).__name__} has no update; targets are layers with one weight of "
            "sttp_manifold.nn.stock.TABLE, such as nn.Linear and nn.Conv2d, and by sm.nn.adapt "
            "matrices that a module computes with itself"
        )
    return row.spectral


def why_none_beside(layer: nn.Module) -> str:
    """Why no update is computed beside a layer of the table; empty where one can be."""
    if isinstance(layer, (nn.EmbeddingBag, SpectralEmbeddingBag)) and layer.mode == "max":
        return "an EmbeddingBag with mode='max' is not linear in its weight, and has no update"
    return ""


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
