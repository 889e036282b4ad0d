"""`SpectralLinear`."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from sttp_manifold.nn.layer import SpectralLayer, check_stock, rank_of, weight_of
from sttp_manifold.nn.methods import make_weight
from sttp_manifold.nn.scope import partners
from sttp_manifold.nn.weight import SpectralWeight
from sttp_manifold.tt.plans import linear_plan
from sttp_manifold.tt.shape import TTShape
from sttp_manifold.tt.spectral import SpectralTT

__all__ = ["SpectralLinear"]


class SpectralLinear(SpectralLayer):
    r"""A linear layer, :math:`y = U \operatorname{diag}(s) V^\top x + b`.

    ``W`` is formed only where that is the cheapest way to apply it. Without gradient, on a CPU, the
    layer keeps its weight from the second forward on, ``W`` or its two factors, and compares every
    byte of the parameters with a copy before each use: a weight that they no longer give is never
    used. On an accelerator comparing would wait for the device, and nothing is kept: take
    ``spectral_weight.factors()`` once, or :meth:`to_layer`.

    Args:
        in_features: size of the input.
        out_features: size of the output.
        rank: rank of all bonds, lowered where a bond cannot carry it.
        bias: whether to add a bias.
        kind: ``"sttp"`` (prime factors of the sizes as modes) or ``"svdp"`` (one mode a side).
        method: ``"householder"`` or ``"riemannian"``; the latter takes a Riemannian optimizer.
        spectrum: one of ``identity``, ``free``, ``normalized``, ``bounded``, ``full``.
        init: ``"eye"``, ``"noisy_eye"``, ``"random"``, or a SpectralTT.
        bound: bound of ``"bounded"``.
        init_std: deviation for ``"noisy_eye"``.
        project: with a value as ``init``, take the nearest one that the spectrum can hold.
        weight: a weight to use, perhaps shared, instead of making one; the arguments that make
            one are not looked at then.
        dtype: floating dtype.
        device: device.

    Shape:
        - input: ``(*, in_features)``
        - output: ``(*, out_features)``

    Raises:
        ShapeError: sizes or ranks that are not positive integers, an unknown ``kind`` or
            ``init``, or a ``weight`` of another size.
        ConversionError: an unknown ``method``.
        SpectrumError: an unknown ``spectrum``.

    References:
        [STTP] Sec. 3 (spectral tensor trains in layers).

    Example:
        >>> layer = SpectralLinear(20, 12, rank=4)
        >>> layer(torch.randn(7, 20)).shape
        torch.Size([7, 12])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int | None = None,
        bias: bool = True,
        *,
        kind: str = "sttp",
        method: str = "householder",
        spectrum: str = "free",
        init: str | SpectralTT = "noisy_eye",
        bound: float = 1.0,
        init_std: float = 1e-4,
        project: bool = False,
        weight: SpectralWeight | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        shape = TTShape.for_conv(
            (out_features, in_features), rank_of(self, rank, weight), kind=kind
        )
        if weight is None:
            weight = make_weight(
                method,
                shape,
                spectrum,
                init,
                bound,
                init_std,
                project=project,
                dtype=dtype,
                device=device,
            )
        self._adopt(weight, shape, bias)

    @classmethod
    def from_layer(
        cls,
        layer: nn.Linear,
        rank: int,
        *,
        kind: str = "sttp",
        method: str = "householder",
        spectrum: str = "free",
        init: str = "pretrained",
        bound: float = 1.0,
        init_std: float = 1e-4,
        project: bool = False,
        weight: SpectralWeight | None = None,
    ) -> SpectralLinear:
        """The spectral layer of a stock one.

        Dtype, device, training mode and frozen weights are kept, and the bias is the same object.

        Args:
            layer: the stock layer; it is not changed.
            rank: rank of all bonds.
            kind: ``"sttp"`` or ``"svdp"``.
            method: ``"householder"`` or ``"riemannian"``.
            spectrum: name of the spectrum map.
            init: ``"pretrained"`` takes the layer's weight by TT-SVD; ``"eye"``, ``"noisy_eye"``
                and ``"random"`` start anew.
            bound: bound of ``"bounded"``.
            init_std: deviation for ``"noisy_eye"``.
            project: take the nearest weight that the spectrum can hold.
            weight: a weight to use as it is.

        Raises:
            SpectrumError: a pretrained weight that the spectrum cannot hold, unless ``project``.
            ConversionError: a layer that is not a plain ``nn.Linear``, or an unknown ``method``.
            ShapeError: an unknown ``init`` or ``kind``, a bad rank, or a weight that is not finite.
        """
        check_stock(layer, nn.Linear)
        if weight is None:
            weight = weight_of(
                layer,
                rank,
                kind=kind,
                kernel="flat",
                method=method,
                spectrum=spectrum,
                init=init,
                bound=bound,
                init_std=init_std,
                project=project,
            )
        new = cls(layer.in_features, layer.out_features, bias=False, weight=weight)
        new.bias = cast("nn.Parameter | None", layer.bias)
        return new.train(layer.training)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the stock layer's weight, ``(out_features, in_features)``."""
        return (self.out_features, self.in_features)

    def _stock(self) -> nn.Linear:
        return nn.Linear(self.in_features, self.out_features, bias=False, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer.

        Shape:
            - x: ``(*, in_features)``
            - output: ``(*, out_features)``
        """
        weight, size = self.spectral_weight, x.shape[-1] if x.ndim else 0
        found = self._at_hand(weight, x) if size == self.in_features else None
        if found is None:
            form = self._form(weight, x, False)
            if form == "cores":
                y = weight.tt().matvec(x)
                return y if self.bias is None else y + self.bias.to(y.dtype)
            found = (weight(),) if form == "dense" else weight.factors()
        if len(found) == 2:
            x = nn.functional.linear(x, found[1])
        return nn.functional.linear(x, found[0], self.bias)

    def _form(self, weight: SpectralWeight, x: Tensor, at_hand: bool) -> str:
        count = x.numel() // max(x.shape[-1], 1) if x.ndim else 0
        if not count:
            return "dense"
        plan = linear_plan(weight.shape, count, at_hand, partners(weight))
        return "factors" if plan == "lowrank" else plan

    def extra_repr(self) -> str:
        """As torch's, with rank, method and spectrum."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {self._weight_repr()}"
        )
