"""Checks of a weight that is given to a layer, in place of the options that make one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sttp_manifold.errors import ConversionError, ShapeError
from sttp_manifold.nn.recipe import Recipe
from sttp_manifold.nn.stack import MatrixView, WeightStack, parts_of, rows_and_columns
from sttp_manifold.nn.weight import SpectralWeight

__all__ = ["check_fits", "check_given"]


def check_given(caller: str, weight: Any, options: Mapping[str, Any]) -> None:
    """Raise for options of a weight where the weight is given.

    Raises:
        ShapeError: ``weight`` is no spectral weight.
        ConversionError: such options.
    """
    if not isinstance(weight, (SpectralWeight, WeightStack)):
        raise ShapeError(
            f"{caller} takes a SpectralWeight as weight=..., got a {type(weight).__name__}; "
            "make_weight('householder', shape) makes one"
        )
    if options:
        raise ConversionError(
            f"{caller} got a weight=... and also {', '.join(options)}, which would make another; "
            "leave one of them out"
        )


def check_fits(
    caller: str, weight: SpectralWeight | WeightStack, view: MatrixView, recipe: Recipe
) -> None:
    """Raise for a weight of another size or rank than those asked for.

    Raises:
        ShapeError: such a weight.
    """
    shape, count = weight.shape, len(parts_of(weight))
    d_out, d_in = rows_and_columns(view.sizes)
    if (shape.d_out, shape.d_in, count) != (d_out, d_in, view.count):
        times = "" if view.count == count == 1 else f"{view.count} x "
        got = "" if view.count == count == 1 else f"{count} x "
        raise ShapeError(
            f"{caller} needs a {times}{d_out} x {d_in} weight, got one of "
            f"{got}{shape.d_out} x {shape.d_in}"
        )
    if recipe.rank is not None and recipe.plan(view.sizes).rank != shape.rank:
        raise ShapeError(
            f"{caller} got rank={recipe.rank} and a weight=... of rank {shape.rank}; leave the "
            "rank out to use the weight as it is"
        )
