"""The dense weight of a layer as others read it, and what becomes of writing into it.

A layer's ``weight`` is computed: what is written into the tensor would be gone with it. It is
handed out as a tensor that refuses to be written into, with the call that works, and that knows
whose it is, for ``a.weight = b.weight`` to tie. Inside of a forward, where torch's fast paths ask
for plain tensors, it is a plain one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sttp_manifold.errors import ConversionError

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["ComputedWeight", "holder_of"]

_SETTING = {
    "__setitem__", "__set__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__",
    "__ipow__", "__iand__", "__ior__", "__ixor__", "__imod__", "__ilshift__", "__irshift__",
}  # fmt: skip
# In-place by their names, but of the graph and not of the numbers.
_HARMLESS = {"requires_grad_", "retain_grad_", "share_memory_"}


class ComputedWeight(Tensor):
    """A tensor that is computed from a layer's parameters; what follows from it is plain."""

    # The layer and the name of its weight; None for a copy, which may be written into.
    _holder: tuple[nn.Module, str] | None

    @classmethod
    def of(cls, value: Tensor, layer: nn.Module, name: str) -> Self:
        """A value as the weight of a layer.

        Args:
            value: the value, of any shape.
            layer: whose it is.
            name: of the weight there.
        """
        made = value.as_subclass(cls)
        made._holder = layer, name
        return made

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Any = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _SETTING or (name.endswith("_") and name[-2:] != "__" and name not in _HARMLESS):
            written = holder_of(args[0]) if args else next(map(holder_of, kwargs.values()), None)
            if written is not None and not (name == "__set__" and _is_harmless(func)):
                raise _refusal(*written)
        if (written := holder_of(kwargs.get("out"))) is not None:
            raise _refusal(*written)
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **kwargs)
        if func is Tensor.data.__get__ and (holder := holder_of(args[0])) is not None:
            return cls.of(found, *holder)
        # nn.Parameter asks for a copy of the same type.
        return found.as_subclass(cls) if func is Tensor.detach else found


def _is_harmless(setter: Any) -> bool:
    """Whether an attribute is set that is no number of the tensor."""
    return getattr(setter, "__self__", None) in (Tensor.grad, Tensor.requires_grad)


def holder_of(value: object) -> tuple[nn.Module, str] | None:
    """The layer whose computed weight a tensor is, and its name there; None for any other.

    Args:
        value: anything.
    """
    return value.__dict__.get("_holder") if type(value) is ComputedWeight else None


def _refusal(layer: nn.Module, name: str) -> ConversionError:
    weight = f"layer.{getattr(layer, 'holds', {}).get(name, 'spectral_weight')}"
    return ConversionError(
        f"the {name} of a {type(layer).__name__} is computed from its spectral parameters, and what "
        f"is written into it would be lost. Write by layer.{name} = W where W has its ranks, or "
        f"{weight}.encode_(tt_svd(W.flatten(1), {weight}.shape)) for the nearest one that has; "
        f"start anew by compress(..., init='random'); copy by layer.{name}.detach().clone()"
    )
