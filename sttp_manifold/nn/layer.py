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
from sttp_manifold.nn.carry import carry_over, check_bare, check_stock, check_weight, mark_like
from sttp_manifold.nn.formed import form_of
from sttp_manifold.nn.methods import make_weight, weight_class
from sttp_manifold.nn.recipe import PRETRAINED, KernelOptions, Recipe, WeightOptions, takes
from sttp_manifold.nn.weight import SpectralWeight
from sttp_manifold.tt.shape import TTShape

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

__all__ = ["SpectralLayer", "check_given", "plain_weight", "weights_of"]

M = TypeVar("M", bound=nn.Module)


class SpectralLayer(nn.Module, ABC):
    """What the layers have in common: spectral weights and perhaps a bias.

    A layer says which stock one it stands for (``stock``), which parameters of that one it holds as
    spectral weights (``holds``: name there to attribute here), how it is made around such weights
    (``_around``), and how the stock one is made (``_stock``).

    Attributes:
        stock: type of the stock layer.
        holds: names of its parameters that are spectral weights here, each with the attribute.
        spectral_weight: the module that holds the weight.
        bias: ``(d_out,)`` or None.
    """

    stock: ClassVar[type[nn.Module]]
    holds: ClassVar[Mapping[str, str]] = {"weight": "spectral_weight"}
    _options: ClassVar[type] = WeightOptions

    spectral_weight: SpectralWeight
    bias: Tensor | None

    @classmethod
    @abstractmethod
    def _around(cls, layer: Any, weights: Mapping[str, SpectralWeight]) -> Self:
        """The layer with the settings of a stock one and with given weights, without bias."""

    @explained
    def shape_of(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter of the stock layer that is a spectral weight here.

        Raises:
            ConversionError: any other name.
        """
        if name not in self.holds:
            raise ConversionError(
                f"{type(self).__name__} holds {', '.join(map(repr, self.holds))}, got {name!r}"
            )
        return tuple(self._stock()._parameters[name].shape)

    @classmethod
    @explained
    @takes(KernelOptions, init=PRETRAINED)
    def from_layer(
        cls,
        layer: nn.Module,
        rank: int | None = None,
        *,
        weight: SpectralWeight | None = None,
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
            name: recipe.make_for(tensor) if weight is None else weight
            for name, tensor in layer._parameters.items()
            if name in cls.holds and tensor is not None
        }
        return cls.in_place_of(layer, weights, copied=True)

    @classmethod
    @explained
    def in_place_of(
        cls, layer: nn.Module, weights: Mapping[str, SpectralWeight], copied: bool = False
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
        wanted = [name for name in cls.holds if layer._parameters.get(name) is not None]
        if sorted(weights) != sorted(wanted):
            raise ConversionError(
                f"{cls.__name__} takes one weight for each of {wanted}, got {list(weights)}"
            )
        made = cls._around(layer, weights)
        for name, weight in weights.items():
            mark_like([layer._parameters[name]], weight.parameters())
        carry_over(layer, made, made._stock(), copied=copied)
        return made

    def _hold(
        self,
        sizes: tuple[int, ...],
        rank: int | None,
        weight: SpectralWeight | None,
        bias: bool,
        options: Mapping[str, Any],
        **where: Any,
    ) -> None:
        """Set weight and bias, by the arguments of a constructor; a bias starts as torch's does."""
        caller = type(self).__name__
        recipe = Recipe.of(caller, self._options, options, rank=rank)
        if weight is None:
            if rank is None:
                raise ShapeError(
                    f"{caller} needs a rank, as in {caller}(..., rank=16), or a weight=... to use"
                )
            weight = recipe.make(recipe.plan(sizes), **where)
        else:
            check_given(caller, weight, options)
            _check_fits(caller, weight.shape, sizes, recipe)
        self.spectral_weight = weight
        if bias:
            edge = 1 / math.sqrt(weight.shape.d_in)
            value = torch.empty(weight.shape.d_out, dtype=weight.dtype, device=weight.device)
            self.bias = nn.Parameter(value.uniform_(-edge, edge))
        else:
            self.register_parameter("bias", None)

    @property
    def weight(self) -> Tensor:
        """The dense weight in the stock layer's shape, formed at each call; differentiable."""
        return self.spectral_weight().reshape(self.weight_shape)

    def _form_for(self, x: Tensor) -> str:
        """The form in which to have the weight for an input: dense, factors or cores.

        In a forward that forms all weights together it is that in which they are formed.
        """
        if not torch.compiler.is_compiling():
            form = form_of(self.spectral_weight)
            if form is not None:
                return form
            if torch.jit.is_tracing():  # what follows from the size of an input would be frozen
                return self.form_together(self.spectral_weight)
        return self._form(x)

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
        self._check_goes()
        layer = self._stock()
        for name, weight in weights_of(self).items():
            dense = nn.Parameter(
                getattr(self, name).detach().clone(), requires_grad=weight.trainable
            )
            mark_like(weight.parameters(), [dense])
            layer._parameters[name] = dense
        return layer

    @torch.inference_mode(False)
    @torch.no_grad()
    def thin_layers(self) -> nn.Sequential | None:
        """Two stock layers that apply the factors one after the other, without bias.

        Returns:
            None where that is not cheaper than the dense layer, by multiplications (which for
            these layers are as the numbers stored), or where two layers cannot hold what hangs on
            this one: submodules, or a bias that is no parameter.

        Raises:
            ConversionError: as for :meth:`dense_layer`.
        """
        self._check_goes()
        plain = self._kind()._around(self._stock(), weights_of(self))
        layers = self._thin()
        if (
            layers is None
            or _numbers(layers) >= _numbers(self._stock())
            or "bias" not in self._parameters
            or self._modules.keys() != plain._modules.keys()
        ):
            return None
        weight = self.spectral_weight
        us, vt = weight.factors()
        for layer, factor in zip(layers, (vt, us), strict=True):
            thin = factor.detach().clone().reshape(layer._parameters["weight"].shape)  # type: ignore[union-attr]
            layer.weight = nn.Parameter(thin, requires_grad=weight.trainable)
        mark_like(weight.parameters(), layers.parameters())
        return layers

    def _thin(self) -> nn.Sequential | None:
        """Two stock layers of the sizes of the factors, on ``meta``; None if there are none."""
        return None

    def _check_goes(self) -> None:
        """Raise if a stock layer cannot take this one's place."""
        kind = self._kind()
        if type(self).forward is not kind.forward:
            raise ConversionError(
                f"{type(self).__name__} has a forward of its own, which no torch.nn."
                f"{kind.stock.__name__} stands for; put one in its place by hand, with "
                "layer.weight as its weight"
            )
        for weight in weights_of(self).values():
            plain = plain_weight(weight)
            check_weight(weight, weight_class(weight.method), plain)
            check_bare(weight, plain)

    @explained
    def hand_over(self, layer: M, copied: bool = False) -> M:
        """Give what hangs on this layer, and its bias, to what takes its place.

        Args:
            layer: the stock layer, or two in a sequence; returned.
            copied: whether hooks are copied, since both layers go on living.

        Raises:
            ConversionError: something that cannot be carried over.
        """
        plain = self._kind()._around(self._stock(), weights_of(self))
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
                    f"compress(model, ...), or take it over by W = state[{dense!r}].flatten(1); "
                    f"w = model.get_submodule({own[:-1]!r}); w.encode_(tt_svd(W, w.shape))"
                )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _weight_repr(self) -> str:
        weight = self.spectral_weight
        return f"rank={weight.shape.rank}, method={weight.method!r}, spectrum={weight.spectrum!r}"


def _numbers(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def plain_weight(weight: SpectralWeight) -> SpectralWeight:
    """A weight of the same method and plan with nothing on it."""
    values = weight.map.values
    return make_weight(
        weight.method, weight.shape, weight.spectrum, "eye", weight.bound, values=values
    )


@explained
def weights_of(module: nn.Module) -> dict[str, SpectralWeight]:
    """Spectral weights of a layer, by the names of the stock layer's parameters.

    Args:
        module: a layer of this package; any other module has none.

    Example:
        >>> from sttp_manifold.nn import SpectralLinear
        >>> list(weights_of(SpectralLinear(20, 12, rank=4)))
        ['weight']
    """
    if not isinstance(module, SpectralLayer):
        return {}
    return {name: getattr(module, attribute) for name, attribute in module.holds.items()}


def _check_fits(caller: str, shape: TTShape, sizes: tuple[int, ...], recipe: Recipe) -> None:
    d_out, d_in = sizes[0], math.prod(sizes[1:])
    if (shape.d_out, shape.d_in) != (d_out, d_in):
        raise ShapeError(
            f"{caller} needs a {d_out} x {d_in} weight, got one of {shape.d_out} x {shape.d_in}"
        )
    if recipe.rank is not None and recipe.plan(sizes).rank != shape.rank:
        raise ShapeError(
            f"{caller} got rank={recipe.rank} and a weight=... of rank {shape.rank}; leave the "
            "rank out to use the weight as it is"
        )


def check_given(caller: str, weight: SpectralWeight, options: Mapping[str, Any]) -> None:
    """Raise for options of a weight where the weight is given.

    Raises:
        ShapeError: ``weight`` is no spectral weight.
        ConversionError: such options.
    """
    if not isinstance(weight, SpectralWeight):
        raise ShapeError(
            f"{caller} takes a SpectralWeight as weight=..., got a {type(weight).__name__}; "
            "make_weight('householder', shape) makes one"
        )
    if options:
        raise ConversionError(
            f"{caller} got a weight=... and also {', '.join(options)}, which would make another; "
            "leave one of them out"
        )
