"""`SpectralConv2d`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from sttp_manifold._arguments import explained
from sttp_manifold.errors import ConversionError
from sttp_manifold.nn.layer import SpectralLayer
from sttp_manifold.nn.recipe import KernelOptions, takes
from sttp_manifold.nn.weight import SpectralWeight
from sttp_manifold.tt.cost_model import Costs, costs
from sttp_manifold.tt.plans import conv_plan
from sttp_manifold.tt.shape import TTShape

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

__all__ = ["SpectralConv2d"]

# Places of the output from which on only they count, and no call.
_MANY = 1 << 20


class SpectralConv2d(SpectralLayer):
    r"""A convolution whose kernel, read as ``c_out x (c_in / groups k_1 k_2)``, is spectral.

    With ``groups=1`` it is applied as ``r`` kernels from :math:`V^\top` followed by a pointwise
    convolution with :math:`U \operatorname{diag}(s)`, where that is cheaper than to form the
    kernel. The top singular value of the kernel matrix is not the Lipschitz constant of the layer.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: one size or two.
        rank: rank of all bonds, lowered where a bond cannot carry it.
        stride: as in ``torch.nn.Conv2d``, like the next five.
        padding: sizes, ``"valid"`` or ``"same"``.
        dilation: spacing of kernel elements.
        groups: number of blocks.
        bias: whether to add a bias.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        weight: a weight to use, perhaps shared, instead of making one.
        dtype: floating dtype.
        device: device.
        **options: those of a weight (:class:`Recipe`): ``kind``, ``kernel``, ``method``,
            ``spectrum``, ``init``, ``bound``, ``init_std``, ``project``.

    Shape:
        - input: ``(n, c_in, h, w)`` or ``(c_in, h, w)``
        - output: ``(n, c_out, h', w')`` or ``(c_out, h', w')``

    Raises:
        ValueError: settings that ``torch.nn.Conv2d`` refuses.
        ShapeError: a bad rank, an unknown ``kind``, ``kernel`` or ``init``, or a ``weight`` of
            another size or rank.
        ConversionError: an unknown ``method``, or a ``weight`` beside options that make one.
        SpectrumError: an unknown ``spectrum``.

    References:
        [STTP] Sec. 3.1 (kernel as a matrix).

    Example:
        >>> layer = SpectralConv2d(8, 16, 3, rank=4, padding=1)
        >>> layer(torch.randn(2, 8, 5, 5)).shape
        torch.Size([2, 16, 5, 5])
    """

    stock = nn.Conv2d
    spectral_weight: SpectralWeight
    _options = KernelOptions

    @explained
    @takes(KernelOptions)
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        rank: int | None = None,
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        weight: SpectralWeight | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        **options: Unpack[KernelOptions],
    ) -> None:
        super().__init__()
        # torch checks and completes the settings; on "meta" that costs no memory.
        stock = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias=False,
            padding_mode=padding_mode,  # type: ignore[arg-type]
            device="meta",
        )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = cast("tuple[int, int]", tuple(stock.kernel_size))
        self.stride = cast("tuple[int, int]", tuple(stock.stride))
        self.padding: str | tuple[int, int] = (
            stock.padding
            if isinstance(stock.padding, str)
            else cast("tuple[int, int]", tuple(stock.padding))
        )
        self.dilation = cast("tuple[int, int]", tuple(stock.dilation))
        self.groups = groups
        self.padding_mode = padding_mode
        self._hold(self.weight_shape, rank, weight, bias, options, dtype=dtype, device=device)

    @classmethod
    def _around(cls, layer: nn.Conv2d, weights: Mapping[str, Any]) -> Self:
        made = cls(
            layer.in_channels,
            layer.out_channels,
            cast("tuple[int, int]", layer.kernel_size),
            None,
            cast("tuple[int, int]", layer.stride),
            cast("str | tuple[int, int]", layer.padding),
            cast("tuple[int, int]", layer.dilation),
            layer.groups,
            bias=False,
            padding_mode=layer.padding_mode,
            weight=weights["weight"],
        )
        # Torch pads by sizes that it computed when the layer was made, except with zeros.
        sides = [list(c._reversed_padding_repeated_twice) for c in (layer, made._stock())]
        if layer.padding_mode != "zeros" and sides[0] != sides[1]:
            raise ConversionError(
                f"this Conv2d pads by {sides[0]}, from when it was made, and its settings ask for "
                f"{sides[1]}; make it anew with the settings that it is to have"
            )
        return made

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the stock layer's weight, ``(c_out, c_in / groups, k_1, k_2)``."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    def _stock(self) -> nn.Conv2d:
        return nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            bias=False,
            padding_mode=self.padding_mode,  # type: ignore[arg-type]
            device="meta",
        )

    def _thin(self) -> nn.Sequential | None:
        if self.groups > 1:
            return None
        rank = self.spectral_weight.shape.rank
        first = nn.Conv2d(
            self.in_channels,
            rank,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            bias=False,
            padding_mode=self.padding_mode,  # type: ignore[arg-type]
            device="meta",
        )
        return nn.Sequential(
            first, nn.Conv2d(rank, self.out_channels, 1, bias=False, device="meta")
        )

    def _spatial_padding(self) -> list[tuple[int, int]]:
        """Padding before and after each spatial dimension."""
        sizes = list(zip(self.kernel_size, self.dilation, strict=True))
        if self.padding == "same":
            totals = [d * (k - 1) for k, d in sizes]
            return [(total // 2, total - total // 2) for total in totals]
        if isinstance(self.padding, str):
            return [(0, 0) for _ in sizes]
        return [(p, p) for p in self.padding]

    def _positions(self, x: Tensor) -> int:
        """Places at which the kernel is applied."""
        count = x.shape[0] if x.ndim == 4 else 1
        settings = zip(
            x.shape[-2:],
            self.kernel_size,
            self.stride,
            self.dilation,
            self._spatial_padding(),
            strict=True,
        )
        for size, k, stride, dilation, (before, after) in settings:
            count *= max((size + before + after - dilation * (k - 1) - 1) // stride + 1, 0)
        return count

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer.

        Shape:
            - x: ``(n, c_in, h, w)`` or ``(c_in, h, w)``
            - output: ``(n, c_out, h', w')`` or ``(c_out, h', w')``
        """
        weight = self.spectral_weight
        if self._form_for(x) == "dense":
            return self._convolve(x, weight().reshape(self.weight_shape), self.bias)
        us, vt = weight.factors()
        z = self._convolve(x, vt.reshape(-1, *self.weight_shape[1:]), None)
        return nn.functional.conv2d(z, us[..., None, None], self.bias)

    def form_together(self, weight: SpectralWeight) -> str:
        """As is cheaper for many places; see the base class."""
        if self.groups > 1:
            return "dense"
        return _form_for_many(weight.shape, costs())

    def _form(self, x: object) -> str:
        if self.groups > 1 or not isinstance(x, Tensor):
            return "dense"  # of what is no tensor, torch says so
        plan = conv_plan(self.spectral_weight.shape, self._positions(x))
        return "dense" if plan == "dense" else "factors"

    def _convolve(self, x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
        padding: str | int | tuple[int, int] = self.padding
        if self.padding_mode != "zeros":
            # pad takes the last dimension first.
            flat = [side for pair in reversed(self._spatial_padding()) for side in pair]
            x, padding = nn.functional.pad(x, flat, mode=self.padding_mode), 0
        return nn.functional.conv2d(
            x, kernel, bias, self.stride, padding, self.dilation, self.groups
        )

    def extra_repr(self) -> str:
        """As torch's, with rank, method and spectrum."""
        text = (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}"
        )
        defaults = {"padding": (0, 0), "dilation": (1, 1), "groups": 1, "padding_mode": "zeros"}
        for name, default in defaults.items():
            value = getattr(self, name)
            if value != default:
                text += f", {name}={value!r}"
        return f"{text}, bias={self.bias is not None}, {self._weight_repr()}"


@lru_cache(maxsize=1024)
def _form_for_many(shape: TTShape, unit: Costs) -> str:
    return "dense" if conv_plan(shape, _MANY) == "dense" else "factors"
