"""Transposed convolutions: `SpectralConvTranspose1d`, `2d` and `3d`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sttp_manifold._arguments import explained
from sttp_manifold.errors import ShapeError
from sttp_manifold.nn.convolution import CONVOLVE, Convolution
from sttp_manifold.nn.recipe import KernelOptions, takes
from sttp_manifold.nn.stack import WeightStack
from sttp_manifold.nn.weight import SpectralWeight

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["SpectralConvTranspose1d", "SpectralConvTranspose2d", "SpectralConvTranspose3d"]

_CONVOLVE_BACK = {
    1: nn.functional.conv_transpose1d,
    2: nn.functional.conv_transpose2d,
    3: nn.functional.conv_transpose3d,
}


class _Transposed(Convolution):
    r"""Applied pointwise by :math:`(U S)^\top`, then with ``r`` kernels from :math:`V^\top`."""

    settings = (*Convolution.settings, "output_padding")

    padding: tuple[int, ...]
    output_padding: tuple[int, ...]

    @explained
    @takes(KernelOptions)
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        rank: int | None = None,
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] = 0,
        output_padding: int | tuple[int, ...] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | tuple[int, ...] = 1,
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
            "output_padding": output_padding,
            "groups": groups,
            "dilation": dilation,
            "padding_mode": padding_mode,
        }
        sizes = (in_channels, out_channels, kernel_size)
        self._make(sizes, settings, rank, weight, bias, options, dtype=dtype, device=device)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the stock layer's weight, ``(c_in, c_out / groups, *kernel_size)``."""
        return (self.in_channels, self.out_channels // self.groups, *self.kernel_size)

    def _thin(self) -> nn.Sequential | None:
        if not self._has_factors:
            return None
        rank = self.groups * self.spectral_weight.shape.rank
        plain: Any = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[self.dims]
        first = plain(self.in_channels, rank, 1, groups=self.groups, bias=False, device="meta")
        second: Any = self._kind().stock(
            rank, self.out_channels, self.kernel_size, **self._settings(), bias=False, device="meta"
        )
        return nn.Sequential(first, second)

    thin_roles = ("u", "vt")

    def _thin_factors(self, us: Tensor, vt: Tensor) -> tuple[Tensor, Tensor]:
        return us.mT, vt

    def _positions(self, x: Tensor) -> int:
        # Each place of the input is met by the kernel once.
        count = x.shape[0] if x.ndim == self.dims + 2 else 1
        for size in x.shape[-self.dims :]:
            count *= size
        return count

    def forward(self, x: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """Apply the layer.

        Args:
            x: the input.
            output_size: spatial sizes of the output, with or without those of batch and channels
                before them; by default those that ``output_padding`` gives.

        Shape:
            - x: ``(n, c_in, *size)`` or ``(c_in, *size)``
            - output: ``(n, c_out, *size')`` or ``(c_out, *size')``

        Raises:
            ShapeError: sizes that the stride cannot give; a ``ValueError`` as well, as torch's.
        """
        more = self.output_padding if output_size is None else self._padding_for(x, output_size)
        weight = self.spectral_weight
        if self._form_for(x) == "dense":
            return self._convolve(x, weight().reshape(self.weight_shape), more)
        us, vt = weight.factors()
        z = CONVOLVE[self.dims](x, self._pointwise(us.mT), groups=self.groups)
        return self._convolve(z, vt.reshape(-1, *self.weight_shape[1:]), more)

    def _convolve(self, x: Tensor, kernel: Tensor, output_padding: tuple[int, ...]) -> Tensor:
        return _CONVOLVE_BACK[self.dims](
            x,
            kernel,
            self.bias,
            self.stride,
            self.padding,
            output_padding,
            self.groups,
            self.dilation,
        )

    def _padding_for(self, x: Tensor, output_size: Sequence[int]) -> tuple[int, ...]:
        """Padding of the output that gives it a size: below the stride in each dimension."""
        wanted = tuple(output_size)
        leading = x.ndim - self.dims
        if len(wanted) not in (self.dims, self.dims + leading):
            raise ShapeError(
                f"output_size has {self.dims} numbers, or {self.dims + leading} with those before "
                f"the spatial ones, for an input of shape {tuple(x.shape)}; got {wanted}"
            )
        wanted = wanted[-self.dims :]
        settings = zip(
            x.shape[-self.dims :],
            self.stride,
            self.padding,
            self.dilation,
            self.kernel_size,
            strict=True,
        )
        least = [(size - 1) * s - 2 * p + d * (k - 1) + 1 for size, s, p, d, k in settings]
        more = tuple(size - low for size, low in zip(wanted, least, strict=True))
        if any(m < 0 or m >= s for m, s in zip(more, self.stride, strict=True)):
            ranges = [f"{low} to {low + s - 1}" for low, s in zip(least, self.stride, strict=True)]
            raise ShapeError(
                f"output_size {wanted} cannot be reached from an input of shape {tuple(x.shape)}: "
                f"the sizes there are {', '.join(ranges)}"
            )
        return more


class SpectralConvTranspose1d(_Transposed):
    r"""A transposed convolution over sequences, as :class:`SpectralConvTranspose2d`.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: one size.
        rank: rank of all bonds, lowered where a bond cannot carry it.
        stride: as in ``torch.nn.ConvTranspose1d``, like the next six.
        padding: what is cut off at both ends.
        output_padding: what is added at one end.
        groups: number of blocks.
        bias: whether to add a bias.
        dilation: spacing of kernel elements.
        padding_mode: ``"zeros"``, the only one that torch has.
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
        >>> layer = SpectralConvTranspose1d(8, 16, 4, rank=4, stride=2, padding=1)
        >>> layer(torch.randn(2, 8, 5)).shape
        torch.Size([2, 16, 10])
    """

    stock = nn.ConvTranspose1d
    dims = 1


class SpectralConvTranspose2d(_Transposed):
    r"""A transposed convolution whose kernel, ``c_in x (c_out / groups k_1 k_2)``, is spectral.

    That is the matrix of the convolution of which it is the transpose. It is applied as a pointwise
    convolution with :math:`(U \operatorname{diag}(s))^\top` and then as a transposed one with ``r``
    kernels from :math:`V^\top`, where that is cheaper than to form the kernel; ``groups`` are as
    for :class:`SpectralConv2d`.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: one size or two.
        rank: rank of all bonds, lowered where a bond cannot carry it.
        stride: as in ``torch.nn.ConvTranspose2d``, like the next six.
        padding: what is cut off at all sides.
        output_padding: what is added at one side of each dimension.
        groups: number of blocks.
        bias: whether to add a bias.
        dilation: spacing of kernel elements.
        padding_mode: ``"zeros"``, the only one that torch has.
        weight: a weight to use, perhaps shared, instead of making one.
        dtype: floating dtype.
        device: device.
        **options: those of a weight, as for :class:`SpectralConv2d`.

    Shape:
        - input: ``(n, c_in, h, w)`` or ``(c_in, h, w)``
        - output: ``(n, c_out, h', w')`` or ``(c_out, h', w')``

    Raises:
        ValueError, ShapeError, ConversionError, SpectrumError: as :class:`SpectralConv2d`.

    References:
        [STTP] Sec. 3.1 (kernel as a matrix).

    Example:
        >>> layer = SpectralConvTranspose2d(8, 16, 4, rank=4, stride=2, padding=1)
        >>> layer(torch.randn(2, 8, 5, 5)).shape
        torch.Size([2, 16, 10, 10])
    """

    stock = nn.ConvTranspose2d
    dims = 2


class SpectralConvTranspose3d(_Transposed):
    r"""A transposed convolution over volumes, as :class:`SpectralConvTranspose2d`.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: one size or three.
        rank: rank of all bonds, lowered where a bond cannot carry it.
        stride: as in ``torch.nn.ConvTranspose3d``, like the next six.
        padding: what is cut off at all sides.
        output_padding: what is added at one side of each dimension.
        groups: number of blocks.
        bias: whether to add a bias.
        dilation: spacing of kernel elements.
        padding_mode: ``"zeros"``, the only one that torch has.
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
        >>> layer = SpectralConvTranspose3d(8, 16, 4, rank=4, stride=2, padding=1)
        >>> layer(torch.randn(2, 8, 3, 3, 3)).shape
        torch.Size([2, 16, 6, 6, 6])
    """

    stock = nn.ConvTranspose3d
    dims = 3
