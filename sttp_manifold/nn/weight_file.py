"""A spectral weight in a file: its recipe as JSON, and no more numbers than its dimension.

A chart is stored as it is. A point of a manifold is stored by the coordinates of the chart, which
are as many as the dimension and orthonormal whatever has been rounded; or, on demand, as it is, bit
for bit. Signs and given singular values are no parameters: they go with the recipe.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sttp_manifold.errors import ConversionError, SttpError
from sttp_manifold.nn.methods import make_weight, plain_weight
from sttp_manifold.nn.state import EXTRA, from_tensor, held_by, to_tensor
from sttp_manifold.nn.torch_state import has_values
from sttp_manifold.nn.value import exact_value
from sttp_manifold.nn.weight import SpectralWeight
from sttp_manifold.tt.precision import computing_dtype
from sttp_manifold.tt.shape import TTShape

__all__ = ["StoredWeight", "chart_of", "pack", "unpack"]

_CHART, _POINT = "coordinates", "point"


@dataclass(frozen=True)
class StoredWeight:
    """What a file says of a weight.

    Attributes:
        held: plan, method, spectrum and bound, as in a state dict.
        tensor: what its numbers are, ``"coordinates"`` of a chart or a ``"point"``.
        dtype: of the weight, as torch names it.
        signs: of an identity spectrum, a ``+`` or ``-`` each.
        values: of a fixed spectrum, with signs.
    """

    held: Mapping[str, Any]
    tensor: str
    dtype: str
    signs: str | None = None
    values: tuple[float, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        found = {"held": dict(self.held), "tensor": self.tensor, "dtype": self.dtype}
        if self.signs is not None:
            found["signs"] = self.signs
        return found if self.values is None else found | {"values": list(self.values)}

    @classmethod
    def from_dict(cls, said: Mapping[str, Any]) -> StoredWeight:
        """Back, whatever a file says: what makes no weight is an error.

        Raises:
            ConversionError: something is missing, unknown or of another kind.
        """
        try:
            values = said.get("values")
            found = cls(
                dict(said["held"]),
                said["tensor"],
                said["dtype"],
                said.get("signs"),
                None if values is None else tuple(map(float, values)),
            )
            fits = found.tensor in (_CHART, _POINT) and found._torch_dtype.is_floating_point
            plain_weight(found._blank())
        except (KeyError, TypeError, ValueError, AttributeError, SttpError) as error:
            raise ConversionError(f"it says no plan and options of a weight ({error})") from error
        if not fits:
            raise ConversionError(f"it holds {found.tensor!r} in {found.dtype!r}, which is unknown")
        return found

    @property
    def _torch_dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    @property
    def shape(self) -> TTShape:
        """The plan."""
        held = self.held
        return TTShape(held["out_modes"], held["in_modes"], ranks=held["ranks"])

    def _blank(self, method: str | None = None, **where: Any) -> SpectralWeight:
        """A weight of the recipe; by default without memory."""
        held, where = self.held, where or {"device": "meta"}
        values = None if self.values is None else [abs(v) for v in self.values]
        return make_weight(
            method or held["method"],
            self.shape,
            held["spectrum"],
            "eye",
            held.get("bound", 1.0),
            values=values,
            **where,
        )

    def size(self) -> tuple[int, ...]:
        """Shape of the tensor that belongs to it.

        Shape:
            - output: one number
        """
        method = "householder" if self.tensor == _CHART else "riemannian"
        return tuple(self._blank(method).get_parameter(self.tensor).shape)


def chart_of(weight: SpectralWeight) -> SpectralWeight:
    """The same weight held by a chart, in float32 at least."""
    return make_weight(
        "householder",
        weight.shape,
        weight.spectrum,
        exact_value(weight),
        weight.bound,
        dtype=computing_dtype(weight.dtype),
        device=weight.device,
    )


@torch.no_grad()
def pack(weight: SpectralWeight, *, exact: bool) -> tuple[StoredWeight, Tensor]:
    """What a file says of a weight, and the one tensor that it holds for it.

    Args:
        weight: the weight.
        exact: whether a point is stored as it is.

    Shape:
        - second: ``(n,)``

    Raises:
        ConversionError: a weight without numbers, or with some that are not finite.
    """
    if not has_values(*weight._tensors()):
        raise ConversionError(
            f"it holds no numbers to save (device {weight.device.type!r}); load the model first"
        )
    if not all(bool(t.isfinite().all()) for t in weight._tensors()):
        raise ConversionError("it has entries that are not finite: the training has diverged")
    held = from_tensor(weight.get_extra_state())
    assert held is not None
    if weight.method == "riemannian" and not exact:
        name, holder = _CHART, chart_of(weight)
    else:
        name, holder = (_CHART if weight.method == "householder" else _POINT), weight
    signs, values = getattr(holder, "signs", None), holder.values
    stored = StoredWeight(
        held,
        name,
        str(weight.dtype).removeprefix("torch."),
        None if signs is None else "".join("+" if s > 0 else "-" for s in signs.tolist()),
        None if values is None else tuple(values.double().tolist()),
    )
    return stored, holder.get_parameter(name).detach()


@torch.no_grad()
def unpack(
    stored: StoredWeight,
    numbers: Tensor,
    dtype: torch.dtype | None,
    device: torch.device,
) -> SpectralWeight:
    """The weight of a file.

    Args:
        stored: what the file says of it.
        numbers: its tensor.
        dtype: of the weight; by default that of the file.
        device: of the weight.

    Shape:
        - numbers: ``(n,)``

    Raises:
        ConversionError: numbers that are no such weight.
    """
    tensor = numbers.to(device)
    holder = stored._blank(
        "householder" if stored.tensor == _CHART else "riemannian",
        dtype=tensor.dtype,
        device=device,
    )
    state: dict[str, Any] = {stored.tensor: tensor}
    if stored.signs is not None:
        signs = [1.0 if sign == "+" else -1.0 for sign in stored.signs]
        state["signs"] = torch.tensor(signs, dtype=tensor.dtype, device=device)
    if stored.values is not None:
        state["values"] = torch.tensor(stored.values, dtype=tensor.dtype, device=device)
    held = stored.held
    state[EXTRA] = to_tensor(
        held_by(holder.method, stored.shape, held["spectrum"], holder.bound) | {"sttp": 1}
    )
    try:
        holder.load_state_dict(state)
    except RuntimeError as error:
        raise ConversionError(str(error)) from error
    dtype = stored._torch_dtype if dtype is None else dtype
    if holder.method == held["method"]:
        return holder.to(dtype)
    return make_weight(
        held["method"],
        stored.shape,
        held["spectrum"],
        exact_value(holder),
        holder.bound,
        dtype=dtype,
        device=device,
    )
