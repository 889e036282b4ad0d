"""The ways to hold a weight, by name: `make_weight`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Concatenate, ParamSpec

from sttp_manifold._arguments import explained
from sttp_manifold.errors import ConversionError
from sttp_manifold.nn.householder import HouseholderWeight
from sttp_manifold.nn.riemannian import RiemannianWeight
from sttp_manifold.nn.weight import SpectralWeight

__all__ = ["METHODS", "make_weight", "plain_weight", "weight_class"]

METHODS: dict[str, type[HouseholderWeight | RiemannianWeight]] = {
    "householder": HouseholderWeight,
    "riemannian": RiemannianWeight,
}
"""Ways to hold a weight, by name."""


P = ParamSpec("P")


def _of_any_method(
    made: Callable[P, SpectralWeight],
) -> Callable[Concatenate[str, P], SpectralWeight]:
    """A function of a method and of what its classes take, which is typed in one place."""

    @explained
    def make_weight(method: str, *args: P.args, **options: P.kwargs) -> SpectralWeight:
        """A weight held by the method of a name.

        Args:
            method: ``"householder"`` or ``"riemannian"``.
            *args: those of :class:`~sttp_manifold.nn.weight.SpectralWeight`: first its plan.
            **options: likewise.

        Raises:
            ConversionError: an unknown method.
            ShapeError: an unknown ``init``, or a value on another plan.
            SpectrumError: an unknown spectrum, a value that it cannot hold, or ``values`` that are
                not ``r`` positive numbers.

        Example:
            >>> from sttp_manifold import TTShape
            >>> make_weight("riemannian", TTShape.svd(6, 5, rank=2), init="random").method
            'riemannian'
        """
        return weight_class(method)(*args, **options)  # type: ignore[arg-type]

    make_weight.__qualname__ = "make_weight"
    own, *_ = inspect.signature(make_weight).parameters.values()
    theirs = inspect.signature(made)
    make_weight.__signature__ = theirs.replace(  # type: ignore[attr-defined]
        parameters=[own, *theirs.parameters.values()], return_annotation="SpectralWeight"
    )
    return make_weight  # type: ignore[return-value]  # the method may also be named


make_weight = _of_any_method(HouseholderWeight)


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
