"""`Adapted`: spectral updates beside a tensor that stands still, whoever applies them."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from sttp_manifold._arguments import explained
from sttp_manifold.errors import ConversionError
from sttp_manifold.nn.spectral_update import SpectralUpdate
from sttp_manifold.nn.stack import MatrixView

__all__ = ["Adapted"]


class Adapted(nn.Module, ABC):
    """What :class:`AdaptedLayer` and :class:`AdaptedTensor` have in common.

    Attributes:
        updates: all updates, by the names of their adapters.
        active: names of the adapters that are added.
        merged: names of those that the tensor contains now.
        probe: a tensor of zeros that is added as well, by which gradients are read, or None.
        view: how the tensor is read as matrices.
        place: dtype and device of the tensor.
        owner: the module that holds the tensor as a parameter, and its name there.
    """

    updates: nn.ModuleDict

    def __init__(self) -> None:
        super().__init__()
        self.updates = nn.ModuleDict()
        self.active: tuple[str, ...] = ()
        self._merged: dict[str, SpectralUpdate] = {}
        self.probe: Tensor | None = None

    @property
    @abstractmethod
    def view(self) -> MatrixView:
        """How the tensor is read as matrices."""

    @property
    @abstractmethod
    def place(self) -> tuple[torch.dtype, torch.device]:
        """Dtype and device of the tensor."""

    @property
    @abstractmethod
    def owner(self) -> tuple[nn.Module, str]:
        """The module that holds the tensor as a parameter, if one does, and its name there."""

    @abstractmethod
    def delta(self, update: SpectralUpdate) -> Tensor:
        """What an update adds to the tensor; differentiable.

        Args:
            update: the update.

        Shape:
            - output: ``view.shape``
        """

    @property
    def merged(self) -> tuple[str, ...]:
        """Names of the adapters that the tensor contains now."""
        return tuple(self._merged)

    def added(self) -> Iterator[SpectralUpdate]:
        """The updates that a forward adds."""
        for name in self.active:
            update = self.updates[name]
            assert isinstance(update, SpectralUpdate)
            if name not in self._merged:
                yield update

    @explained
    def add(self, name: str, update: SpectralUpdate) -> None:
        """Hold an update beside the others.

        Args:
            name: of its adapter.
            update: the update.

        Raises:
            ConversionError: a name that is there already, or an update that does not fit.
        """
        self.check_new(name)
        self.check_fits(update)
        self.updates[name] = update.train(self.training)

    def check_fits(self, update: SpectralUpdate) -> None:
        """Raise if an update is not for this tensor; nothing to see here."""

    def check_new(self, name: str) -> None:
        """Raise if there is an adapter of a name.

        Raises:
            ConversionError: there is.
        """
        if name in self.updates:
            raise ConversionError(
                f"there is an adapter {name!r} already; take another name=..., or "
                f"remove_adapter(model, {name!r}) first"
            )

    def drop(self, name: str) -> None:
        """Let an update go; what is merged stays in the tensor."""
        del self.updates[name]
        self._merged.pop(name, None)
        self.active = tuple(other for other in self.active if other != name)

    def own(self) -> nn.Parameter:
        """The parameter that updates are merged into.

        Raises:
            ConversionError: a tensor that is computed from spectral weights or otherwise.
        """
        module, name = self.owner
        parameter = module._parameters.get(name)
        if parameter is None:
            raise ConversionError(
                f"the {name} of its {type(module).__name__} is no parameter but computed from "
                "others; where torch.nn.utils.parametrize does that, remove it first by "
                f"remove_parametrizations(layer, {name!r}), then merge(model)"
            )
        return parameter

    @torch.no_grad()
    def fold(self, name: str, sign: int = 1) -> Tensor:
        """The tensor with an update added to it, or taken from it, and checked.

        Computed in float32 at least, and rounded to the dtype of the tensor once.

        Args:
            name: of the adapter.
            sign: 1 to add, -1 to take what was added.

        Shape:
            - output: ``view.shape``

        Raises:
            ConversionError: a tensor that is no parameter, or a result that is not finite.
        """
        weight = self.own()
        update: nn.Module = self.updates[name] if sign > 0 else self._merged[name]
        assert isinstance(update, SpectralUpdate)
        update.to(weight.device)
        wide = torch.promote_types(weight.dtype, torch.float32)
        delta = self.delta(update).to(weight.device, wide)
        new = (weight.to(wide) + sign * delta).to(weight.dtype)
        if not bool(new.isfinite().all()):
            raise ConversionError(
                f"the weight with {name!r} has entries that are not finite in {weight.dtype}; "
                "call model.float() first, or lower the update"
            )
        return new

    @torch.no_grad()
    def put(self, name: str, weight: Tensor, sign: int) -> None:
        """Write what :meth:`fold` gave into the tensor.

        Args:
            name: of the adapter.
            weight: the new tensor.
            sign: as there.

        Shape:
            - weight: ``view.shape``
        """
        self.own().copy_(weight)
        if sign > 0:
            update = self.updates[name]
            assert isinstance(update, SpectralUpdate)
            # What was added is what will be taken, whatever is trained or loaded in between.
            self._merged[name] = copy.deepcopy(update).requires_grad_(False)
        else:
            del self._merged[name]

    def extra_repr(self) -> str:
        """Which adapters are added."""
        merged = f", merged={self.merged}" if self.merged else ""
        return f"active={self.active}{merged}"
