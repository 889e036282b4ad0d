"""`SpectralLayer`, what layers of spectral weights have in common."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sttp_manifold.errors import ConversionError, ShapeError
from sttp_manifold.nn.initial import INITS, computing_dtype
from sttp_manifold.nn.kept import kept
from sttp_manifold.nn.methods import make_weight
from sttp_manifold.nn.weight import SpectralWeight
from sttp_manifold.tt.decompose import tt_svd
from sttp_manifold.tt.shape import TTShape
from sttp_manifold.tt.spectral import SpectralTT

__all__ = ["SpectralLayer", "check_stock", "rank_of", "weight_of"]


class SpectralLayer(nn.Module, ABC):
    """What the layers have in common: a spectral weight and perhaps a bias.

    Attributes:
        spectral_weight: the module that holds the weight.
        bias: ``(d_out,)`` or None.
    """

    spectral_weight: SpectralWeight
    bias: nn.Parameter | None

    def _adopt(self, weight: SpectralWeight, shape: TTShape, bias: bool) -> None:
        """Set weight and bias; a bias starts as torch's does."""
        if (weight.shape.d_out, weight.shape.d_in) != (shape.d_out, shape.d_in):
            raise ShapeError(
                f"{type(self).__name__} needs a {shape.d_out} x {shape.d_in} weight, got one of "
                f"{weight.shape.d_out} x {weight.shape.d_in}"
            )
        self.spectral_weight = weight
        if bias:
            edge = 1 / math.sqrt(shape.d_in)
            value = torch.empty(shape.d_out, dtype=weight.dtype, device=weight.device)
            self.bias = nn.Parameter(value.uniform_(-edge, edge))
        else:
            self.register_parameter("bias", None)

    @property
    def weight(self) -> Tensor:
        """The dense weight in the stock layer's shape, formed at each call; differentiable."""
        return self.spectral_weight().reshape(self.weight_shape)

    @abstractmethod
    def _form(self, weight: SpectralWeight, x: Tensor, at_hand: bool) -> str:
        """The form in which to have the weight for an input, if it is to be formed or at hand."""

    def _at_hand(self, weight: SpectralWeight, x: Tensor) -> tuple[Tensor, ...] | None:
        """What is kept of the weight, ``(W,)`` or its two factors; None if it is to be formed."""
        found = kept(weight, lambda at_hand: self._form(weight, x, at_hand))
        if found is None or x.dtype == found[0].dtype:
            return found
        # Whatever is wrong with the input is found where nothing is kept.
        return found if torch.is_autocast_enabled(x.device.type) else None

    @property
    @abstractmethod
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the stock layer's weight."""

    @abstractmethod
    def _stock(self) -> nn.Linear | nn.Conv2d:
        """The stock layer of the same sizes, without memory for its parameters."""

    @torch.no_grad()
    def to_layer(self) -> nn.Linear | nn.Conv2d:
        """The stock layer with the same outputs to rounding.

        Its bias is the same object; its weight is frozen if no parameter of this one's is
        trainable.
        """
        layer = self._stock()
        layer.weight = nn.Parameter(
            self.weight.detach().clone(), requires_grad=self.spectral_weight.trainable
        )
        layer.bias = self.bias
        return layer.train(self.training)

    def _weight_repr(self) -> str:
        weight = self.spectral_weight
        return f"rank={weight.shape.rank}, method={weight.method!r}, spectrum={weight.spectrum!r}"


def rank_of(layer: nn.Module, rank: int | None, weight: SpectralWeight | None) -> int:
    """The rank asked for, or that of a given weight.

    Raises:
        ShapeError: neither is given.
    """
    if rank is not None:
        return rank
    if weight is None:
        raise ShapeError(
            f"{type(layer).__name__} needs a rank, as in {type(layer).__name__}(..., rank=16), or "
            "a weight=... to use"
        )
    return weight.shape.rank


def check_stock(layer: nn.Module, kind: type[nn.Module]) -> None:
    """Raise unless a layer is a plain stock one with an ordinary weight.

    Raises:
        ConversionError: another type, an uninitialized layer, or a weight that is computed from
            other parameters.
    """
    given = type(layer).__name__
    if isinstance(layer, (nn.LazyLinear, nn.LazyConv2d)):
        raise ConversionError(
            f"{given} has no weight before its first input; call it once, then convert it"
        )
    if parametrize.is_parametrized(layer) or (
        isinstance(layer, kind) and not isinstance(layer._parameters.get("weight"), Tensor)
    ):
        raise ConversionError(
            f"the weight of this {given} is computed from other parameters (a parametrization, "
            "weight_norm, spectral_norm or pruning); remove it first, as in "
            "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')"
        )
    if not isinstance(layer, kind):
        raise ConversionError(f"expected a torch.nn.{kind.__name__}, got a {given}")


def weight_of(
    layer: nn.Linear | nn.Conv2d,
    rank: int,
    *,
    kind: str,
    kernel: str,
    method: str,
    spectrum: str,
    init: str,
    bound: float,
    init_std: float,
    project: bool,
) -> SpectralWeight:
    """The spectral weight for a stock layer, with its dtype, device and frozen state."""
    stock = layer.weight
    shape = TTShape.for_conv(tuple(stock.shape), rank, kernel=kernel, kind=kind)
    value: str | SpectralTT = init
    if init == "pretrained":
        matrix = stock.detach().flatten(1)
        value = tt_svd(matrix.to(computing_dtype(matrix.dtype)), shape)
    elif init not in INITS:
        names = ", ".join(map(repr, ("pretrained", *INITS)))
        raise ShapeError(f"unknown init {init!r}; expected one of {names}")
    weight = make_weight(
        method,
        shape,
        spectrum,
        value,
        bound,
        init_std,
        project=project,
        dtype=stock.dtype,
        device=stock.device,
    )
    return weight.requires_grad_(stock.requires_grad)
