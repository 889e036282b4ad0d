"""The dense weight of a layer as others read it, and what becomes of writing into it.

A layer's ``weight`` is computed: what is written into the tensor would be gone with it. It is
handed out as a tensor that refuses to be written into, with the call that works, and that knows
whose it is, for ``a.weight = b.weight`` to tie. Inside of a forward, where torch's fast paths ask
for plain tensors, it is a plain one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sttp_manifold.errors import ConversionError, ShapeError
from sttp_manifold.nn.formed import any_running
from sttp_manifold.nn.stack import MatrixView, WeightStack, encode_each, parts_of
from sttp_manifold.nn.torch_state import circumstances, has_values
from sttp_manifold.nn.weight import SpectralWeight
from sttp_manifold.tt.decompose import tt_svd
from sttp_manifold.tt.precision import closeness, widened

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["ComputedWeight", "holder_of", "nearest_by", "no_parameter", "shown", "take_over"]

_SETTING = {
    "__setitem__", "__set__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__",
    "__ipow__", "__iand__", "__ior__", "__ixor__", "__imod__", "__ilshift__", "__irshift__",
}  # fmt: skip
# In-place by their names, but of the graph and not of the numbers.
_HARMLESS = {"requires_grad_", "retain_grad_", "share_memory_"}

_DATA = Tensor.data.__get__  # type: ignore[attr-defined]


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

    def _plain(self) -> Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            plain = self.as_subclass(Tensor)
            is_parameter = isinstance(self, nn.Parameter)
            return nn.Parameter(plain.detach(), self.requires_grad) if is_parameter else plain

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return copy.deepcopy(self._plain(), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._plain().__reduce_ex__(protocol)

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
        if func == _DATA and (holder := holder_of(args[0])) is not None:
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


def shown(value: Tensor, layer: nn.Module, name: str) -> Tensor:
    """A weight as foreign code reads it: guarded outside of forwards and transforms, else plain.

    Args:
        value: the dense weight.
        layer: whose it is.
        name: of the weight there.
    """
    if torch.compiler.is_compiling() or circumstances() is None or any_running():
        return value
    return ComputedWeight.of(value, layer, name)


@torch.no_grad()
def take_over(
    weight: SpectralWeight | WeightStack, view: MatrixView, tensor: Tensor, nearest: str
) -> None:
    """Hold another tensor, which the ranks carry to rounding.

    Args:
        weight: the spectral weight or weights.
        view: how the tensor is read as matrices.
        tensor: the tensor, of the shape of the view.
        nearest: the call that takes the nearest that the ranks carry, for the message.

    Raises:
        ConversionError: a tensor that the ranks do not carry.
        ShapeError: another shape, or numbers that are not finite or not there.
        SpectrumError: a tensor that the spectrum cannot hold.
    """
    if tuple(tensor.shape) != view.shape:
        raise ShapeError(f"this weight has shape {view.shape}, got {tuple(tensor.shape)}")
    if not has_values(tensor):
        raise ShapeError(f"there are no numbers to take over (device {tensor.device.type!r})")
    parts = parts_of(weight)
    matrices = widened(view.split(tensor.detach()).flatten(2))
    values = [tt_svd(matrix, parts[0].shape) for matrix in matrices]
    for matrix, value in zip(matrices, values, strict=True):
        lost = float((value.to_matrix() - matrix).norm() / matrix.norm().clamp_min(1e-30))
        if lost > closeness(tensor.dtype):
            raise ConversionError(
                f"rank {value.shape.rank} does not carry this tensor: {lost:.2g} of its norm would "
                f"be lost. Take the nearest that it carries by {nearest}, or more rank"
            )
    encode_each(weight, values)


def _refusal(layer: nn.Module, name: str) -> ConversionError:
    if isinstance(refusal := getattr(layer, "refusal", None), str):
        return ConversionError(refusal)
    if not hasattr(layer, "holds"):
        return ConversionError(
            "this tensor is computed from a spectral weight behind it, and what is written into it "
            "would be lost. Write by module.name = W, a tensor that its ranks carry, or "
            "module.parametrizations[name][0].encode_(W) for the nearest; copy by "
            "module.name.detach().clone()"
        )
    return ConversionError(
        f"the {name} of a {type(layer).__name__} is computed from its spectral parameters, and "
        f"what is written into it would be lost. Write by layer.{name} = W, a tensor that its "
        f"ranks carry, or {nearest_by(layer, name, 'W')} for the nearest; "
        f"start anew by compress(..., init='random'); copy by layer.{name}.detach().clone()"
    )


def nearest_by(layer: Any, name: str, tensor: str) -> str:
    """The call that takes the nearest that a layer of this package carries of a dense tensor.

    Args:
        layer: the layer.
        name: of the stock layer's parameter.
        tensor: an expression for the tensor.
    """
    weight = f"layer.{getattr(layer, 'holds', {}).get(name, 'spectral_weight')}"
    view = layer.view_of(name) if hasattr(layer, "view_of") else None
    if isinstance(view, MatrixView) and (view.order or view.rows > 1 or view.count > 1):
        each = f"layer.view_of({name!r}).split({tensor}).flatten(2)"
        return f"{weight}.encode_(tt_svd({each}{'' if view.count > 1 else '[0]'}, {weight}.shape))"
    return f"{weight}.encode_(tt_svd({tensor}.flatten(1), {weight}.shape))"


def no_parameter(layer: nn.Module, name: str) -> ConversionError:
    """The error for a parameter in the place of a computed weight."""
    return ConversionError(
        f"the {name} of a {type(layer).__name__} is computed from its spectral parameters, and a "
        f"parameter in its place would be none of the layer's. For its numbers, layer.{name} = "
        f"W.detach(), or {nearest_by(layer, name, 'W.detach()')}; to tie, "
        f"tie before compress, or two spectral layers by a.{name} = b.{name}; for a dense layer, "
        "decompress(model)"
    )
