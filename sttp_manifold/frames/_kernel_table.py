"""Frames of any shapes by kernels: the tables that these go by, and when they can be used.

Frames of float32 on CUDA of up to 128 columns and 512 rows, where Triton is there. Taller ones are
for products of the whole stack: one program a frame would take longer. Everything else, and every
second derivative, is computed by plain operations, which stay the reference.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import count
from typing import NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from sttp_manifold.frames._triton import has_triton, runs_on

__all__ = ["FrameTable", "Placed", "has_kernel", "kernels_serve"]

_WIDEST, _TALLEST = 128, 512


class Placed(NamedTuple):
    """A frame: where its coordinates are, and where it is written.

    Attributes:
        start: of its coordinates, in their vector.
        place: of its entries, in theirs.
        d, r: its rows and columns.
        full: whether its chart is the full one.
        turned: whether its transpose is written.
    """

    start: int
    place: int
    d: int
    r: int
    full: bool
    turned: bool


def kernels_serve(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether frames of coordinates of a dtype on a device go by kernels.

    ``STTP_KERNELS=0`` in the environment switches them off, for plans that are made from then on.
    """
    wanted = os.environ.get("STTP_KERNELS") != "0"
    return runs_on(device) and wanted and dtype == torch.float32 and has_triton()


def has_kernel(d: int, r: int) -> bool:
    """Whether there is a kernel for frames of this shape."""
    return 0 < r <= _WIDEST and d <= _TALLEST


class _Width(NamedTuple):
    width: int
    rows: Tensor


class FrameTable:
    """Frames that are formed together, by one launch for each width, and one each back.

    Args:
        frames: which, and where; :func:`has_kernel` of each.
        device: where.

    Attributes:
        entries: of all frames.
        kept: numbers that the backward pass needs.
        number: by which the operators know it.
    """

    def __init__(self, frames: Sequence[Placed], device: torch.device) -> None:
        by_width: dict[int, list[Placed]] = {}
        for frame in frames:
            by_width.setdefault(_padded(frame.r), []).append(frame)
        self._widths = [
            # The longest ones first, so that none is begun when all others are done.
            _Width(
                width,
                torch.tensor(
                    sorted(mine, key=lambda frame: -frame.d * frame.r), dtype=torch.int64
                ).to(device),
            )
            for width, mine in sorted(by_width.items())
        ]
        self.entries = sum(frame.d * frame.r for frame in frames)
        self.kept = sum(kept_numbers(frame.r) for frame in frames)
        self.number = next(_NUMBERS)
        _TABLES[self.number] = self

    def frames(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """All frames, by an operator, and what its backward pass needs.

        Args:
            vector: the coordinates.
        """
        found: tuple[Tensor, Tensor] = torch.ops.sttp_manifold.placed_frames(vector, self.number)
        return found

    def pulled_back(self, base: Tensor, vector: Tensor, gradients: Tensor, kept: Tensor) -> Tensor:
        """Cotangents of the coordinates, by an operator.

        Args:
            base: what is to be where no coordinates are, laid out as ``vector``.
            vector: the coordinates.
            gradients: cotangents of the frames, laid out as those.
            kept: what :meth:`frames` has kept.
        """
        found: Tensor = torch.ops.sttp_manifold.placed_frames_pulled_back(
            base, vector, gradients, kept, self.number
        )
        return found

    def form(self, vector: Tensor, frames: Tensor, kept: Tensor) -> None:
        """Write all frames.

        Args:
            vector: the coordinates.
            frames: where to write.
            kept: memory for what the backward pass needs.
        """
        from sttp_manifold.frames._kernels import form_frames
        from sttp_manifold.frames._tiles import SIZES

        with torch.cuda.device_of(vector):
            for (width, rows), mine in zip(self._widths, self._parts(kept), strict=True):
                form_frames[(len(rows),)](rows, vector, frames, mine, R=width, **SIZES[width])

    def pull_back(self, vector: Tensor, gradients: Tensor, kept: Tensor, result: Tensor) -> None:
        """Write the cotangents of all coordinates.

        Args:
            vector: the coordinates.
            gradients: cotangents of the frames, laid out as those.
            kept: what :meth:`form` has kept.
            result: where to write, laid out as ``vector``; what is no coordinate is left alone.
        """
        from sttp_manifold.frames._kernels import pull_back_frames
        from sttp_manifold.frames._tiles import SIZES

        scratch = self._parts(torch.empty_like(kept))
        with torch.cuda.device_of(vector):
            for (width, rows), mine, own in zip(
                self._widths, self._parts(kept), scratch, strict=True
            ):
                pull_back_frames[(len(rows),)](
                    rows, vector, gradients, mine, own, result, R=width, **SIZES[width]
                )

    def _parts(self, kept: Tensor) -> Sequence[Tensor]:
        return kept.split([2 * width * width * len(rows) for width, rows in self._widths])


def _padded(r: int) -> int:
    """As :func:`sttp_manifold.frames._tiles.padded`, which imports Triton."""
    return max(16, 1 << (r - 1).bit_length())


def kept_numbers(r: int) -> int:
    """What the backward pass needs of a frame of ``r`` columns."""
    return 2 * _padded(r) ** 2


# --- As operators, so that vmap and fake tensors know what to do with them. ---

_TABLES: WeakValueDictionary[int, FrameTable] = WeakValueDictionary()
_NUMBERS = count()
_LIBRARY = torch.library.Library("sttp_manifold", "FRAGMENT")
_LIBRARY.define("placed_frames(Tensor vector, int table) -> (Tensor, Tensor)")
_LIBRARY.define(
    "placed_frames_pulled_back(Tensor base, Tensor vector, Tensor gradients, Tensor kept, "
    "int table) -> Tensor"
)


def _form(vector: Tensor, table: int) -> tuple[Tensor, Tensor]:
    mine = _TABLES[table]
    frames, kept = vector.new_empty(mine.entries), vector.new_empty(mine.kept)
    mine.form(vector, frames, kept)
    return frames, kept


def _pull_back(base: Tensor, vector: Tensor, gradients: Tensor, kept: Tensor, table: int) -> Tensor:
    result = base.clone()
    _TABLES[table].pull_back(vector, gradients.contiguous(), kept, result)
    return result


def _sizes(vector: Tensor, table: int) -> tuple[Tensor, Tensor]:
    mine = _TABLES[table]
    return vector.new_empty(mine.entries), vector.new_empty(mine.kept)


def _size(base: Tensor, vector: Tensor, gradients: Tensor, kept: Tensor, table: int) -> Tensor:
    return torch.empty_like(base)


for _name, _kernel, _fake in (
    ("placed_frames", _form, _sizes),
    ("placed_frames_pulled_back", _pull_back, _size),
):
    for _key in ("CPU", "CUDA"):
        _LIBRARY.impl(_name, _kernel, _key)
    torch.library.register_fake(f"sttp_manifold::{_name}", _fake, lib=_LIBRARY)
