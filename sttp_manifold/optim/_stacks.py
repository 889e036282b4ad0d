"""Frames of many parameters, and what an optimizer knows of them, in stacks for a step.

A step works on *blocks*. A block is one flat vector that consists of stacks ``(n, d, r)`` of frames
and, at its end, of coordinates that are no frames:

- small frames of all parameters, padded by rows of zeros to the largest of those with as many
  columns, and all coordinates. They are fetched by one index, which says where in the parameters
  each entry lies. Rows of zeros change nothing in a product, and stay zero where frames move;
- large frames, those of one shape in one stack, which are copied piece by piece.

On the CPU a block is no larger than a cache likes; on an accelerator, where a call costs as much as
the arithmetic of many frames, everything is one block, and large frames are padded as well.

Points and gradients belong to the parameters and are copied into blocks and back. Momentum and
second moments stay in blocks from one step to the next; they are laid out as the parameters again
for whoever asks for the optimizer's state.

Unless they stay with the parameters, as a captured graph needs it: it replays on the memory that it
saw, so the state of each parameter has to keep its address, also when somebody has read it. Then
they are copied like the points, into blocks for the length of a step and back.

Parameters in half precision are worked on in float32, and so is what is kept of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sttp_manifold.optim._blocks import working_dtype
from sttp_manifold.optim._layout import (
    Segment,
    as_they_are,
    element_index,
    free_zeros,
    runs_of,
    scalar_index,
    segments_of,
    sorted_into_stacks,
)

__all__ = ["Block", "Stacks"]

# Elements of a block for each thread of a CPU, 512 KB in float32. Measured: with a network of large
# stacks a step takes two thirds of the time, with one of small frames a twentieth more.
_CACHED = 1 << 17


class Block:
    """Stacks of frames, and coordinates, as one flat vector.

    Args:
        segments: what it consists of, in the order in which it is joined.
        padded: whether frames are padded where that costs less than another stack.
        dtype: of what is computed.
        device: where.

    Attributes:
        arrays: by name, what is kept of every element: a flat vector.
        scalars: by name, what is kept of every frame and coordinate: a vector.
        shapes: of the stacks, ``(n, d, r)``.
        coordinates: how many there are.
        norms: memory for one number for every frame and coordinate.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        *,
        padded: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.arrays: dict[str, Tensor] = {}
        self.scalars: dict[str, Tensor] = {}
        self._views: dict[str, tuple[list[Tensor], Tensor]] = {}
        self._dtype = dtype
        self._sizes = [segment.rows * segment.size for segment in segments]
        self._counts = [segment.rows * segment.scalars for segment in segments]
        frames, coordinates = runs_of(segments)
        stacks = sorted_into_stacks(frames, padded=padded, free=free_zeros(device, dtype))
        self.shapes = [stack.shape for stack in stacks]
        self._frames = sum(map(math.prod, self.shapes))
        self.coordinates = sum(run.many for run in coordinates)
        self._index: Tensor | None = None
        self._inverse: Tensor | None = None
        self._scalar_index: Tensor | None = None
        self._scalar_inverse: Tensor | None = None
        self._zero: Tensor | None = None
        if not as_they_are(stacks, coordinates):
            self._zero = torch.zeros(1, dtype=dtype, device=device)
            total = sum(self._sizes)
            index = element_index(stacks, coordinates, total, device)
            inverse = torch.zeros(total + 1, dtype=torch.long, device=device)
            inverse.scatter_(0, index, torch.arange(len(index), device=device))
            # Tables of int32 are half as large, and faster to go by.
            self._index, self._inverse = index.int(), inverse.narrow(0, 0, total).int()
            scalars = scalar_index(stacks, coordinates, device)
            self._scalar_index, self._scalar_inverse = scalars, torch.argsort(scalars)
        count = sum(n for n, _, _ in self.shapes) + self.coordinates
        self.norms = torch.empty(count, dtype=dtype, device=device)
        self.norm_views = self.parts(self.norms)

    # -- Elements. ------------------------------------------------------------------------------

    def fetch(self, pieces: Sequence[Tensor]) -> Tensor:
        """Copy segments into one flat vector of this block's layout."""
        flat = [piece if piece.ndim == 1 else piece.reshape(-1) for piece in pieces]
        if self._index is None or self._zero is None:
            joined = torch.cat(flat)
        else:
            if self._zero.dtype != flat[0].dtype:
                self._zero = self._zero.to(flat[0].dtype)
            joined = torch.cat([*flat, self._zero]).index_select(0, self._index)
        return joined if joined.dtype == self._dtype else joined.to(self._dtype)

    def put(self, flat: Tensor, pieces: Sequence[Tensor]) -> None:
        """Undo :meth:`fetch`, into segments that are there."""
        _copy(_select(flat, self._inverse), self._sizes, pieces)

    def views(self, flat: Tensor) -> tuple[list[Tensor], Tensor]:
        """Stacks ``(n, d, r)`` and coordinates of a flat vector; without any, anything."""
        offset = flat.storage_offset()
        stacks = []
        for n, d, r in self.shapes:
            stacks.append(flat.as_strided((n, d, r), (d * r, r, 1), offset))
            offset += n * d * r
        if not self.coordinates:
            return stacks, flat
        return stacks, flat.as_strided((self.coordinates,), (1,), offset)

    def kept(self, name: str) -> tuple[list[Tensor], Tensor]:
        """The same of the array that is kept under a name."""
        if name not in self._views:
            self._views[name] = self.views(self.arrays[name])
        return self._views[name]

    def join(self, stacks: Sequence[Tensor], coordinates: Tensor) -> Tensor:
        """Flat vector of stacks and coordinates."""
        flat = [stack.reshape(-1) for stack in stacks]
        if self.coordinates:
            flat.append(coordinates)
        return torch.cat(flat) if len(flat) > 1 else flat[0]

    # -- Scalars. -------------------------------------------------------------------------------

    def fetch_scalars(self, pieces: Sequence[Tensor]) -> Tensor:
        """Copy arrays with one number for a frame or coordinate into one vector."""
        flat = torch.cat([piece.reshape(-1) for piece in pieces])
        return _select(flat, self._scalar_index)

    def put_scalars(self, vector: Tensor, pieces: Sequence[Tensor]) -> None:
        """Undo :meth:`fetch_scalars`, into arrays that are there."""
        _copy(_select(vector, self._scalar_inverse), self._counts, pieces)

    def parts(self, vector: Tensor) -> tuple[list[Tensor], Tensor]:
        """The numbers of each stack, and of the coordinates, in a vector of scalars."""
        sizes = [n for n, _, _ in self.shapes]
        if not self.coordinates:
            return list(torch.split_with_sizes(vector, sizes)), vector
        *stacks, coordinates = torch.split_with_sizes(vector, [*sizes, self.coordinates])
        return stacks, coordinates

    def spread(self, vector: Tensor) -> Tensor:
        """Repeat the number of each frame over its entries: a flat vector of this layout."""
        numbers, coordinates = self.parts(vector)
        flat = [
            mine.view(n, 1).expand(n, d * r).reshape(-1)
            for mine, (n, d, r) in zip(numbers, self.shapes, strict=True)
        ]
        return torch.cat([*flat, coordinates] if self.coordinates else flat)

    def clear(self) -> None:
        """Keep nothing."""
        self.arrays.clear()
        self.scalars.clear()
        self._views.clear()


def _select(flat: Tensor, index: Tensor | None) -> Tensor:
    return flat if index is None else flat.index_select(0, index)


def _copy(flat: Tensor, sizes: Sequence[int], pieces: Sequence[Tensor]) -> None:
    parts = torch.split_with_sizes(flat, sizes)
    sources = [
        part if piece.ndim == 1 else part.view(piece.shape)
        for part, piece in zip(parts, pieces, strict=True)
    ]
    torch._foreach_copy_(list(pieces), sources)


def _flat(piece: Tensor) -> Tensor:
    """The same memory as a vector, where it is one."""
    return piece.view(-1) if piece.is_contiguous() else piece


class Stacks:
    """Parameters that move together, taken apart into blocks.

    Args:
        params: framed parameters of one dtype and device.
        step: how many steps they have taken.
        stays: whether their state stays with them between steps.

    Attributes:
        params: the same.
        step: the same, with those since.
        stays: the same.
        dtype: of what is computed and kept.
        blocks: what a step works on, one after the other.
        points: for each block, its segments of the parameters.
    """

    def __init__(self, params: Sequence[Tensor], step: float, *, stays: bool = False) -> None:
        self.params = list(params)
        self.step = step
        self.stays = stays
        self.dtype = working_dtype(params[0])
        device = params[0].device
        on_cpu = device.type == "cpu" and not stays
        limit = _CACHED * torch.get_num_threads() if on_cpu else math.inf
        self._segments = [segments_of(p, limit) for p in params]
        self._targets, members = self._assign(limit)
        self.blocks = [
            Block(segments, padded=segments[0].small or not on_cpu, dtype=self.dtype, device=device)
            for segments in members
        ]
        self._pointers = [p.data_ptr() for p in params]
        # Of torch's own class, which is read faster; they count what is written as the parameters.
        self._written = [
            _flat(p.detach()) if len(segments) == 1 else p.detach()
            for p, segments in zip(params, self._segments, strict=True)
        ]
        self._versions: list[int] | None = None
        self.points = self.take(self._written)

    def _assign(self, limit: float) -> tuple[list[list[int]], list[list[Segment]]]:
        """The block of each segment of each parameter, and the segments of each block."""
        members: list[list[Segment]] = []
        targets: list[list[int]] = []
        filled: dict[object, tuple[int, int]] = {}  # the last block of a kind, and its size
        for segments in self._segments:
            targets.append([])
            for segment in segments:
                shape = segment.groups[0][1:] if not segment.small else None
                kind = (segment.small, shape) if limit < math.inf else None
                size = segment.rows * segment.size
                k, held = filled.get(kind, (-1, 0))
                if k < 0 or held + size > limit:
                    k, held = len(members), 0
                    members.append([])
                members[k].append(segment)
                filled[kind] = k, held + size
                targets[-1].append(k)
        return targets, members

    def is_current(self) -> bool:
        """Whether the parameters are still at the memory they had."""
        return all(p.data_ptr() == q for p, q in zip(self.params, self._pointers, strict=True))

    def count_step(self) -> None:
        """Count a step, and remember that the parameters are as it has left them."""
        self.step += 1
        self._versions = [p._version for p in self._written]

    def untouched(self) -> bool:
        """Whether nobody has written to the parameters since, as far as torch counts it."""
        return self._versions == [p._version for p in self._written]

    def take(self, arrays: Sequence[Tensor]) -> list[list[Tensor]]:
        """Views of the segments of arrays that are laid out as the parameters, block by block."""
        pieces: list[list[Tensor]] = [[] for _ in self.blocks]
        for array, segments, targets in zip(arrays, self._segments, self._targets, strict=True):
            if len(targets) == 1:
                pieces[targets[0]].append(array)
                continue
            # One split an array: views are most of what a small step costs.
            sizes = [segment.size for segment in segments]
            cut = torch.split_with_sizes(array, sizes, -1)  # without the checks of split
            for piece, k in zip(cut, targets, strict=True):
                pieces[k].append(piece)
        return pieces

    def take_scalars(self, arrays: Sequence[Tensor]) -> list[list[Tensor]]:
        """The same of arrays with one number for a frame or coordinate."""
        pieces: list[list[Tensor]] = [[] for _ in self.blocks]
        for array, segments, targets in zip(arrays, self._segments, self._targets, strict=True):
            counts = [segment.scalars for segment in segments]
            cut = array.split(counts, -1) if len(targets) > 1 else [array]
            for piece, k in zip(cut, targets, strict=True):
                pieces[k].append(piece)
        return pieces

    def lend(self, name: str, arrays: Sequence[Tensor], *, scalars: bool = False) -> None:
        """Copy arrays into the blocks, to be kept there under a name."""
        pieces = self.take_scalars(arrays) if scalars else self.take(arrays)
        for block, mine in zip(self.blocks, pieces, strict=True):
            if scalars:
                block.scalars[name] = block.fetch_scalars(mine)
            else:
                block.arrays[name] = block.fetch(mine)

    def give_back(self, name: str, arrays: Sequence[Tensor]) -> None:
        """Undo :meth:`lend`, into arrays that are there."""
        if name in self.blocks[0].arrays:
            for block, mine in zip(self.blocks, self.take(arrays), strict=True):
                block.put(block.arrays[name], mine)
        else:
            for block, mine in zip(self.blocks, self.take_scalars(arrays), strict=True):
                block.put_scalars(block.scalars[name], mine)
