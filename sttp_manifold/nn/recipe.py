"""The options of a spectral weight: what they are, what they may be, and the weights they make.

Constructors of layers, `from_layer` and `compress` take them by keyword and hand them here, so that
an option is named, documented and checked in one place.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, TypedDict, TypeVar

import torch
from torch import Tensor

from sttp_manifold._arguments import check_among, explained_constructor
from sttp_manifold.errors import ConversionError, ShapeError, SpectrumError
from sttp_manifold.nn.initial import INITS
from sttp_manifold.nn.methods import weight_class
from sttp_manifold.nn.stack import MatrixView, WeightStack
from sttp_manifold.nn.torch_state import has_values, outside_autocast
from sttp_manifold.nn.weight import SpectralWeight
from sttp_manifold.spectrum import SpectrumMap, check_values
from sttp_manifold.tt.decompose import tt_svd
from sttp_manifold.tt.precision import computing_dtype
from sttp_manifold.tt.shape import KERNELS, KINDS, TTShape
from sttp_manifold.tt.spectral import SpectralTT

__all__ = ["KernelOptions", "Recipe", "WeightOptions", "takes"]

PRETRAINED = "pretrained"

F = TypeVar("F", bound=Callable[..., Any])


class WeightOptions(TypedDict, total=False):
    """Options of the weight of a layer, as :class:`Recipe` describes them."""

    kind: str
    method: str
    spectrum: str
    init: str | SpectralTT
    bound: float
    init_std: float
    project: bool
    values: Sequence[float] | None


class KernelOptions(WeightOptions, total=False):
    """Options of a weight that may be the kernel of a convolution."""

    kernel: str


@explained_constructor
@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The options of a spectral weight, checked.

    Args:
        rank: one rank for all bonds, lowered where a bond cannot carry it.
        kind: ``"sttp"`` (prime factors of the sizes as modes) or ``"svdp"`` (one mode a side).
        kernel: modes of a convolution kernel: ``"flat"`` (the product of its sizes as one mode, as
            in the published tables) or ``"factored"`` (their prime factors). Matrices have none.
        method: ``"householder"`` (coordinates of a chart, for any optimizer) or ``"riemannian"`` (a
            point of a manifold, for a Riemannian one).
        spectrum: one of ``identity``, ``free``, ``normalized``, ``bounded``, ``full``, ``fixed``.
        init: ``"eye"``, ``"noisy_eye"``, ``"random"``, a SpectralTT to start from, or, where there
            is a stock layer, ``"pretrained"``: its weight by TT-SVD.
        bound: bound of the spectrum ``"bounded"``; the others have none.
        init_std: deviation for ``"noisy_eye"``.
        project: take the nearest weight that the spectrum can hold, instead of raising.
        values: singular values of the spectrum ``"fixed"``, of which a weight of lower rank takes
            the largest. By default a weight that starts from a value (or from a pretrained weight)
            keeps those it has there, and one that starts anew has them evenly spread up to 1.

    Raises:
        ShapeError: an unknown ``kind``, ``kernel`` or ``init``.
        ConversionError: an unknown ``method``, an ``init_std`` that is no finite number from 0 on,
            a ``project`` that is no bool.
        SpectrumError: an unknown ``spectrum``, a ``bound`` that is not positive and finite, or
            ``values`` that are not positive and finite, or not for ``"fixed"``.

    References:
        [STTP] Sec. 3.

    Example:
        >>> recipe = Recipe(rank=4, spectrum="bounded", bound=0.5)
        >>> recipe.plan((6, 10))
        TTShape(out_modes=(2, 3), in_modes=(2, 5), ranks=(1, 2, 4, 4, 1))
        >>> Recipe.from_dict(recipe.to_dict()) == recipe
        True
    """

    rank: int | None = None
    kind: str = "sttp"
    kernel: str = "flat"
    method: str = "householder"
    spectrum: str = "free"
    init: str | SpectralTT = "noisy_eye"
    bound: float = 1.0
    init_std: float = 1e-4
    project: bool = False
    values: Sequence[float] | None = None

    def __post_init__(self) -> None:
        check_among("kind", self.kind, KINDS)
        check_among("kernel", self.kernel, KERNELS)
        weight_class(self.method)
        SpectrumMap(self.spectrum, 1, self.bound)
        object.__setattr__(self, "values", check_values(self.spectrum, self.values))
        if not isinstance(self.init, SpectralTT) and self.init not in (PRETRAINED, *INITS):
            names = ", ".join(map(repr, (PRETRAINED, *INITS)))
            raise ShapeError(
                f"unknown init {self.init!r}; expected one of {names}, or a SpectralTT such as "
                "tt_svd(W, shape)"
            )
        if not 0 <= self.init_std < float("inf"):
            raise ConversionError(
                f"init_std is a finite deviation from 0 on, as in init_std=1e-4; got "
                f"{self.init_std!r}"
            )
        if not isinstance(self.project, bool):
            raise ConversionError(f"project is True or False, got {self.project!r}")

    @classmethod
    def of(cls, caller: str, kind: type, options: Mapping[str, Any], **defaults: Any) -> Recipe:
        """The recipe of keyword arguments, over defaults.

        Raises:
            TypeError: an argument that is no option, as Python says it of any function.
        """
        known = kind.__annotations__
        for name in options:
            if name not in known:
                raise TypeError(
                    f"{caller}() got an unexpected keyword argument {name!r}; the options of its "
                    f"weight are {', '.join(known)}"
                )
        return cls(**{**defaults, **options})

    def at(self, rank: int) -> Recipe:
        """The same with another rank."""
        return replace(self, rank=rank)

    def plan(self, sizes: Sequence[int]) -> TTShape:
        """The plan for a stock weight ``(d_out, d_in, *kernel)``.

        Raises:
            ShapeError: a rank that is no positive integer.
        """
        return TTShape.for_weight(
            sizes,
            self.rank,  # type: ignore[arg-type]
            kind=self.kind,
            kernel=self.kernel,
        )

    def make(
        self,
        shape: TTShape,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> SpectralWeight:
        """A weight on a plan.

        Args:
            shape: the plan.
            dtype: floating dtype; that of a value as ``init``, or torch's default.
            device: likewise.

        Raises:
            SpectrumError: fewer ``values`` than the plan has singular values.
        """
        where = torch.get_default_device() if device is None else torch.device(device)
        with outside_autocast(where):
            return weight_class(self.method)(
                shape,
                self.spectrum,
                self.init,
                self.bound,
                self.init_std,
                values=self._values_at(shape.rank),
                project=self.project,
                dtype=dtype,
                device=device,
            )

    def _values_at(self, rank: int) -> Sequence[float] | None:
        """The largest given singular values, as many as a rank has."""
        if self.values is None or len(self.values) >= rank:
            return self.values and self.values[:rank]
        raise SpectrumError(
            f"a weight of rank {rank} has {rank} singular values, got {len(self.values)} values; "
            f"give more of them, or rank={len(self.values)}"
        )

    def make_for(self, stock: Tensor, value: SpectralTT | None = None) -> SpectralWeight:
        """A weight in place of a stock one, with its dtype, device and frozen state.

        Args:
            stock: the stock weight.
            value: what ``"pretrained"`` takes in place of its TT-SVD.

        Shape:
            - stock: ``(d_out, d_in, *kernel)``

        Raises:
            ConversionError: ``"pretrained"`` for a tensor that holds no numbers.
            ShapeError: ``"pretrained"`` for numbers that are not finite.
            SpectrumError: a weight that the spectrum cannot hold, unless ``project``.
        """
        recipe, shape = self, self.plan(stock.shape)
        if self.init == PRETRAINED and not has_values(stock):
            raise ConversionError(
                f"its weight holds no numbers to start from (device {stock.device.type!r}, "
                f"{type(stock).__name__}); load the model first, or start anew with "
                "init='noisy_eye'"
            )
        if self.init == PRETRAINED:
            if value is None:
                matrix = stock.detach().flatten(1)
                with outside_autocast(stock.device):
                    value = tt_svd(matrix.to(computing_dtype(matrix.dtype)), shape)
            recipe = replace(self, init=value)
        return recipe.make(shape, stock.dtype, stock.device).requires_grad_(stock.requires_grad)

    def make_all(self, view: MatrixView, **where: Any) -> SpectralWeight | WeightStack:
        """A weight, or a stack of equal ones, for a parameter that is read so.

        Args:
            view: how the parameter is read.
            **where: dtype and device.
        """
        plan = self.plan(view.sizes)
        if view.count == 1:
            return self.make(plan, **where)
        return WeightStack([self.make(plan, **where) for _ in range(view.count)])

    def make_behind(
        self, stock: Tensor, view: MatrixView, values: Sequence[SpectralTT] | None = None
    ) -> SpectralWeight | WeightStack:
        """As :meth:`make_for`, for a parameter that is several matrices or a transposed one.

        Args:
            stock: the parameter.
            view: how it is read.
            values: one for each matrix, as for :meth:`make_for`.

        Shape:
            - stock: ``view.shape``

        Raises:
            ConversionError: as for :meth:`make_for`.
            ShapeError: as for :meth:`make_for`.
            SpectrumError: as for :meth:`make_for`.
        """
        each = [None] * view.count if values is None else values
        made = [self.make_for(m, value) for m, value in zip(view.split(stock), each, strict=True)]
        for weight in made:  # a view that is made without gradient says nothing of it
            weight.requires_grad_(stock.requires_grad)
        return made[0] if view.count == 1 else WeightStack(made)

    def to_dict(self) -> dict[str, Any]:
        """The options as a dict that JSON can hold.

        Raises:
            ConversionError: a value as ``init``, which belongs in a state dict.
        """
        if isinstance(self.init, SpectralTT):
            raise ConversionError(
                "a recipe whose init is a SpectralTT is no plain dict; keep the value by "
                "weight.state_dict() and the options by replace(recipe, init='eye').to_dict()"
            )
        return asdict(self)

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> Recipe:
        """The recipe of such a dict; what it does not name is as by default.

        Raises:
            ConversionError: a key that is no option.
        """
        known = [field.name for field in fields(cls)]
        unknown = [key for key in options if key not in known]
        if unknown:
            raise ConversionError(
                f"no options of a weight: {', '.join(map(repr, unknown))}; there are "
                f"{', '.join(known)}"
            )
        return cls(**options)


def takes(kind: type, **defaults: Any) -> Callable[[F], F]:
    """Show the options of a weight one by one in the signature of a function that takes them.

    Args:
        kind: :class:`WeightOptions` or :class:`KernelOptions`.
        defaults: where they differ from those of :class:`Recipe`.
    """
    values = {field.name: field.default for field in fields(Recipe)} | defaults
    options = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=values[name],
            annotation=getattr(annotation, "__forward_arg__", annotation),
        )
        for name, annotation in kind.__annotations__.items()
    ]

    def mark(function: F) -> F:
        signature = inspect.signature(function)
        *own, _ = signature.parameters.values()
        function.__signature__ = signature.replace(parameters=[*own, *options])  # type: ignore[attr-defined]
        return function

    return mark
