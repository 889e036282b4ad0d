"""Frames of a vector of coordinates by kernels, as one operator that a compiler need not look into.

See :mod:`sttp_manifold.frames._kernel_table`, of which it makes the tables, one for each list of
sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sttp_manifold.frames._kernel_table import FrameTable, Placed, kept_numbers
from sttp_manifold.frames._wy_form import chart_of

__all__ = ["frames_by_kernels"]


def frames_by_kernels(
    vector: Tensor, shapes: Sequence[tuple[int, int]], full: Sequence[bool]
) -> list[Tensor]:
    """The frames that a vector holds one after another.

    Args:
        vector: their coordinates, in float32, where there are kernels.
        shapes: rows and columns of each, for which there is one.
        full: whether the chart of each is the full one.

    Shape:
        - vector: ``(n,)``
        - output: ``(d, r)`` each
    """
    rows, columns = [d for d, _ in shapes], [r for _, r in shapes]
    flat, _ = torch.ops.sttp_manifold.frames(vector, rows, columns, full)
    parts = flat.split([d * r for d, r in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


@lru_cache(maxsize=256)
def _table(
    rows: tuple[int, ...], columns: tuple[int, ...], full: tuple[bool, ...], device: torch.device
) -> FrameTable:
    """Frames in the order of their coordinates."""
    placed, start, place = [], 0, 0
    for d, r, whole in zip(rows, columns, full, strict=True):
        placed.append(Placed(start, place, d, r, whole, False))
        start, place = start + chart_of(whole).size(d, r), place + d * r
    return FrameTable(placed, device)


def _frames(
    vector: Tensor, rows: list[int], columns: list[int], full: list[bool]
) -> tuple[Tensor, Tensor]:
    table = _table(tuple(rows), tuple(columns), tuple(full), vector.device)
    return table.frames(vector.contiguous())


def _pulled_back(
    gradient: Tensor,
    vector: Tensor,
    kept: Tensor,
    rows: list[int],
    columns: list[int],
    full: list[bool],
) -> Tensor:
    table = _table(tuple(rows), tuple(columns), tuple(full), vector.device)
    return table.pulled_back(torch.zeros_like(vector), vector.contiguous(), gradient, kept)


# --- As torch sees them. The types are written out: torch reads no postponed annotations. ---

_SIZES = "int[] rows, int[] columns, bool[] full"
_forth = torch.library.custom_op(
    "sttp_manifold::frames",
    _frames,
    mutates_args=(),
    schema=f"(Tensor vector, {_SIZES}) -> (Tensor, Tensor)",
)
_back = torch.library.custom_op(
    "sttp_manifold::frames_pulled_back",
    _pulled_back,
    mutates_args=(),
    schema=f"(Tensor gradient, Tensor vector, Tensor kept, {_SIZES}) -> Tensor",
)


@_forth.register_fake
def _(
    vector: Tensor, rows: list[int], columns: list[int], full: list[bool]
) -> tuple[Tensor, Tensor]:
    numel = sum(d * r for d, r in zip(rows, columns, strict=True))
    return vector.new_empty(numel), vector.new_empty(sum(map(kept_numbers, columns)))


@_back.register_fake
def _(gradient: Tensor, vector: Tensor, kept: Tensor, *sizes: list[Any]) -> Tensor:
    return torch.empty_like(vector, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], output[1])
    ctx.sizes = inputs[1:]


def _backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
    found = torch.ops.sttp_manifold.frames_pulled_back(gradient, *ctx.saved_tensors, *ctx.sizes)
    return found, None, None, None


_forth.register_autograd(_backward, setup_context=_keep)
