"""`SpectralLinear`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sttp_manifold._arguments import explained
from sttp_manifold.nn.layer import SpectralLayer
from sttp_manifold.nn.recipe import WeightOptions, takes
from sttp_manifold.nn.weight import SpectralWeight
from sttp_manifold.tt.plans import linear_plan

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

__all__ = ["SpectralLinear"]


class SpectralLinear(SpectralLayer):
    r"""A linear layer, :math:`y = U \operatorname{diag}(s) V^\top x + b`.

    ``W`` is formed only where that is the cheapest way to apply it, and anew in each forward:
    nothing is kept between forwards. For inference, where the parameters stand still,
    :func:`decompress` makes stock layers, or take ``spectral_weight.factors()`` once.

    Args:
        in_features: size of the input.
        out_features: size of the output.
        rank: rank of all bonds, lowered where a bond cannot carry it.
        bias: whether to add a bias.
        weight: a weight to use, perhaps shared, instead of making one.
        dtype: floating dtype.
        device: device.
        **options: those of a weight (:class:`Recipe`): ``kind``, ``method``, ``spectrum``,
            ``init``, ``bound``, ``init_std``, ``project``.

    Shape:
        - input: ``(*, in_features)``
        - output: ``(*, out_features)``

    Raises:
        ShapeError: sizes or ranks that are not positive integers, an unknown ``kind`` or
            ``init``, or a ``weight`` of another size or rank.
        ConversionError: an unknown ``method``, or a ``weight`` beside options that make one.
        SpectrumError: an unknown ``spectrum``.

    References:
        [STTP] Sec. 3 (spectral tensor trains in layers).

    Example:
        >>> layer = SpectralLinear(20, 12, rank=4)
        >>> layer(torch.randn(7, 20)).shape
        torch.Size([7, 12])
    """

    stock = nn.Linear
    spectral_weight: SpectralWeight

    @explained
    @takes(WeightOptions)
    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int | None = None,
        bias: bool = True,
        *,
        weight: SpectralWeight | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        **options: Unpack[WeightOptions],
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        sizes = (out_features, in_features)
        self._hold(sizes, rank, weight, bias, options, dtype=dtype, device=device)

    @classmethod
    def _around(cls, layer: nn.Linear, weights: Mapping[str, Any]) -> Self:
        return cls(layer.in_features, layer.out_features, bias=False, weight=weights["weight"])

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the stock layer's weight, ``(out_features, in_features)``."""
        return (self.out_features, self.in_features)

    def _stock(self) -> nn.Linear:
        return nn.Linear(self.in_features, self.out_features, bias=False, device="meta")

    def _thin(self) -> nn.Sequential:
        rank = self.spectral_weight.shape.rank
        return nn.Sequential(
            nn.Linear(self.in_features, rank, bias=False, device="meta"),
            nn.Linear(rank, self.out_features, bias=False, device="meta"),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer.

        Shape:
            - x: ``(*, in_features)``
            - output: ``(*, out_features)``
        """
        weight, bias = self.spectral_weight, self.bias
        form = self._form_for(x)
        if form == "cores":
            y = weight.tt().matvec(x)
            return y if bias is None else y + bias.to(y.dtype)
        if form == "dense":
            return nn.functional.linear(x, weight(), bias)
        v, su = weight.row_factors()
        if x.ndim != 2:
            return nn.functional.linear(nn.functional.linear(x, v.t()), su.t(), bias)
        # Without the transposes of linear, each of which is a node of the graph.
        z = torch.mm(x, v)
        return torch.mm(z, su) if bias is None else torch.addmm(bias, z, su)

    def form_together(self, weight: SpectralWeight) -> str:
        """See the base class."""
        form = super().form_together(weight)
        return "rows" if form == "factors" else form

    def _form(self, x: object) -> str:
        if not isinstance(x, Tensor):
            return "dense"  # torch names what is no tensor
        count = x.numel() // max(x.shape[-1], 1) if x.ndim else 0
        if not count:
            return "dense"
        plan = linear_plan(self.spectral_weight.shape, count)
        return "rows" if plan == "lowrank" else plan

    def extra_repr(self) -> str:
        """As torch's, with rank, method and spectrum."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {self._weight_repr()}"
        )
