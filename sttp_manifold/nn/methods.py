"""The ways to hold a weight, by name: `make_weight`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sttp_manifold._arguments import explained
from sttp_manifold.errors import ConversionError
from sttp_manifold.nn.householder import HouseholderWeight
from sttp_manifold.nn.riemannian import RiemannianWeight
from sttp_manifold.nn.weight import SpectralWeight
from sttp_manifold.tt.shape import TTShape
from sttp_manifold.tt.spectral import SpectralTT

__all__ = ["METHODS", "make_weight", "plain_weight", "weight_class"]

METHODS: dict[str, type[HouseholderWeight | RiemannianWeight]] = {
    "householder": HouseholderWeight,
    "riemannian": RiemannianWeight,
}
"""Ways to hold a weight, by name."""


@explained
def make_weight(
    method: str,
    shape: TTShape,
    spectrum: str = "free",
    init: str | SpectralTT = "noisy_eye",
    bound: float = 1.0,
    init_std: float = 1e-4,
    *,
    values: Sequence[float] | None = None,
    project: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> SpectralWeight:
    """A weight held by the method of a name; the arguments are those of its class.

    Args:
        method: ``"householder"`` or ``"riemannian"``.
        shape: the plan.
        spectrum: one of ``identity``, ``free``, ``normalized``, ``bounded``, ``full``, ``fixed``.
        init: ``"eye"``, ``"noisy_eye"``, ``"random"``, or a value to take over.
        bound: bound of ``"bounded"``.
        init_std: deviation for ``"noisy_eye"``.
        values: singular values of ``"fixed"``; by default those of a value as ``init``, else
            evenly spread up to 1.
        project: with a value as ``init``, take the nearest one that the spectrum can hold.
        dtype: floating dtype; that of the value, or torch's default.
        device: likewise.

    Raises:
        ConversionError: an unknown method.
        ShapeError: an unknown ``init``, or a value on another plan.
        SpectrumError: an unknown spectrum, a value that it cannot hold, or ``values`` that are not
            ``r`` positive numbers.

    Example:
        >>> make_weight("riemannian", TTShape.svd(6, 5, rank=2)).method
        'riemannian'
    """
    return weight_class(method)(
        shape,
        spectrum,
        init,
        bound,
        init_std,
        values=values,
        project=project,
        dtype=dtype,
        device=device,
    )


def weight_class(method: object) -> type[HouseholderWeight | RiemannianWeight]:
    """The class of a method.

    Raises:
        ConversionError: an unknown method; the message lists those there are.
    """
    if not isinstance(method, str) or method not in METHODS:
        names = ", ".join(map(repr, METHODS))
        raise ConversionError(
            f"unknown method {method!r}; expected one of {names}, as in method='householder'"
        )
    return METHODS[method]


def plain_weight(weight: SpectralWeight) -> SpectralWeight:
    """A weight of the same method and plan with nothing on it."""
    values = weight.map.values
    return make_weight(
        weight.method, weight.shape, weight.spectrum, "eye", weight.bound, values=values
    )
