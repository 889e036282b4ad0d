"""`AdaptedTensor`: spectral updates of a tensor that its module computes with itself.

An attention, a recurrent layer or a stack of experts keeps its forward and reads its tensor as
ever; what it reads is the sum, by torch's parametrizations (:mod:`sttp_manifold.nn.held`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

import torch
from torch import Tensor, nn

from sttp_manifold._arguments import explained
from sttp_manifold.errors import ConversionError, ShapeError
from sttp_manifold.nn.adapted import Adapted
from sttp_manifold.nn.formed import once
from sttp_manifold.nn.held import BehindTensor, HeldWeight, behind, held_in, let_go, put_behind
from sttp_manifold.nn.spectral_update import SpectralUpdate
from sttp_manifold.nn.stack import MatrixView, parts_of
from sttp_manifold.nn.weight import SpectralWeight
from sttp_manifold.nn.written import shown

__all__ = ["AdaptedTensor", "adapt_tensors", "adapted_in", "leave_tensors", "make_dense"]


class AdaptedTensor(Adapted, BehindTensor):
    """A tensor of a module that stands still, and spectral updates that are added to it.

    The module stays what it is; ``module.parametrizations[name][0]`` is this one, made by
    :func:`adapt`. The sum is computed where the tensor is read, in float32 at least and rounded to
    its dtype once; within a forward of a network that forms its weights together
    (:func:`~sttp_manifold.nn.together`), once in all. With nothing to add it is the tensor itself.

    Args:
        base: the tensor, or the spectral weight that it is formed from.
        view: how it is read as matrices.

    Shape:
        - base: ``view.shape``

    Raises:
        ConversionError: a ``base`` that is neither.
        ShapeError: another shape than that of the view.

    References:
        docs/decisions/0012-adapters.md.

    Attributes:
        base: the parameter, frozen as a rule, or the spectral weight in its place.
    """

    base: nn.Parameter | HeldWeight

    @explained
    def __init__(self, base: nn.Parameter | HeldWeight, view: MatrixView) -> None:
        super().__init__()
        if not isinstance(base, (nn.Parameter, HeldWeight)):
            raise ConversionError(
                "an AdaptedTensor stands for a parameter of a module, or for the spectral weight "
                f"behind it, got {type(base).__name__}; adapt(model, rank, targets) makes them"
            )
        shape = base.view.shape if isinstance(base, HeldWeight) else tuple(base.shape)
        if shape != view.shape:
            raise ShapeError(f"the tensor has shape {shape}, and the view is of {view.shape}")
        self.base = base
        self._view = view

    @property
    def view(self) -> MatrixView:
        """How the tensor is read as matrices."""
        return self._view

    @property
    def held(self) -> HeldWeight | None:
        """The spectral weight that stands for the tensor without updates; None for a dense one."""
        return self.base if isinstance(self.base, HeldWeight) else None

    @property
    def place(self) -> tuple[torch.dtype, torch.device]:
        """Dtype and device of the tensor."""
        held = self.base.weight if isinstance(self.base, HeldWeight) else self.base
        return held.dtype, held.device

    @property
    def owner(self) -> tuple[nn.Module, str]:
        """This module, and what it calls the tensor."""
        return self, "base"

    def delta(self, update: SpectralUpdate) -> Tensor:
        """What an update adds to the tensor; differentiable.

        Args:
            update: the update.

        Shape:
            - output: ``view.shape``
        """
        return update.alpha * self._view.joined(update.weight())

    def forward(self) -> Tensor:
        """The tensor with all that is added to it.

        Shape:
            - output: ``view.shape``
        """
        updates = list(self.added())
        if not updates and self.probe is None:
            return self.base() if isinstance(self.base, HeldWeight) else self.base
        if torch.compiler.is_compiling() or self.probe is not None:
            return self._sum(updates)
        parts: list[SpectralWeight] = []
        for held in (self.held, *updates):
            parts += () if held is None else parts_of(held.weight)
        tensors = [tensor for weight in parts for tensor in weight._tensors()]
        if not isinstance(self.base, HeldWeight):
            tensors.append(self.base)
        return shown(once(self, parts, tensors, lambda: self._sum(updates)), self, "tensor")

    def _sum(self, updates: list[SpectralUpdate]) -> Tensor:
        base = self.base() if isinstance(self.base, HeldWeight) else self.base
        total = base.to(torch.promote_types(base.dtype, torch.float32))
        for update in updates:
            total = total + self.delta(update).to(total.dtype)
        if self.probe is not None:
            total = total + self.probe
        return total.to(base.dtype)

    def right_inverse(self, tensor: Tensor) -> NoReturn:
        """Refuse an assignment to the tensor, which is a sum.

        Shape:
            - tensor: ``view.shape``

        Raises:
            ConversionError: always, with the calls that work.
        """
        raise ConversionError(self.refusal)

    @property
    def refusal(self) -> str:
        """What is said to whoever writes into the tensor."""
        return (
            "this tensor is a frozen one and the updates of adapters, and what is written into it "
            "would be lost. Write into the frozen one, with torch.no_grad(): "
            "module.parametrizations[name][0].base.copy_(W), or take the adapters away first: "
            "remove_adapter(model)"
        )

    def own(self) -> nn.Parameter:
        """The parameter that updates are merged into.

        Raises:
            ConversionError: a tensor that is formed from a spectral weight.
        """
        if isinstance(self.base, HeldWeight):
            raise ConversionError(
                "its own weight is spectral, and the sum would be of higher rank; call "
                "decompress(model) first, then merge(model)"
            )
        return self.base

    def extra_repr(self) -> str:
        """The shape of the tensor, and which adapters are added."""
        return f"shape={self._view.shape}, {super().extra_repr()}"


def adapted_in(module: nn.Module) -> dict[str, AdaptedTensor]:
    """The tensors of a module that have updates, by name."""
    return {n: ours for n, ours in behind(module).items() if isinstance(ours, AdaptedTensor)}


def adapt_tensors(module: nn.Module, views: Mapping[str, MatrixView]) -> dict[str, AdaptedTensor]:
    """Make tensors of a module ones that can have updates; those that can already stay.

    Args:
        module: the module.
        views: how each of them is read as matrices, by name.

    Returns:
        What stands behind each of them now.
    """
    there, held = adapted_in(module), held_in(module)
    new = {}
    for name, view in views.items():
        if name not in there:
            base = held.get(name) or module._parameters[name]
            assert base is not None
            new[name] = AdaptedTensor(base, view)
    put_behind(module, new)
    return {name: {**there, **new}[name] for name in views}


def leave_tensors(module: nn.Module) -> None:
    """Put what they were before in the places of tensors of a module that have no updates left."""
    bare = {name: ours.base for name, ours in adapted_in(module).items() if not ours.updates}
    put_behind(module, {n: base for n, base in bare.items() if isinstance(base, HeldWeight)})
    let_go(module, {n: base for n, base in bare.items() if not isinstance(base, HeldWeight)})


def make_dense(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """Put parameters in the place of spectral weights of a module; updates stay beside them.

    Args:
        module: the module.
        parameters: by name.
    """
    there = adapted_in(module)
    for name, ours in there.items():
        if name in parameters:
            del ours.base  # a module, where a parameter comes
            ours.base = parameters[name]
    let_go(module, {name: p for name, p in parameters.items() if name not in there})
