"""A spectral weight behind a tensor of any module, by torch's parametrizations.

A module whose forward is torch's, or anybody's, reads its tensor as ever, and what it reads is
formed from a spectral weight: ``module.parametrizations[name]`` is the list that torch makes for
:func:`torch.nn.utils.parametrize.register_parametrization`, with a :class:`HeldWeight` in it and no
tensor of its own beside that. The module stays the same object.

Torch gives such a module a class of its own, which no pickle takes, and which copies share, so that
to remove a parametrization from a copy breaks the original. Here each copy, unpickled or deep, has
its own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sttp_manifold.errors import ShapeError
from sttp_manifold.nn import recurrent
from sttp_manifold.nn.formed import once
from sttp_manifold.nn.stack import MatrixView, WeightStack, encode_each
from sttp_manifold.nn.weight import SpectralWeight
from sttp_manifold.nn.written import shown, take_over
from sttp_manifold.tt.decompose import tt_svd
from sttp_manifold.tt.precision import widened

__all__ = ["BehindTensor", "HeldWeight", "behind", "held_in", "let_go", "put_behind"]


class BehindTensor(nn.Module):
    """A parametrization of this package, which takes no tensor and gives one.

    Attributes:
        order: names of the module's parameters before, in which order they are put back.
        held: the spectral weight or weights that the tensor is formed from, or None.
    """

    order: tuple[str, ...] = ()

    @property
    def held(self) -> HeldWeight | None:
        """What the tensor is formed from."""
        return None


class HeldWeight(BehindTensor):
    """The parametrization: a tensor formed from a spectral weight, or from a stack of them.

    Reading the tensor forms it; within a forward of a network that forms its weights together
    (:func:`~sttp_manifold.nn.together`), once in all. Writing to it (``module.weight = W``) takes
    the new tensor over if the ranks carry it to rounding, as for ``layer.weight = W``; ``encode_``
    takes the nearest.

    Args:
        weight: the spectral weight or weights.
        view: how the tensor is read as matrices.
    """

    def __init__(self, weight: SpectralWeight | WeightStack, view: MatrixView) -> None:
        super().__init__()
        self.weight = weight
        self.view = view

    @property
    def held(self) -> HeldWeight:
        """Itself."""
        return self

    def forward(self) -> Tensor:
        """The tensor.

        Shape:
            - output: ``view.shape``
        """
        if torch.compiler.is_compiling() or not isinstance(self.weight, WeightStack):
            return shown(self.view.joined(self.weight()), self, "tensor")
        parts = self.weight.parts
        tensors = [tensor for weight in parts for tensor in weight._tensors()]
        # Whoever walks over the matrices of a stack reads it for each of them.
        value = once(self, parts, tensors, lambda: self.view.joined(self.weight()))
        return shown(value, self, "tensor")

    def right_inverse(self, tensor: Tensor) -> tuple[()]:
        """Take a tensor over, in place; what torch calls for an assignment.

        Shape:
            - tensor: ``view.shape``

        Raises:
            ConversionError: a tensor that the ranks do not carry.
            ShapeError: another shape, or numbers that are not finite.
            SpectrumError: a tensor that the spectrum cannot hold.
        """
        nearest = "module.parametrizations[name][0].encode_(W)"
        take_over(self.weight, self.view, tensor, nearest)
        return ()

    @torch.no_grad()
    def encode_(self, tensor: Tensor) -> None:
        """Hold the nearest (nearly) of a tensor that the ranks carry, by TT-SVD.

        Args:
            tensor: the tensor.

        Shape:
            - tensor: ``view.shape``

        Raises:
            ShapeError: another shape, or numbers that are not finite.
            SpectrumError: a tensor that the spectrum cannot hold.
        """
        if tuple(tensor.shape) != self.view.shape:
            raise ShapeError(
                f"this tensor has shape {self.view.shape}, got one of {tuple(tensor.shape)}"
            )
        matrices = widened(self.view.split(tensor.detach()).flatten(2))
        values = [tt_svd(matrix, self.weight.shape) for matrix in matrices]
        encode_each(self.weight, values)

    def extra_repr(self) -> str:
        """The shape of the tensor."""
        return f"shape={self.view.shape}"


class _NoTensor:
    """The parametrization while torch registers it: it has been given its weight already."""

    def __init__(self, held: BehindTensor) -> None:
        self._held = held

    def __enter__(self) -> None:
        self._held.right_inverse = lambda _: ()  # type: ignore[assignment]

    def __exit__(self, *_: object) -> None:
        del self._held.right_inverse


def behind(module: nn.Module) -> dict[str, BehindTensor]:
    """The tensors of a module that this package computes, by name."""
    lists = module._modules.get("parametrizations")
    if not isinstance(lists, nn.ModuleDict):
        return {}
    # With another parametrization on top of it, the tensor is not what ours says.
    return {
        name: ours
        for name, chain in lists.items()
        if len(chain) == 1 and isinstance(ours := chain[0], BehindTensor)  # type: ignore[arg-type, index]
    }


def held_in(module: nn.Module) -> dict[str, HeldWeight]:
    """The tensors of a module that are formed from spectral weights, by name."""
    found = {name: ours.held for name, ours in behind(module).items()}
    return {name: held for name, held in found.items() if held is not None}


def put_behind(module: nn.Module, new: Mapping[str, BehindTensor]) -> None:
    """Let tensors of a module be computed; its parameters go.

    Args:
        module: the module; it keeps its identity and whatever hangs on it.
        new: what computes them, by the names of its parameters, or of tensors that are computed
            already.
    """
    order = (*held_order(module), *(n for n in module._parameters if n not in held_order(module)))
    for name, parametrization in new.items():
        parametrization.order = order
        parametrization.train(module.training)
        if name in behind(module):
            lists: Any = module.parametrizations
            lists[name][0] = parametrization
            continue
        with _NoTensor(parametrization):
            if parametrize.is_parametrized(module) and not _is_ours(module):
                parametrize.register_parametrization(module, name, parametrization, unsafe=True)
                continue
            original = module._parameters[name]
            assert original is not None
            chain = parametrize.ParametrizationList([parametrization], original, unsafe=True)
        del module._parameters[name]
        if not _is_ours(module):
            module.parametrizations = nn.ModuleDict()
        module.parametrizations[name] = chain  # type: ignore[operator, index, assignment]
        _give_class(module, _base_of(module))
        if isinstance(module, nn.RNNBase):
            recurrent.adopt(module)


def let_go(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """Put parameters in the place of tensors that this package computes.

    Args:
        module: the module.
        parameters: by name.
    """
    order = held_order(module)
    for name, parameter in parameters.items():
        lists = module.parametrizations
        assert isinstance(lists, nn.ModuleDict)
        if _is_ours(module):
            base = _base_of(module)
            del lists[name]
            if lists:
                _give_class(module, base)
            else:
                del module._modules["parametrizations"]
                module.__class__ = base
            module._parameters[name] = parameter
            if isinstance(module, nn.RNNBase) and not lists:
                recurrent.part_with(module)
        else:
            parametrize.remove_parametrizations(module, name)
            module._parameters[name] = parameter
    known = {name: module._parameters[name] for name in order if name in module._parameters}
    rest = {name: p for name, p in module._parameters.items() if name not in known}
    module._parameters.clear()
    module._parameters.update(known | rest)


def held_order(module: nn.Module) -> tuple[str, ...]:
    """Names of the parameters before the first of them was computed; empty if none is."""
    return next((ours.order for ours in behind(module).values()), ())


# -- a class for each module -------------------------------------------------------------------


def _deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
    base = _base_of(self)
    own = getattr(base, "__deepcopy__", None)
    if own is not None:
        twin: nn.Module = own(self, memo)
    else:
        twin = base.__new__(base)
        memo[id(self)] = twin
        twin.__dict__ = copy.deepcopy(self.__dict__, memo)
    _give_class(twin, base)
    return twin


def _reduce_ex(self: nn.Module, protocol: Any) -> Any:
    base, names = _base_of(self), tuple(self.parametrizations)  # type: ignore[arg-type]
    return (_unpickled, (base, names), *super(base, self).__reduce_ex__(protocol)[2:])


def _unpickled(base: type[nn.Module], names: Iterable[str]) -> nn.Module:
    module = base.__new__(base)
    _give_class(module, base, names)
    return module


def _load(
    self: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
) -> None:
    for name, held in held_in(self).items():
        at = "[0]" if held is behind(self)[name] else "[0].base"
        dense, own = prefix + name, f"{prefix}parametrizations.{name}."
        if dense in state_dict and not any(key.startswith(own) for key in state_dict):
            # The last argument collects what torch raises at the end.
            args[-1].append(
                f"the state holds {dense!r}, a dense tensor, and this module a spectral weight "
                "behind it: load the state into the stock network, then compress(model, ...), or "
                f"take the nearest by module.parametrizations.{name}{at}.encode_(state[{dense!r}])"
            )
    _base_of(self)._load_from_state_dict(self, state_dict, prefix, *args, **kwargs)


_METHODS = {
    "__deepcopy__": _deepcopy,
    "__reduce_ex__": _reduce_ex,
    "_is_held": True,
    "_load_from_state_dict": _load,
}


def _is_ours(module: nn.Module) -> bool:
    return "_is_held" in type(module).__dict__


def _base_of(module: nn.Module) -> type[nn.Module]:
    """The class without what is formed."""
    return type(module).__bases__[0] if _is_ours(module) else type(module)


def _give_class(
    module: nn.Module, base: type[nn.Module], names: Iterable[str] | None = None
) -> None:
    """Give a module a class of its own, which torch lets read what is parametrized."""
    own = recurrent.MEMBERS if issubclass(base, nn.RNNBase) else {}
    members = {**_METHODS, **own, "__module__": base.__module__}
    module.__class__ = type(f"Parametrized{base.__name__}", (base,), members)
    for name in module.parametrizations if names is None else names:  # type: ignore[union-attr]
        parametrize._inject_property(module, name)
