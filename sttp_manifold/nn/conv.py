"""Convolutions: `SpectralConv1d`, `SpectralConv2d` and `SpectralConv3d`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sttp_manifold._arguments import explained
from sttp_manifold.errors import ConversionError
from sttp_manifold.nn.convolution import CONVOLVE, Convolution
from sttp_manifold.nn.recipe import KernelOptions, takes
from sttp_manifold.nn.stack import WeightStack
from sttp_manifold.nn.weight import SpectralWeight

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

__all__ = ["SpectralConv1d", "SpectralConv2d", "SpectralConv3d"]


class _Plain(Convolution):
    r"""Applied as ``r`` kernels from :math:`V^\top`, then pointwise by :math:`U S`."""

    @explained
    @takes(KernelOptions)
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        rank: int | None = None,
        stride: int | tuple[int, ...] = 1,
        padding: str | int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        weight: SpectralWeight | WeightStack | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        **options: Unpack[KernelOptions],
    ) -> None:
        super().__init__()
        settings = {
            "stride": stride,
            "padding": padding,
            "dilation": dilation,
            "groups": groups,
            "padding_mode": padding_mode,
        }
        sizes = (in_channels, out_channels, kernel_size)
        self._make(sizes, settings, rank, weight, bias, options, dtype=dtype, device=device)

    @classmethod
    def _around(cls, layer: Any, weights: Mapping[str, Any]) -> Self:
        made = super()._around(layer, weights)
        # Torch pads by sizes that it computed when the layer was made, except with zeros.
        sides = [list(c._reversed_padding_repeated_twice) for c in (layer, made._stock())]
        if layer.padding_mode != "zeros" and sides[0] != sides[1]:
            raise ConversionError(
                f"this {cls.stock.__name__} pads by {sides[0]}, from when it was made, and its "
                f"settings ask for {sides[1]}; make it anew with the settings that it is to have"
            )
        return made

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the stock layer's weight, ``(c_out, c_in / groups, *kernel_size)``."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    def _thin(self) -> nn.Sequential | None:
        if not self._has_factors:
            return None
        stock: Any = self._kind().stock
        rank = self.groups * self.spectral_weight.shape.rank
        first = stock(
            self.in_channels,
            rank,
            self.kernel_size,
            **self._settings(),
            bias=False,
            device="meta",
        )
        second = stock(rank, self.out_channels, 1, groups=self.groups, bias=False, device="meta")
        return nn.Sequential(first, second)

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
        count = x.shape[0] if x.ndim == self.dims + 2 else 1
        settings = zip(
            x.shape[-self.dims :],
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
            - x: ``(n, c_in, *size)`` or ``(c_in, *size)``
            - output: ``(n, c_out, *size')`` or ``(c_out, *size')``
        """
        weight = self.spectral_weight
        if self._form_for(x) == "dense":
            return self._convolve(x, weight().reshape(self.weight_shape), self.bias)
        us, vt = weight.factors()
        z = self._convolve(x, vt.reshape(-1, *self.weight_shape[1:]), None)
        return CONVOLVE[self.dims](z, self._pointwise(us), self.bias, groups=self.groups)

    def _convolve(self, x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            # pad takes the last dimension first.
            flat = [side for pair in reversed(self._spatial_padding()) for side in pair]
            x, padding = nn.functional.pad(x, flat, mode=self.padding_mode), 0
        return CONVOLVE[self.dims](
            x, kernel, bias, self.stride, padding, self.dilation, self.groups
        )


class SpectralConv1d(_Plain):
    r"""A convolution over sequences whose kernel, ``c_out x (c_in / groups k)``, is spectral.

    As :class:`SpectralConv2d` in one dimension.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: one size.
        rank: rank of all bonds, lowered where a bond cannot carry it.
        stride: as in ``torch.nn.Conv1d``, like the next five.
        padding: a size, ``"valid"`` or ``"same"``.
        dilation: spacing of kernel elements.
        groups: number of blocks.
        bias: whether to add a bias.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        weight: a weight to use, perhaps shared, instead of making one.
        dtype: floating dtype.
        device: device.
        **options: those of a weight, as for :class:`SpectralConv2d`.

    Shape:
        - input: ``(n, c_in, l)`` or ``(c_in, l)``
        - output: ``(n, c_out, l')`` or ``(c_out, l')``

    Raises:
        ValueError, ShapeError, ConversionError, SpectrumError: as :class:`SpectralConv2d`.

    References:
        [STTP] Sec. 3.1 (kernel as a matrix).

    Example:
        >>> layer = SpectralConv1d(8, 16, 3, rank=4, padding="same")
        >>> layer(torch.randn(2, 8, 5)).shape
        torch.Size([2, 16, 5])
    """

    stock = nn.Conv1d
    dims = 1


class SpectralConv2d(_Plain):
    r"""A convolution whose kernel, read as ``c_out x (c_in / groups k_1 k_2)``, is spectral.

    It is applied as ``r`` kernels from :math:`V^\top` followed by a pointwise convolution with
    :math:`U \operatorname{diag}(s)`, where that is cheaper than to form the kernel. With ``groups``
    of at least 16 channels each has a weight of its own (``spectral_weight`` is a stack of them),
    and its own ``rank``; narrower ones, and depthwise kernels, are one matrix, which is formed. The
    top singular value of the kernel matrix is not the Lipschitz constant of the layer.

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
    dims = 2


class SpectralConv3d(_Plain):
    r"""A convolution over volumes whose kernel, ``c_out x (c_in / groups k)``, is spectral.

    As :class:`SpectralConv2d` in three dimensions, with :math:`k = k_1 k_2 k_3`.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: one size or three.
        rank: rank of all bonds, lowered where a bond cannot carry it.
        stride: as in ``torch.nn.Conv3d``, like the next five.
        padding: sizes, ``"valid"`` or ``"same"``.
        dilation: spacing of kernel elements.
        groups: number of blocks.
        bias: whether to add a bias.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        weight: a weight to use, perhaps shared, instead of making one.
        dtype: floating dtype.
        device: device.
        **options: those of a weight, as for :class:`SpectralConv2d`.

    Shape:
        - input: ``(n, c_in, d, h, w)`` or ``(c_in, d, h, w)``
        - output: ``(n, c_out, d', h', w')`` or ``(c_out, d', h', w')``

    Raises:
        ValueError, ShapeError, ConversionError, SpectrumError: as :class:`SpectralConv2d`.

    References:
        [STTP] Sec. 3.1 (kernel as a matrix).

    Example:
        >>> layer = SpectralConv3d(8, 16, 3, rank=4, padding=1)
        >>> layer(torch.randn(2, 8, 5, 5, 5)).shape
        torch.Size([2, 16, 5, 5, 5])
    """

    stock = nn.Conv3d
    dims = 3
