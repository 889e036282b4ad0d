"""`SpectralWeight`, what the two ways to hold a weight have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sttp_manifold.errors import ShapeError
from sttp_manifold.nn.initial import computing_dtype
from sttp_manifold.nn.scope import taken
from sttp_manifold.nn.state import (
    EXTRA,
    held_by,
    misfit,
    not_finite,
    to_tensor,
    warn_once,
)
from sttp_manifold.nn.torch_state import has_values, outside_autocast
from sttp_manifold.spectrum import SpectrumMap
from sttp_manifold.tt.contract import left_matrix, right_matrix, times_bond
from sttp_manifold.tt.shape import TTShape
from sttp_manifold.tt.spectral import SpectralTT

__all__ = ["SpectralWeight", "factors_of", "nearest_frames"]

# A value farther from orthonormal than this is no SpectralTT, whatever its rounding; that of
# bfloat16 alone comes to 4e-3.
_ORTHONORMAL = 1e-3


class SpectralWeight(nn.Module, ABC):
    r"""A trainable matrix :math:`W = U \operatorname{diag}(s) V^\top` in spectral TT form.

    Base of the two ways to hold one; made by :func:`make_weight`. Each call computes it anew, for
    its caller to keep.

    Attributes:
        shape: the plan.
        spectrum: name of the spectrum map.
        bound: bound of the spectrum map ``"bounded"``.
        method: name of the way, ``"householder"`` or ``"riemannian"``.

    Raises:
        ShapeError: ``shape`` is no TTShape.

    References:
        [STTP] Sec. 3.
    """

    method: ClassVar[str]

    shape: TTShape
    spectrum: str
    bound: float

    def __init__(self, shape: TTShape, spectrum: str, bound: float) -> None:
        super().__init__()
        if not isinstance(shape, TTShape):
            raise ShapeError(
                f"{type(self).__name__} takes a TTShape, got {shape!r}; call "
                f"{type(self).__name__}(TTShape.for_matrix(d_out, d_in, rank=16))"
            )
        self.shape = shape
        self.spectrum = spectrum
        self.bound = bound
        self.map = SpectrumMap(spectrum, shape.rank, bound)

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Device of the parameters."""

    @abstractmethod
    def _tensors(self) -> tuple[Tensor, ...]:
        """What the weight is computed from, as it is stored now: its vector, perhaps signs."""

    @abstractmethod
    def _value_of(self, tensors: Sequence[Tensor]) -> SpectralTT:
        """The weight of such tensors; frames are computed in float32 at least, and cast back."""

    def _value(self) -> SpectralTT:
        return self._value_of(self._tensors())

    @abstractmethod
    def _set(self, tt: SpectralTT, project: bool) -> None:
        """Move the parameters to an orthonormal, unbatched value."""

    def get_extra_state(self) -> Tensor:
        """Plan, method, spectrum and bound, which a state dict holds beside the numbers.

        Shape:
            - output: ``(n,)``, bytes of JSON
        """
        return to_tensor(held_by(self.method, self.shape, self.spectrum, self.bound))

    def set_extra_state(self, state: object) -> None:
        """Nothing to set: whether a state fits is looked at before its numbers are taken."""

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = held_by(self.method, self.shape, self.spectrum, self.bound)
        key = prefix + EXTRA
        there = [n for n in (*self._parameters, *self._buffers) if prefix + n in state_dict]
        wrong = misfit(state_dict[key], own, prefix) if key in state_dict else None
        wrong = wrong or not_finite(state_dict, prefix, there) or self._wrong(state_dict, prefix)
        if wrong is not None:
            error_msgs.append(wrong)
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if key not in state_dict and there:
            if strict:
                missing_keys.remove(key)
            warn_once(
                error_msgs,
                f"the state of {prefix[:-1]!r} does not say its plan, method and spectrum, as "
                "those of versions before 0.3: whether it fits is not known beyond its sizes; save "
                "the state anew",
            )

    def _wrong(self, state_dict: Mapping[str, Any], prefix: str) -> str | None:
        """What else speaks against the numbers of a state, if anything does."""
        return None

    @abstractmethod
    def bond(self) -> Tensor:
        """The spectrum, or the full bond, without computing a frame.

        Shape:
            - output: ``(r,)``, for a full bond ``(r, r)``
        """

    @property
    def trainable(self) -> bool:
        """Whether any parameter is; a weight without parameters counts as trainable."""
        parameters = list(self.parameters())
        return not parameters or any(p.requires_grad for p in parameters)

    def tt(self) -> SpectralTT:
        """The weight as a value, differentiable in the parameters."""
        found = taken(self, "cores")
        if found is not None:
            split = len(self.shape.merged.out_modes)
            return SpectralTT(found[:split], found[split], found[split + 1 :], self.shape)
        with outside_autocast(self.device):
            return self._value()

    def forward(self) -> Tensor:
        """The dense weight ``W``.

        Shape:
            - output: ``(d_out, d_in)``
        """
        found = taken(self, "dense")
        if found is not None:
            return found[0]
        with outside_autocast(self.device):
            return self._value().to_matrix()

    def factors(self) -> tuple[Tensor, Tensor]:
        """Two factors of the weight, ``U diag(s)`` and ``V^T``.

        Shape:
            - first: ``(d_out, r)``
            - second: ``(r, d_in)``
        """
        found = taken(self, "factors")
        if found is not None:
            return found[0], found[1]
        with outside_autocast(self.device):
            return factors_of(self._value())

    @torch.no_grad()
    def encode_(self, tt: SpectralTT, project: bool = False) -> SpectralWeight:
        """Take over a weight, in place, exact to rounding.

        The weight keeps its own dtype and device. An optimizer's state (momentum) speaks of the
        old coordinates and does not follow.

        Args:
            tt: the value, on the same plan.
            project: take the nearest weight that the spectrum can hold.

        Returns:
            The module itself.

        Raises:
            ShapeError: a value on another plan, with batch dimensions, or whose cores are not
                orthonormal.
            SpectrumError: a value that the spectrum cannot hold, unless ``project``.
        """
        if not isinstance(tt, SpectralTT):
            raise ShapeError(
                f"encode_ takes a SpectralTT, got {type(tt).__name__}; for a matrix call "
                "weight.encode_(tt_svd(W, weight.shape))"
            )
        if not has_values(tt.spectrum, *self._tensors()):
            raise ShapeError(
                f"encode_ needs values: the weight is on {self.device}, the value on {tt.device}; "
                "call weight.to_empty(device='cpu') first, or load_state_dict(..., assign=True)"
            )
        if tt.batch_shape:
            raise ShapeError(
                f"a weight is one matrix, got a batch of shape {tuple(tt.batch_shape)}"
            )
        given = tt.dtype
        wide = torch.promote_types(computing_dtype(self.dtype), tt.dtype)
        tt = tt.detach().to(self.device, wide)
        error = float(tt.orthonormality_error())
        if not error <= max(_ORTHONORMAL, 2 * torch.finfo(given).eps):
            raise ShapeError(
                f"the cores are not orthonormal (error {error:.2g}): they hold no spectral form; "
                "orthogonalize(tt.left, tt.spectrum, tt.right) makes one"
            )
        if given != wide:
            tt = nearest_frames(tt)
            if self.spectrum == "bounded":  # half precision rounds singular values onto the bound
                limit = self.bound * (1 + torch.finfo(given).eps)
                project = project or bool((tt.singular_values() <= limit).all())
        self._set(tt, project)
        return self

    def extra_repr(self) -> str:
        """Size, plan and spectrum, for printing."""
        bound = f", bound={self.bound}" if self.spectrum == "bounded" else ""
        return (
            f"{self.shape.d_out} x {self.shape.d_in}, modes {self.shape}, "
            f"spectrum={self.spectrum!r}{bound}"
        )


def nearest_frames(tt: SpectralTT) -> SpectralTT:
    """The value with each frame as the nearest orthonormal one, and the same spectrum.

    What half precision has rounded is orthonormal again, and no farther from the value that it was
    before than the rounding.

    References:
        Higham, *Matrix nearness problems and applications*, 1989 (the polar factor).
    """

    def nearest(frame: Tensor) -> Tensor:
        U, _, Vh = torch.linalg.svd(frame, full_matrices=False)
        return U @ Vh

    left = tuple(nearest(core.flatten(-3, -2)).view_as(core) for core in tt.left)
    right = tuple(nearest(core.flatten(-2, -1)).view_as(core) for core in tt.right)
    return SpectralTT(left, tt.spectrum, right, tt.shape)


def factors_of(tt: SpectralTT) -> tuple[Tensor, Tensor]:
    """``U diag(s)`` and ``V^T`` of an unbatched value."""
    return times_bond(left_matrix(tt.left), tt.spectrum, 0), right_matrix(tt.right)
