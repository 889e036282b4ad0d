"""A parameter as matrices: how it is read, and several spectral weights of a shape in its place."""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from sttp_manifold._arguments import explained, explained_constructor
from sttp_manifold.errors import ConversionError, ShapeError, SttpError
from sttp_manifold.nn.torch_state import has_values
from sttp_manifold.nn.weight import SpectralWeight, formed_each
from sttp_manifold.tt.shape import TTShape
from sttp_manifold.tt.spectral import SpectralTT

__all__ = ["Held", "MatrixView", "WeightStack", "encode_each", "parts_of"]


@explained_constructor
@dataclass(frozen=True)
class MatrixView:
    """How a parameter of a stock layer is read as one matrix, or as several of one shape.

    The parameter is cut along its first dimension into ``count`` equal tensors; the dimensions of
    each, in another order if one is given, are ``(d_out, d_in, *kernel)``.

    Args:
        shape: of the parameter.
        count: how many matrices.
        stacked: whether the first dimension counts the matrices, and is none of theirs, as in the
            ``(experts, d_out, d_in)`` of a stack of experts. Otherwise they lie below each other,
            as in the ``(groups c_out, c_in, k)`` of a grouped convolution.
        order: the dimensions of one of them in the order ``(d_out, d_in, *kernel)``, as ``(1, 0)``
            for one that is stored transposed; by default as they are.
        rows: how many dimensions, in that order, are its rows; by default the first one is.

    Raises:
        ShapeError: what cannot be cut so, or is no matrix then.

    Example:
        >>> MatrixView((12, 4), count=3).sizes  # query, key and value below each other
        (4, 4)
        >>> MatrixView((8, 32, 16), count=8, stacked=True).sizes  # eight experts
        (32, 16)
        >>> MatrixView((16, 32), order=(1, 0)).sizes  # stored transposed
        (32, 16)
        >>> MatrixView((4, 6, 8), rows=2).sizes  # four bilinear forms
        (24, 8)
    """

    shape: tuple[int, ...]
    count: int = 1
    stacked: bool = False
    order: tuple[int, ...] | None = None
    rows: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(map(operator.index, self.shape)))
        if self.order is not None:
            object.__setattr__(self, "order", tuple(map(operator.index, self.order)))
        if not isinstance(self.stacked, bool):
            raise ShapeError(f"stacked is True or False, got {self.stacked!r}")
        for name in ("count", "rows"):
            object.__setattr__(self, name, operator.index(getattr(self, name)))
        first = self.shape[0] if self.shape else 0
        wanted = first == self.count if self.stacked else first % max(self.count, 1) == 0
        if not self.shape or self.count < 1 or not wanted:
            raise ShapeError(
                f"{self.shape} is not {self.count} equal matrices "
                f"{'one for each index' if self.stacked else 'below each other'}"
            )
        numbers = range(len(self.inner))
        if sorted(self.order or numbers) != [*numbers] or not 0 < self.rows < len(numbers):
            raise ShapeError(
                f"each matrix has dimensions (d_out, d_in, *kernel), got {self.inner}"
                + (f" in the order {self.order}" if self.order else "")
                + (f", of which {self.rows} are rows" if self.rows != 1 else "")
            )

    @property
    def inner(self) -> tuple[int, ...]:
        """Shape of one matrix as it is stored."""
        if self.stacked:
            return self.shape[1:]
        return (self.shape[0] // self.count, *self.shape[1:])

    @property
    def sizes(self) -> tuple[int, ...]:
        """``(d_out, d_in, *kernel)`` of each matrix, from which a plan is made."""
        ordered = self._ordered
        return (math.prod(ordered[: self.rows]), *ordered[self.rows :])

    @property
    def _ordered(self) -> tuple[int, ...]:
        return tuple(self.inner[k] for k in self.order) if self.order else self.inner

    @explained
    def split(self, parameter: Tensor) -> Tensor:
        """The matrices, as a view where that is possible.

        Shape:
            - parameter: ``shape``
            - output: ``(count, d_out, d_in, *kernel)``

        Raises:
            ShapeError: another shape.
        """
        if tuple(parameter.shape) != self.shape:
            raise ShapeError(
                f"the parameter has shape {self.shape}, got one of {tuple(parameter.shape)}"
            )
        each = parameter.reshape(self.count, *self.inner)
        if self.order:
            each = each.permute(0, *(k + 1 for k in self.order))
        return each if self.rows == 1 else each.flatten(1, self.rows)

    @explained
    def join(self, matrices: Tensor) -> Tensor:
        """The parameter of its matrices; differentiable.

        Shape:
            - matrices: ``(count, d_out, d_in)``, or ``(d_out, d_in)`` of a single one; ``d_in`` may
              be several dimensions
            - output: ``shape``

        Raises:
            ShapeError: another number of entries.
        """
        if matrices.numel() != math.prod(self.shape):
            raise ShapeError(
                f"{self.count} matrices of {self.sizes} have {math.prod(self.shape)} entries, got "
                f"a tensor of {tuple(matrices.shape)}"
            )
        return self.joined(matrices)

    def joined(self, matrices: Tensor) -> Tensor:
        """As :meth:`join`, for what is known to fit; compiled as a part of forwards.

        Shape:
            - matrices: as there
            - output: ``shape``
        """
        if self.order is None:
            return matrices.reshape(self.shape)
        each = matrices.reshape(self.count, *self._ordered)
        back = [self.order.index(k) + 1 for k in range(len(self.order))]
        return each.permute(0, *back).reshape(self.shape)


class WeightStack(nn.ModuleList):
    """Spectral weights of one plan and method in the place of one parameter.

    Equal frames are computed by one call (:mod:`sttp_manifold.nn.frame_batch`).

    Args:
        weights: two or more spectral weights; the same one may come several times.

    Raises:
        ShapeError: none at all, or weights of different plans.
        ConversionError: of different methods or spectra.

    Example:
        >>> from sttp_manifold.nn import HouseholderWeight
        >>> plan = TTShape.for_matrix(6, 4, rank=2)
        >>> WeightStack([HouseholderWeight(plan) for _ in range(3)])().shape
        torch.Size([3, 6, 4])
    """

    @explained
    def __init__(self, weights: Sequence[SpectralWeight]) -> None:
        weights = list(weights)
        if not weights or not all(isinstance(weight, SpectralWeight) for weight in weights):
            raise ShapeError(
                f"a WeightStack takes spectral weights, got {[type(w).__name__ for w in weights]}; "
                "make_weight('householder', shape) makes one"
            )
        if len({weight.shape for weight in weights}) > 1:
            plans = ", ".join(sorted({str(weight.shape) for weight in weights}))
            raise ShapeError(f"the weights of a stack have one plan, got {plans}")
        if len({(weight.method, weight.spectrum) for weight in weights}) > 1:
            raise ConversionError("the weights of a stack have one method and one spectrum")
        super().__init__(weights)

    @property
    def parts(self) -> tuple[SpectralWeight, ...]:
        """The weights."""
        return tuple(self._modules.values())  # type: ignore[arg-type]

    @property
    def shape(self) -> TTShape:
        """Plan of each."""
        return self.parts[0].shape

    @property
    def method(self) -> str:
        """Method of each."""
        return self.parts[0].method

    @property
    def spectrum(self) -> str:
        """Spectrum of each."""
        return self.parts[0].spectrum

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters."""
        return self.parts[0].dtype

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.parts[0].device

    @property
    def trainable(self) -> bool:
        """Whether any parameter is."""
        return any(weight.trainable for weight in self.parts)

    def forward(self) -> Tensor:
        """The dense weights.

        Shape:
            - output: ``(n, d_out, d_in)``
        """
        return torch.stack([dense for (dense,) in formed_each(self.parts, "dense")])

    def factors(self) -> tuple[Tensor, Tensor]:
        """The two factors of each weight.

        Shape:
            - first: ``(n, d_out, r)``
            - second: ``(n, r, d_in)``
        """
        left, right = zip(*formed_each(self.parts, "factors"), strict=True)
        return torch.stack(left), torch.stack(right)

    @explained
    def encode_(self, tt: SpectralTT, project: bool = False) -> WeightStack:
        """Take over one value for each weight, in place; as :meth:`SpectralWeight.encode_` of each.

        If one of them fails, nothing has changed.

        Args:
            tt: the values, a batch of them on the plan of the stack, as ``tt_svd`` makes of dense
                matrices of shape ``(n, d_out, d_in)``.
            project: take the nearest weights that the spectrum can hold.

        Shape:
            - tt: a batch of ``(n,)``

        Returns:
            The module itself.

        Raises:
            ConversionError: different values for a weight that is in the stack several times.
            ShapeError: no batch of ``n`` values, another plan, or cores that are not orthonormal.
            SpectrumError: a value that the spectrum cannot hold, unless ``project``.

        Example:
            >>> import sttp_manifold as sm
            >>> stack = sm.nn.SpectralConv1d(32, 32, 3, rank=2, groups=2).spectral_weight
            >>> W = torch.randn(2, stack.shape.d_out, stack.shape.d_in)
            >>> stack = stack.encode_(sm.tt_svd(W, stack.shape))
        """
        count, value = len(self.parts), cast("object", tt)
        given = type(value).__name__
        if isinstance(value, SpectralTT):
            given = f"one with a batch of {tuple(tt.batch_shape)}"
        if not isinstance(value, SpectralTT) or tuple(tt.batch_shape) != (count,):
            raise ShapeError(
                f"a stack of {count} weights takes a SpectralTT with a batch of ({count},), as "
                f"stack.encode_(tt_svd(W, stack.shape)) of W with shape ({count}, "
                f"{self.shape.d_out}, {self.shape.d_in}); got {given}"
            )
        encode_each(self, [_one_of(tt, i) for i in range(count)], project)
        return self


def _one_of(tt: SpectralTT, i: int) -> SpectralTT:
    left, right = (tuple(core[i] for core in cores) for cores in (tt.left, tt.right))
    return SpectralTT(left, tt.spectrum[i], right, tt.shape)


def encode_each(
    held: SpectralWeight | WeightStack, values: Sequence[SpectralTT], project: bool = False
) -> None:
    """Take over one value for each spectral weight in the place of a parameter; all or none.

    Args:
        held: the weight or weights.
        values: one for each.
        project: take the nearest weights that the spectrum can hold.

    Raises:
        ConversionError: different values for a weight that is there several times.
        ShapeError: as :meth:`SpectralWeight.encode_`.
        SpectrumError: likewise.
    """
    before: dict[SpectralWeight, SpectralWeight] = {}
    first: dict[SpectralWeight, SpectralTT] = {}
    try:
        for weight, value in zip(parts_of(held), values, strict=True):
            if weight in first and not value.allclose(first[weight]):
                raise ConversionError(
                    "the same weight is in the stack several times, and was to hold different "
                    "values; give each place a weight of its own first"
                )
            first.setdefault(weight, value)
            if weight not in before:
                before[weight] = copy.deepcopy(weight)
                weight.encode_(value, project)
    except SttpError:
        for weight, old in before.items():
            for name, tensor in old.state_dict(keep_vars=True).items():
                now = weight.state_dict(keep_vars=True)[name]
                if isinstance(now, Tensor) and isinstance(tensor, Tensor) and has_values(now):
                    now.detach().copy_(tensor)
        raise


Held = SpectralWeight | WeightStack
"""What stands in the place of one parameter."""


def parts_of(held: SpectralWeight | WeightStack) -> tuple[SpectralWeight, ...]:
    """The spectral weights in the place of one parameter."""
    return held.parts if isinstance(held, WeightStack) else (held,)


def named_parts(
    held: dict[str, SpectralWeight | WeightStack],
) -> Iterator[tuple[str, SpectralWeight]]:
    """Each spectral weight with the name of its parameter, and its number in a stack."""
    for name, one in held.items():
        if isinstance(one, WeightStack):
            for i, weight in enumerate(one.parts):
                yield f"{name}.{i}", weight
        else:
            yield name, one


def rows_and_columns(sizes: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of the matrix of such sizes."""
    return sizes[0], math.prod(sizes[1:])
