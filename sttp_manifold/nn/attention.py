"""Attention and other modules that keep their forward: which tensors are matrices, and how."""

from __future__ import annotations

from typing import Any

from torch import nn

from sttp_manifold.nn.stack import MatrixView

__all__ = ["Experts", "attention", "bilinear", "experts", "output_projection"]


def attention(module: nn.Module) -> dict[str, MatrixView]:
    """``nn.MultiheadAttention``: query, key and value are three matrices, packed or not.

    So the packed projection is what models with one layer for each of them have: each has singular
    values of its own.
    """
    own = module._parameters
    packed = own.get("in_proj_weight")
    found = {} if packed is None else {"in_proj_weight": MatrixView(tuple(packed.shape), count=3)}
    for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
        if (tensor := own.get(name)) is not None:
            found[name] = MatrixView(tuple(tensor.shape))
    return found


def output_projection(module: nn.Module) -> dict[str, MatrixView]:
    """The linear layer in attention whose weight is read, and whose forward nobody calls."""
    weight = module._parameters.get("weight")
    return {} if weight is None else {"weight": MatrixView(tuple(weight.shape))}


def bilinear(module: nn.Module) -> dict[str, MatrixView]:
    """``nn.Bilinear``: the forms of all outputs below each other, ``(out in_1) x in_2``.

    With a single output, as a score has, it is the matrix of the form; as ``out x (in_1 in_2)`` it
    would be a row, of rank one.
    """
    weight = module._parameters.get("weight")
    return {} if weight is None else {"weight": MatrixView(tuple(weight.shape), rows=2)}


class _Named(type):
    """Tells stacks of experts by what they are called and hold, in whatever library they are."""

    def __instancecheck__(cls, instance: Any) -> bool:
        if "Experts" not in type(instance).__name__ or not hasattr(instance, "_parameters"):
            return False
        return bool(_stacks(instance))


class Experts(nn.Module, metaclass=_Named):
    """Stacks of experts: any module called so with 3-D parameters, a matrix for each expert.

    ``MixtralExperts`` of transformers and its like: ``gate_up_proj`` of ``(experts, d_out, d_in)``
    and ``down_proj``; transposed where the module says ``is_transposed``.
    """


def experts(module: nn.Module) -> dict[str, MatrixView]:
    """The 3-D parameters of such a module, as many matrices as there are experts."""
    order = (1, 0) if getattr(module, "is_transposed", False) else None
    return {
        name: MatrixView(shape, count=shape[0], stacked=True, order=order)
        for name, shape in _stacks(module).items()
    }


def _stacks(module: nn.Module) -> dict[str, tuple[int, ...]]:
    own = {name: p for name, p in module._parameters.items() if p is not None}
    if any(nn.parameter.is_lazy(p) for p in own.values()):
        return {}
    shapes = {name: tuple(p.shape) for name, p in own.items()}
    return {name: size for name, size in shapes.items() if len(size) == 3 and min(size[1:]) > 1}
