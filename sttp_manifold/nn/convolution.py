"""What convolutions of all dimensions have in common, transposed ones as well: `Convolution`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from sttp_manifold._arguments import explained
from sttp_manifold.nn.layer import SpectralLayer
from sttp_manifold.nn.recipe import KernelOptions
from sttp_manifold.nn.stack import MatrixView, WeightStack, rows_and_columns
from sttp_manifold.nn.weight import SpectralWeight
from sttp_manifold.tt.cost_model import Costs, costs
from sttp_manifold.tt.plans import conv_plan
from sttp_manifold.tt.shape import TTShape

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["CONVOLVE", "Convolution"]

CONVOLVE = {1: nn.functional.conv1d, 2: nn.functional.conv2d, 3: nn.functional.conv3d}
"""Torch's convolutions by the number of spatial dimensions."""

# Rows and columns of a group that has a weight of its own.
_WIDE = 16
# Places of the output from which on only they count, and no call.
_MANY = 1 << 20


class Convolution(SpectralLayer):
    r"""What convolutions of all dimensions have in common, transposed ones as well.

    The kernel is read as a matrix ``W`` of its first dimension by all others; with ``groups`` of
    at least 16 rows and columns as one matrix for each group, below each other. Where that is
    cheaper than to form it, one factor is applied as a pointwise convolution and the other as one
    with the kernel sizes; how is said by the two bases for plain and for transposed ones.

    Narrower groups are one matrix together: their own ranks would be below anything that a network
    is compressed to, and the factors of a depthwise kernel, of one row a group, are the kernel.

    Attributes:
        dims: number of spatial dimensions.
        settings: names of what torch's constructor takes beside channels, kernel size and bias.
    """

    dims: ClassVar[int]
    settings: ClassVar[tuple[str, ...]] = (
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
    )
    _options = KernelOptions

    spectral_weight: SpectralWeight | WeightStack
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str

    def _make(
        self,
        sizes: tuple[Any, ...],
        settings: Mapping[str, Any],
        rank: int | None,
        weight: SpectralWeight | WeightStack | None,
        bias: bool,
        options: Mapping[str, Any],
        **where: Any,
    ) -> None:
        """Set all that a constructor is given: channels and kernel, settings, weight and bias."""
        # torch checks and completes the settings; on "meta" that costs no memory.
        stock: Any = self._kind().stock(*sizes, **settings, bias=False, device="meta")
        self.in_channels, self.out_channels = stock.in_channels, stock.out_channels
        for name in ("kernel_size", *self.settings):
            value = getattr(stock, name)
            setattr(self, name, value if isinstance(value, (str, int)) else tuple(value))
        view = self.views(stock)["weight"]
        self._hold(view, rank, weight, bias, options, outputs=stock.out_channels, **where)

    @classmethod
    def _around(cls, layer: Any, weights: Mapping[str, Any]) -> Self:
        return cls(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            **{name: getattr(layer, name) for name in cls.settings},
            bias=False,
            weight=weights["weight"],
        )

    def _settings(self) -> dict[str, Any]:
        """Those by which torch makes the stock layer, beside its channels."""
        return {name: getattr(self, name) for name in self.settings}

    def _stock(self) -> Any:
        return self._kind().stock(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            **self._settings(),
            bias=False,
            device="meta",
        )

    @classmethod
    @explained
    def views(cls, layer: nn.Module) -> dict[str, MatrixView]:
        """See the base class."""
        stored, groups = layer._parameters["weight"], layer.groups
        assert stored is not None
        return {"weight": _view(tuple(stored.shape), groups)}  # type: ignore[arg-type]

    @property
    def _has_factors(self) -> bool:
        """Whether the factors can be applied: of all groups, or of each."""
        return self.groups == 1 or isinstance(self.spectral_weight, WeightStack)

    def form_together(self, weight: SpectralWeight) -> str:
        """As is cheaper for many places; see the base class."""
        if not self._has_factors:
            return "dense"
        if torch.compiler.is_compiling():
            return _choose_form(weight.shape, costs())  # a cache is nothing to trace
        return _form_for_many(weight.shape, costs())

    def _form(self, x: object) -> str:
        if not self._has_factors or not isinstance(x, Tensor):
            return "dense"  # of what is no tensor, torch says so
        plan = conv_plan(self.spectral_weight.shape, self._positions(x))
        return "dense" if plan == "dense" else "factors"

    def _positions(self, x: Tensor) -> int:
        """Places at which the kernel is applied."""
        raise NotImplementedError

    def _pointwise(self, matrix: Tensor) -> Tensor:
        """A matrix, or one for each group, as the kernel of a convolution with sizes of one."""
        return matrix.reshape(-1, matrix.shape[-1], *[1] * self.dims)

    def extra_repr(self) -> str:
        """As torch's, with rank, method and spectrum."""
        text = (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}"
        )
        zeros = (0,) * self.dims
        defaults = {
            "padding": zeros,
            "output_padding": zeros,
            "dilation": (1,) * self.dims,
            "groups": 1,
            "padding_mode": "zeros",
        }
        for name, default in defaults.items():
            value = getattr(self, name, default)
            if value != default:
                text += f", {name}={value!r}"
        return f"{text}, bias={self.bias is not None}, {self._weight_repr()}"


def _view(shape: tuple[int, ...], groups: int) -> MatrixView:
    """How a kernel is read: a matrix for each group that is wide enough."""
    view = MatrixView(shape, count=groups)
    rows, columns = rows_and_columns(view.sizes)
    return view if min(rows, columns) >= _WIDE else MatrixView(shape)


def _choose_form(shape: TTShape, unit: Costs) -> str:
    return "dense" if conv_plan(shape, _MANY) == "dense" else "factors"


_form_for_many = lru_cache(maxsize=1024)(_choose_form)
