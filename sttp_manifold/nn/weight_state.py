"""What a state dict holds of a spectral weight beside its numbers, and whether a state fits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from sttp_manifold.nn.state import (
    EXTRA,
    held_by,
    misfit,
    not_finite,
    to_tensor,
    warn_once,
)
from sttp_manifold.nn.torch_state import has_values
from sttp_manifold.spectrum import SpectrumMap, spectrum_map
from sttp_manifold.tt.shape import TTShape

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["StatefulWeight"]


class StatefulWeight(nn.Module):
    """A weight whose state says plan, method and spectrum, and is refused where they differ.

    Attributes:
        method, shape, spectrum, bound, values: as of
            :class:`~sttp_manifold.nn.weight.SpectralWeight`.
        map: the spectrum map.
    """

    method: ClassVar[str]

    shape: TTShape
    spectrum: str
    bound: float
    values: Tensor | None
    map: SpectrumMap

    def _follow_values(self) -> None:
        """Let the map hold the values that the buffer has now, rounded to its dtype or loaded."""
        values = self.values
        if values is None or not has_values(values) or not bool(values.isfinite().all()):
            return  # none, none yet, or memory that nothing has been written to
        # Half precision may have made zeros of small ones.
        least = torch.finfo(values.dtype).tiny
        if bool((values.abs() < least).any()):
            values.copy_(torch.copysign(values.abs().clamp_min(least), values))
        self.map = spectrum_map(self.spectrum, self.shape.rank, self.bound, values.abs().tolist())

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._follow_values()
        return self

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
        self._follow_values()
        if key not in state_dict and there:
            if strict:
                missing_keys.remove(key)
            warn_once(
                error_msgs,
                f"the state of {prefix[:-1]!r} does not say its plan, method and spectrum, as "
                "states of earlier versions do not: whether it fits is not known beyond its sizes; "
                "save the state anew",
            )

    def _wrong(self, state_dict: Mapping[str, Any], prefix: str) -> str | None:
        """What else speaks against the numbers of a state, if anything does."""
        key = prefix + "values"
        values = state_dict.get(key)
        if self.values is None or not isinstance(values, Tensor) or not has_values(values):
            return None
        if bool((values != 0).all()):
            return None
        return f"{key} holds a zero: the singular values of spectrum='fixed' are positive"
