"""What hangs on a module that another one replaces: carried over, or named and refused.

Users and libraries hang things on layers: hooks, attributes that hooks read, buffers, adapters as
submodules, a ``forward`` of the instance's own, a bias that a hook computes. Whatever a module has
beyond a *plain* one of its type and sizes is moved to the module that takes its place; what would
mean something else there is a `ConversionError`, before anything has changed.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from inspect import getattr_static
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from sttp_manifold.errors import ConversionError
from sttp_manifold.nn.held import behind, held_in
from sttp_manifold.nn.torch_state import has_values
from sttp_manifold.nn.written import ComputedWeight

__all__ = [
    "FORWARDS",
    "carry_over",
    "check_bare",
    "check_kept",
    "check_own",
    "check_stock",
    "check_tensors",
    "check_weight",
    "mark_like",
]

# Where torch keeps the hooks on what a module computes.
_HOOKS = (
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks",
    "_forward_hooks_always_called",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_is_full_backward_hook",
)
# And those on what it stores, under names that are others in the module that replaces it.
_STATE_HOOKS = {
    "_state_dict_hooks": "a state-dict hook",
    "_state_dict_pre_hooks": "a state-dict pre-hook",
    "_load_state_dict_pre_hooks": "a hook before load_state_dict",
    "_load_state_dict_post_hooks": "a hook after load_state_dict",
}
FORWARDS = ("forward", "_conv_forward", "_output_padding", "__call__")
"""Methods that a spectral layer has its own of, in place of those of a stock layer."""

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_STORES = ("_parameters", "_buffers", "_modules")


def carry_over(old: nn.Module, new: nn.Module, plain: nn.Module, *, copied: bool = False) -> None:
    """Give a module what hangs on the one that it replaces.

    Args:
        old: the module to be replaced; it is not changed.
        new: the module that takes its place.
        plain: one of the type and sizes of ``old`` with nothing on it.
        copied: whether hooks are copied, since both modules go on living. Otherwise the handles of
            the hooks keep working.

    Raises:
        ConversionError: something that cannot be carried over, by name.
    """
    check_own(old)
    for place, what in _STATE_HOOKS.items():
        if len(old.__dict__.get(place, ())) > len(plain.__dict__.get(place, ())):
            raise _refused(
                old,
                f"{what}, which speaks of parameters that will have other names",
                "remove it by its handle, or leave the layer out",
            )
    new.train(old.training)
    for name in _HOOKS:
        if name in old.__dict__:
            hooks = old.__dict__[name]
            new.__dict__[name] = hooks.copy() if copied and hasattr(hooks, "copy") else hooks
    has_bias = "bias" in plain._parameters
    if has_bias:
        _move_bias(old, new[-1] if isinstance(new, nn.Sequential) else new)
    for place in _STORES:
        for name, value in old.__dict__[place].items():
            if name in plain.__dict__[place] or (has_bias and name == "bias"):
                continue
            _check_free(old, new, name)
            new.__dict__[place][name] = value
            if name in old._non_persistent_buffers_set:
                new._non_persistent_buffers_set.add(name)
    for name, value in _hanging(old, plain):
        if not (has_bias and name == "bias"):
            _check_free(old, new, name)
            if isinstance(value, MethodType) and value.__self__ is old:
                value = MethodType(value.__func__, new)
            new.__dict__[name] = new if value is old else value


def _hanging(module: nn.Module, plain: nn.Module) -> list[tuple[str, Any]]:
    """Attributes of an instance that a plain one has not, without cached values."""
    return [
        (name, value)
        for name, value in module.__dict__.items()
        if name not in plain.__dict__
        and not isinstance(getattr_static(type(module), name, None), cached_property)
    ]


def _move_bias(old: nn.Module, new: nn.Module) -> None:
    """Hold the bias as the old module does: a parameter, a buffer, or a tensor that a hook sets."""
    new._parameters.pop("bias", None)
    for place in (old._parameters, old._buffers, old.__dict__):
        if "bias" in place:
            bias = place["bias"]
            break
    else:
        raise _refused(old, "no bias at all", "set layer.bias = None where there is none")
    if not (bias is None or isinstance(bias, Tensor)):
        raise _refused(
            old,
            f"a bias that is a {type(bias).__name__}",
            "make it a parameter: layer.bias = torch.nn.Parameter(...)",
        )
    if place is old._parameters:
        new._parameters["bias"] = bias  # type: ignore[assignment]
    elif place is old._buffers:
        new._buffers["bias"] = bias
        if "bias" in old._non_persistent_buffers_set:
            new._non_persistent_buffers_set.add("bias")
    else:
        new.__dict__["bias"] = bias


def _check_free(old: nn.Module, new: nn.Module, name: str) -> None:
    """Raise if an attribute means something to the class that it hangs on, or to its successor."""
    if hasattr(type(old), name):
        raise _refused(
            old,
            f"{name!r} of its own, in place of that of {type(old).__name__}",
            f"undo the patch (del layer.{name}), convert, and patch the new layer",
        )
    if (
        hasattr(type(new), name)
        or name in new.__dict__
        or any(name in new.__dict__[place] for place in _STORES)
    ):
        raise _refused(
            old,
            f"an attribute {name!r}, which means something else to a {type(new).__name__}",
            "give it another name",
        )


def _refused(layer: nn.Module, found: str, way: str) -> ConversionError:
    return ConversionError(
        f"this {type(layer).__name__} has {found}: it would be lost; {way}, or convert the network "
        "without this layer (skip=[its name])"
    )


def mark_like(old: Iterable[Tensor | None], new: Iterable[Tensor]) -> None:
    """Give parameters the attributes that others carry, such as marks for optimizers.

    Shape:
        - old: any
        - new: any
    """
    marks: dict[str, Any] = {}
    for tensor in old:
        marks |= {} if tensor is None else vars(tensor)
    marks.pop("manifold", None)
    for tensor in new:
        vars(tensor).update(marks)


def check_stock(layer: nn.Module, kind: type[nn.Module], names: Iterable[str]) -> None:
    """Raise unless a layer is a plain stock one with ordinary parameters under some names.

    Raises:
        ConversionError: another type, an uninitialized layer, or parameters that are computed from
            others, are of a type of their own, or have hooks on their gradients.
    """
    given = type(layer).__name__
    names = tuple(names)
    check_own(layer, names)
    if not isinstance(layer, kind):
        raise ConversionError(f"expected a torch.nn.{kind.__name__}, got a {given}")
    for method in FORWARDS:
        if getattr(type(layer), method, None) is not getattr(kind, method, None):
            raise ConversionError(
                f"{given} is a torch.nn.{kind.__name__} with a {method} of its own, which a "
                "spectral layer would not call; write the layer around make_weight(method, shape)"
            )
    _check_parameters(layer, names)


def check_kept(module: nn.Module, names: Iterable[str]) -> None:
    """Raise unless a module that stays has ordinary parameters under some names.

    Raises:
        ConversionError: as :func:`check_stock`, whatever the forward of the module is.
    """
    check_own(module)
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, (BasePruningMethod, WeightNorm, SpectralNorm)):
            name = hook._tensor_name if isinstance(hook, BasePruningMethod) else hook.name
            raise _computed(module, str(name), _remover(module, str(name)))
    _check_parameters(module, tuple(names))


def _check_parameters(layer: nn.Module, names: Iterable[str]) -> None:
    given = type(layer).__name__
    for name in names:
        parameter = layer._parameters.get(name)
        if parameter is not None and nn.parameter.is_lazy(parameter):
            raise ConversionError(
                f"this {given} has no {name} before its first input; call it once, then convert it"
            )
        if not isinstance(parameter, Tensor):
            raise _computed(layer, name, _remover(layer, name))
        if parameter.dtype not in _DTYPES or parameter.layout != torch.strided:
            raise _refused(
                layer,
                f"a {name} of {parameter.dtype}, layout {parameter.layout}",
                "make it a dense one of real floating numbers, as by layer.float()",
            )
        # What remove_parametrizations makes of a tensor of ours is a plain one as well.
        if type(parameter) not in (nn.Parameter, ComputedWeight) and has_values(parameter):
            raise _refused(
                layer,
                f"a {name} of type {type(parameter).__name__} (quantized, sharded, on a manifold)",
                "make it a plain torch.nn.Parameter",
            )
    check_tensors(layer, [layer._parameters[name] for name in names])


def check_own(module: nn.Module, names: Iterable[str] = ()) -> None:
    """Raise if torch's parametrizations compute tensors of a module, by other than our weights.

    Args:
        module: any module.
        names: tensors to name first.

    Raises:
        ConversionError: such a tensor, or one with adapters, with the call that makes it a
            parameter again.
    """
    if not parametrize.is_parametrized(module):
        return
    lists = module.parametrizations
    assert isinstance(lists, nn.ModuleDict)
    found = [name for name in lists if name not in held_in(module)]
    if found:
        name = next(n for n in (*names, *found) if n in found)
        if name in behind(module):
            raise ConversionError(
                f"the {name} of this {type(module).__name__} has adapters beside it, which would "
                "not know the new one; compress first and adapt then, or make it one weight by "
                "remove_adapter(merge(model))"
            )
        call = f"torch.nn.utils.parametrize.remove_parametrizations(layer, {name!r})"
        raise _computed(module, name, call)


def check_bare(module: nn.Module, plain: nn.Module) -> None:
    """Raise if anything but marks hangs on a module that goes without a successor.

    Args:
        module: the module.
        plain: one of its type and sizes with nothing on it.

    Raises:
        ConversionError: hooks, further parameters, buffers or submodules, or a patched method.
    """
    check_own(module)
    for name in (*_HOOKS, *_STATE_HOOKS):
        hooks, usual = module.__dict__.get(name), plain.__dict__.get(name)
        if isinstance(hooks, dict) and len(hooks) > len(usual or ()):
            raise _refused(module, "a hook, and no module takes its place", "remove it first")
    for place in _STORES:
        for name in module.__dict__[place]:
            if name not in plain.__dict__[place]:
                raise _refused(module, f"{name!r}, and no module takes its place", "delete it")
    for name, value in _hanging(module, plain):
        if callable(value):
            raise _refused(module, f"{name!r} of its own", f"undo that (del weight.{name})")


def check_weight(weight: nn.Module, kind: type[nn.Module], plain: nn.Module) -> None:
    """Raise unless the value of a spectral weight is that of its own parameters.

    Args:
        weight: the weight.
        kind: the class of its method.
        plain: a weight of its plan with nothing on it.

    Raises:
        ConversionError: a subclass that computes another value, parameters that are computed from
            others (pruned, parametrized), or hooks on their gradients.
    """
    check_own(weight)
    for method in ("forward", "tt", "factors", "row_factors", "bond"):
        if getattr(type(weight), method) is not getattr(kind, method):
            raise ConversionError(
                f"{type(weight).__name__} has a {method} of its own: what it holds is not known; "
                f"take its matrix over by make_weight(...).encode_(tt_svd(W, weight.shape))"
            )
    for name, parameter in plain._parameters.items():
        if parameter is not None and weight._parameters.get(name) is None:
            raise _computed(weight, name, _remover(weight, name))
    check_tensors(weight, weight.parameters())


def check_tensors(module: nn.Module, tensors: Iterable[Tensor | None]) -> None:
    """Raise if parameters that go have hooks on their gradients.

    Shape:
        - tensors: any

    Raises:
        ConversionError: such a hook.
    """
    for tensor in tensors:
        if tensor is not None and (
            tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None)
        ):
            raise _refused(
                module,
                "a hook on the gradient of a parameter that goes",
                "remove it by its handle",
            )


def _computed(layer: nn.Module, name: str, call: str) -> ConversionError:
    return ConversionError(
        f"the {name} of this {type(layer).__name__} is computed from other parameters; remove that "
        f"first, as by {call}, or convert the network without this layer (skip=[its name])"
    )


def _remover(layer: nn.Module, name: str) -> str:
    """The call that makes a computed parameter an ordinary one again."""
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod) and hook._tensor_name == name:
            return f"torch.nn.utils.prune.remove(layer, {name!r})"
        if isinstance(hook, WeightNorm) and hook.name == name:
            return f"torch.nn.utils.remove_weight_norm(layer, {name!r})"
        if isinstance(hook, SpectralNorm) and hook.name == name:
            return f"torch.nn.utils.remove_spectral_norm(layer, {name!r})"
    return f"layer.{name} = torch.nn.Parameter(...) in its place"
