"""`SpectralLayer`, what layers of spectral weights have in common."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from sttp_manifold._arguments import explained
from sttp_manifold.errors import ConversionError, ShapeError
from sttp_manifold.nn.carry import carry_over, check_stock, mark_like
from sttp_manifold.nn.dense_parameter import check_replaceable, dense_parameter
from sttp_manifold.nn.formed import form_of
from sttp_manifold.nn.given import check_fits, check_given
from sttp_manifold.nn.recipe import PRETRAINED, KernelOptions, Recipe, WeightOptions, takes
from sttp_manifold.nn.stack import MatrixView, WeightStack, named_parts, parts_of
from sttp_manifold.nn.weight import SpectralWeight
from sttp_manifold.nn.written import holder_of, nearest_by, no_parameter, shown, take_over

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

__all__ = ["SpectralLayer"]

M = TypeVar("M", bound=nn.Module)


class SpectralLayer(nn.Module, ABC):
    """What the layers have in common: spectral weights and perhaps a bias.

    A layer says which stock one it stands for (``stock``), which parameters of that one it holds as
    spectral weights (``holds``: name there to attribute here) and how each is read as matrices
    (``views``), how it is made around such weights (``_around``), and how the stock one is made
    (``_stock``).

    Attributes:
        stock: type of the stock layer.
        holds: names of its parameters that are spectral weights here, each with the attribute.
        spectral_weight: the module that holds the weight, or a stack of equal ones.
        bias: ``(d_out,)`` or None.
    """

    stock: ClassVar[type[nn.Module]]
    holds: ClassVar[Mapping[str, str]] = {"weight": "spectral_weight"}
    _options: ClassVar[type] = WeightOptions
    own_buffers: ClassVar[tuple[str, ...]] = ()
    """Buffers that the stock layer has not; each may be None."""

    spectral_weight: Any
    bias: Tensor | None
    _came_from: type[nn.Module] | None = None  # a subclass of the stock layer that was registered

    @classmethod
    @explained
    def views(cls, layer: nn.Module) -> dict[str, MatrixView]:
        """How each parameter of a stock layer that is held here is read, by its name.

        One matrix ``(d_out, d_in, *kernel)`` by default. A parameter that is several matrices, or
        a transposed one, is said here: as in ``MatrixView(shape, count=groups)``.
        """
        return {
            name: MatrixView(tuple(tensor.shape))
            for name in cls.holds
            if (tensor := layer._parameters.get(name)) is not None
        }

    @classmethod
    @abstractmethod
    def _around(cls, layer: Any, weights: Mapping[str, Any]) -> Self:
        """The layer with the settings of a stock one and with given weights, without bias."""

    @property
    def held(self) -> dict[str, SpectralWeight | WeightStack]:
        """What stands for each parameter of the stock layer, by its name there."""
        found = {name: getattr(self, attribute) for name, attribute in self.holds.items()}
        return {name: held for name, held in found.items() if held is not None}

    @explained
    def view_of(self, name: str) -> MatrixView:
        """How a parameter of the stock layer, that is spectral weights here, is read.

        Raises:
            ConversionError: a name that is not held here.
        """
        views = self._kind().views(self._stock())
        if name not in views:
            raise ConversionError(
                f"{type(self).__name__} holds {', '.join(map(repr, views))}, got {name!r}"
            )
        return views[name]

    @explained
    def shape_of(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter of the stock layer that is spectral weights here.

        Raises:
            ConversionError: a name that is not held here.
        """
        return self.view_of(name).shape

    @classmethod
    @explained
    @takes(KernelOptions, init=PRETRAINED)
    def from_layer(
        cls,
        layer: nn.Module,
        rank: int | None = None,
        *,
        weight: SpectralWeight | WeightStack | None = None,
        **options: Unpack[KernelOptions],
    ) -> Self:
        """The spectral layer of a stock one.

        Dtype, device, training mode, frozen weights, hooks and whatever else hangs on the layer are
        kept, and the bias is the same object.

        Args:
            layer: the stock layer; it is not changed.
            rank: rank of all bonds.
            weight: a weight to use as it is, instead of making one.
            **options: those of a weight (:class:`Recipe`), with ``init="pretrained"`` by default,
                which takes the layer's weight by TT-SVD.

        Raises:
            SpectrumError: a pretrained weight that the spectrum cannot hold, unless ``project``.
            ConversionError: a layer of another type, one whose weight is computed from other
                parameters or holds no numbers, one with something on it that cannot be carried over
                (such as a ``forward`` of its own), or an unknown ``method``.
            ShapeError: an unknown ``init``, ``kind`` or ``kernel``, a bad rank, or a weight that is
                not finite.
        """
        check_stock(layer, cls.stock, cls.holds)
        caller = f"{cls.__name__}.from_layer"
        recipe = Recipe.of(caller, cls._options, options, init=PRETRAINED, rank=rank)
        if weight is not None:
            check_given(caller, weight, options)
        elif rank is None:
            raise ShapeError(f"{caller} needs a rank, as in {caller}(layer, rank=16)")
        weights = {
            name: recipe.make_behind(layer._parameters[name], view) if weight is None else weight  # type: ignore[arg-type]
            for name, view in cls.views(layer).items()
        }
        return cls.in_place_of(layer, weights, copied=True)

    @classmethod
    @explained
    def in_place_of(
        cls,
        layer: nn.Module,
        weights: Mapping[str, SpectralWeight | WeightStack],
        copied: bool = False,
    ) -> Self:
        """The layer around given weights, with what hangs on the stock one whose place it takes.

        Args:
            layer: the stock layer; it is not changed.
            weights: the spectral weights, by the names of the stock layer's parameters.
            copied: whether hooks are copied, since both layers go on living.

        Raises:
            ConversionError: another kind of layer, weights of other parameters, or something that
                cannot be carried over.
        """
        if not isinstance(layer, cls.stock):
            raise ConversionError(
                f"{cls.__name__} takes the place of a {cls.stock.__name__}, got a "
                f"{type(layer).__name__}"
            )
        wanted = list(cls.views(layer))
        if sorted(weights) != sorted(wanted):
            raise ConversionError(
                f"{cls.__name__} takes one weight for each of {wanted}, got {list(weights)}"
            )
        made = cls._around(layer, weights)
        if type(layer) is not cls.stock:
            made._came_from = type(layer)
        for name, weight in weights.items():
            mark_like([layer._parameters[name]], weight.parameters())
        carry_over(layer, made, made._stock(), copied=copied)
        return made

    def _hold(
        self,
        view: MatrixView | tuple[int, ...],
        rank: int | None,
        weight: SpectralWeight | WeightStack | None,
        bias: bool | None,
        options: Mapping[str, Any],
        outputs: int | None = None,
        **where: Any,
    ) -> None:
        """Set weight and bias, by the arguments of a constructor; a bias starts as torch's does.

        The bias has ``outputs`` numbers; by default as many as the matrices have rows. It is None
        where the stock layer never has one.
        """
        view = view if isinstance(view, MatrixView) else MatrixView(view)
        self.spectral_weight = held = self._held_as(view, rank, weight, options, **where)
        if bias:
            edge = 1 / math.sqrt(held.shape.d_in)
            size = view.count * held.shape.d_out if outputs is None else outputs
            value = torch.empty(size, dtype=held.dtype, device=held.device)
            self.bias = nn.Parameter(value.uniform_(-edge, edge))
        elif bias is not None:
            self.register_parameter("bias", None)

    def _held_as(
        self,
        view: MatrixView,
        rank: int | None,
        weight: SpectralWeight | WeightStack | None,
        options: Mapping[str, Any],
        **where: Any,
    ) -> SpectralWeight | WeightStack:
        """What stands for one parameter: made by the options, or given and checked."""
        caller = type(self).__name__
        recipe = Recipe.of(caller, self._options, options, rank=rank)
        if weight is None:
            if rank is None:
                raise ShapeError(
                    f"{caller} needs a rank, as in {caller}(..., rank=16), or a weight=... to use"
                )
            return recipe.make_all(view, **where)
        check_given(caller, weight, options)
        check_fits(caller, weight, view, recipe)
        return weight

    @property
    def weight(self) -> Tensor:
        """The dense weight in the stock layer's shape, formed at each call; differentiable.

        In a forward of a network whose weights are formed together it is formed once. Not to be
        written into; assigned, a tensor is taken over if its ranks carry it, and the weight of
        another spectral layer is shared from then on.
        """
        held = self.spectral_weight
        value = held._read() if isinstance(held, SpectralWeight) else held()
        return shown(self.view_of("weight").joined(value), self, "weight")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in type(self).holds and type(self).holds[name] in self.__dict__.get("_modules", ()):
            self._set_weight(name, value)
        else:
            super().__setattr__(name, value)

    def _set_weight(self, name: str, value: object) -> None:
        """Take a tensor over as a weight, or share that of another layer."""
        attribute, view = self.holds[name], self.view_of(name)
        other, its = holder_of(value) or (None, "")
        if isinstance(other, SpectralLayer) and other.view_of(its) == view:
            setattr(self, attribute, getattr(other, other.holds[its]))
        elif isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            take_over(getattr(self, attribute), view, value, nearest_by(self, name, "W"))
        else:
            raise no_parameter(self, name)

    def _form_for(self, x: Tensor) -> str:
        """The form in which to have the weight for an input: dense, factors, rows or cores.

        In a forward that forms all weights together it is that in which they are formed. Under
        compilation, export and tracing it does not depend on the size of the input: that would be
        frozen, or compiled anew for each.
        """
        first = parts_of(self.spectral_weight)[0]
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return self.form_together(first)
        form = form_of(first)
        return self._form(x) if form is None else form

    def form_together(self, weight: SpectralWeight) -> str:
        """The form in which a weight of this layer is cheaper to apply, once it is formed."""
        shape = weight.shape
        factors = shape.rank * (shape.d_out + shape.d_in)
        return "factors" if factors < shape.numel else "dense"

    @abstractmethod
    def _form(self, x: Tensor) -> str:
        """The cheapest form for an input, where forming the weight costs something."""

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the stock layer's weight."""
        return self.shape_of("weight")

    @abstractmethod
    def _stock(self) -> Any:
        """The stock layer of the same sizes, without bias and without memory for parameters."""

    def to_layer(self) -> Any:
        """The stock layer with the same outputs to rounding.

        Whatever hangs on this layer is kept, and the bias is the same object; a weight is frozen if
        no parameter of this one's is trainable.

        Raises:
            ConversionError: something on this layer that cannot be carried over, or a subclass with
                a ``forward`` of its own.
        """
        return self.hand_over(self.dense_layer(), copied=True)

    @torch.inference_mode(False)
    @torch.no_grad()
    def dense_layer(self) -> Any:
        """The stock layer with the dense weights, without bias and without what hangs on this one.

        Raises:
            ConversionError: a subclass with a ``forward`` of its own, or something on a weight that
                would be lost.
        """
        self.check_goes()
        layer = self._stock()
        for name, held in self.held.items():
            layer._parameters[name] = dense_parameter(held, self.view_of(name))
        if self._came_from is not None:
            layer.__class__ = self._came_from  # it differs by what hangs on it, which comes later
        return layer

    def _thin(self) -> nn.Sequential | None:
        """Two stock layers of the sizes of the factors, on ``meta``; None if there are none."""
        return None

    thin_roles: ClassVar[tuple[str, str]] = ("vt", "us")
    """Which factor each of the two holds; what two layers hold in one role can be one parameter."""

    def _thin_factors(self, us: Tensor, vt: Tensor) -> tuple[Tensor, Tensor]:
        """The weights of the two, up to their shape: ``V^T`` and ``U S`` in the order applied."""
        return vt, us

    def _shared(self) -> None:
        """Told where another layer holds the weight as well."""

    @property
    def _is_alone(self) -> bool:
        """Whether the dense weight is not all that of the spectral one, and no other layer's."""
        return False

    def check_goes(self) -> None:
        """Raise if a stock layer cannot take this one's place.

        Raises:
            ConversionError: a subclass with a ``forward`` of its own, or something on a weight that
                would be lost.
        """
        kind = self._kind()
        if type(self).forward is not kind.forward:
            raise ConversionError(
                f"{type(self).__name__} has a forward of its own, which no torch.nn."
                f"{kind.stock.__name__} stands for; put one in its place by hand, with "
                "layer.weight as its weight"
            )
        for _, weight in named_parts(self.held):
            check_replaceable(weight)

    @explained
    def hand_over(self, layer: M, copied: bool = False) -> M:
        """Give what hangs on this layer, and its bias, to what takes its place.

        Args:
            layer: the stock layer, or two in a sequence; returned.
            copied: whether hooks are copied, since both layers go on living.

        Raises:
            ConversionError: something that cannot be carried over.
        """
        plain = self._kind()._around(self._stock(), self.held)
        plain._came_from = self._came_from
        carry_over(self, layer, plain, copied=copied)
        return layer

    def _kind(self) -> type[SpectralLayer]:
        """The layer of this package that this one is, or is a subclass of."""
        return next(kind for kind in type(self).__mro__ if "stock" in kind.__dict__)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for name, attribute in self.holds.items():
            dense, own = f"{prefix}{name}", f"{prefix}{attribute}."
            if dense in state_dict and not any(key.startswith(own) for key in state_dict):
                # The last argument collects what torch raises at the end.
                args[-1].append(
                    f"the state holds {dense!r}, the dense weight of a stock layer, and this layer "
                    "holds a spectral one: load the state into the stock network, then "
                    f"compress(model, ...), or take the nearest by layer = model.get_submodule("
                    f"{prefix[:-1]!r}); W = state[{dense!r}]; {nearest_by(self, name, 'W')}"
                )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _weight_repr(self) -> str:
        weight = self.spectral_weight
        return f"rank={weight.shape.rank}, method={weight.method!r}, spectrum={weight.spectrum!r}"
