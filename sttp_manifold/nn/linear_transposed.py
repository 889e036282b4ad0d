"""`SpectralTransposedLinear`, for the ``Conv1D`` of Hugging Face, and types known by name alone."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sttp_manifold._arguments import explained
from sttp_manifold.errors import ConversionError
from sttp_manifold.nn.linear import SpectralLinear
from sttp_manifold.nn.stack import MatrixView

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["SpectralTransposedLinear", "loaded_type"]


def loaded_type(name: str) -> type[nn.Module] | None:
    """A type by its qualified name, if its module has been imported; nothing is imported here."""
    module, _, attribute = name.rpartition(".")
    found = getattr(sys.modules.get(module), attribute, None)
    return found if isinstance(found, type) else None


class _Named:
    """An attribute of a class: a type of a library that is imported when it is asked for."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, instance: object, owner: type) -> type[nn.Module]:
        module, _, attribute = self.name.rpartition(".")
        try:
            found: type[nn.Module] = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ConversionError(
                f"{owner.__name__} stands for {self.name}, which cannot be imported ({error}); "
                f"pip install {module.partition('.')[0]}"
            ) from error
        return found


class SpectralTransposedLinear(SpectralLinear):
    r"""A linear layer whose stock layer holds ``W`` transposed: ``Conv1D`` of Hugging Face's GPT-2.

    As :class:`SpectralLinear` in all else: the spectral weight is ``(out_features, in_features)``,
    and counts are those of a linear layer. ``Conv1D`` is known by its name; transformers is
    imported when a stock layer has to be made.

    Args:
        in_features: size of the input, ``nx``.
        out_features: size of the output, ``nf``.
        rank: rank of all bonds, lowered where a bond cannot carry it.
        bias: whether to add a bias.
        weight: a weight to use, perhaps shared, instead of making one.
        dtype: floating dtype.
        device: device.
        **options: those of a weight, as for :class:`SpectralLinear`.

    Shape:
        - input: ``(*, in_features)``
        - output: ``(*, out_features)``

    Raises:
        ShapeError, ConversionError, SpectrumError: as :class:`SpectralLinear`.

    References:
        [STTP] Sec. 3 (spectral tensor trains in layers).

    Example:
        >>> layer = SpectralTransposedLinear(20, 12, rank=4)
        >>> layer.weight.shape, layer(torch.randn(7, 20)).shape
        (torch.Size([20, 12]), torch.Size([7, 12]))
    """

    stock = _Named("transformers.pytorch_utils.Conv1D")  # type: ignore[assignment]

    @classmethod
    @explained
    def views(cls, layer: nn.Module) -> dict[str, MatrixView]:
        """See the base class: the weight is stored transposed."""
        stored = layer._parameters["weight"]
        assert stored is not None
        return {"weight": MatrixView(tuple(stored.shape), order=(1, 0))}

    @classmethod
    def _around(cls, layer: Any, weights: Mapping[str, Any]) -> Self:
        in_features, out_features = layer.weight.shape
        return cls(in_features, out_features, bias=False, weight=weights["weight"])

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the stock layer's weight, ``(in_features, out_features)``."""
        return (self.in_features, self.out_features)

    @property
    def weight(self) -> Tensor:
        """The dense weight, ``(in_features, out_features)``, formed at each call."""
        return self.spectral_weight().mT

    def _stock(self) -> Any:
        with torch.device("meta"):
            stock: Any = self._kind().stock(self.out_features, self.in_features)
        stock.bias = None
        return stock

    def dense_layer(self) -> Any:
        """See the base class; the stock layer always has a bias."""
        if getattr(self, "bias", None) is None:
            raise ConversionError(
                "transformers' Conv1D has no forward without bias; give this layer one, as by "
                "layer.bias = torch.nn.Parameter(torch.zeros(layer.out_features)), or take two "
                "thin layers by decompress(model, form='factors')"
            )
        return super().dense_layer()
