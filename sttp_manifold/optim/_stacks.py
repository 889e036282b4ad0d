"""Frames of equal shape of many parameters, and what an optimizer knows of them, in one place.

A step works on stacks ``(n, d, r)``, each of one frame shape of a group, and on one vector of
coordinates. On the CPU a stack is no larger than a cache likes; on an accelerator it is all there
is of its shape. Points and gradients belong to the parameters and are copied into stacks and back.
Momentum and second moments stay in stacks from one step to the next; they are laid out as the
parameters again for whoever asks for the optimizer's state.

Unless they stay with the parameters, as a captured graph needs it: it replays on the memory that it
saw, so the state of each parameter has to keep its address, also when somebody has read it. Then
they are copied like the points, into stacks for the length of a step and back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sttp_manifold._geoopt import EuclideanStiefel
from sttp_manifold.optim._blocks import spectrum_slice

__all__ = ["Stacks"]

# Elements of a stack for each thread of a CPU, 512 KB in float32. Measured: with a network of large
# stacks a step takes two thirds of the time, with one of small frames a twentieth more.
_CACHED = 1 << 17


class _Parts(NamedTuple):
    """How one parameter is taken apart, along its last dimension unless it is a frame itself.

    Attributes:
        sizes: elements of each part.
        counts: numbers that each part has in an array of scalars.
        items: shape of what each part consists of; ``()`` for coordinates.
    """

    sizes: list[int]
    counts: list[int]
    items: list[tuple[int, ...]]


def _parts_of(p: Tensor, limit: float) -> _Parts | None:
    """Parts of a parameter; None for a single Stiefel parameter, which is all of one kind.

    Args:
        p: the parameter.
        limit: elements that a part of several frames may have.
    """
    manifold = p.manifold  # type: ignore[attr-defined]
    if type(manifold) is EuclideanStiefel:
        return None
    groups, part = manifold.frame_groups, spectrum_slice(p)
    parts = _Parts([], [], [])
    for _, count, d, r in groups:
        most = int(max(1, min(limit // (d * r), count)))
        for start in range(0, count, most):
            few = min(most, count - start)
            parts.sizes.append(few * d * r)
            parts.counts.append(few)
            parts.items.append((d, r))
    if part is not None:
        size = part.stop - part.start
        parts.sizes.append(size)
        parts.counts.append(size)
        parts.items.append(())
    return parts


class Stacks:
    """Parameters that move together, taken apart into stacks.

    Args:
        params: framed parameters of one dtype and device.
        step: how many steps they have taken.
        stays: whether their state stays with them between steps.

    Attributes:
        params: the same.
        step: the same, counted on by the optimizer.
        stays: the same.
        arrays: by name, what is kept of every element: one tensor for each stack.
        scalars: by name, what is kept of every frame and coordinate: one vector, stack by stack.
        coordinates: index of the stack of coordinates, which is the last; None without any.
    """

    def __init__(self, params: Sequence[Tensor], step: float, *, stays: bool = False) -> None:
        self.params = list(params)
        self.step = step
        self.stays = stays
        self.arrays: dict[str, list[Tensor]] = {}
        self.scalars: dict[str, Tensor] = {}
        on_cpu = params[0].device.type == "cpu" and not stays
        limit = _CACHED * torch.get_num_threads() if on_cpu else math.inf
        self._parts = [_parts_of(p, limit) for p in params]
        self._items: list[tuple[int, ...]] = []
        self._targets = self._assign(limit)
        self.coordinates = len(self._items) - 1 if () in self._items else None
        self._pointers = [p.data_ptr() for p in params]
        self._points = self.take_apart([p.detach() for p in params])
        self._sizes = [[piece.numel() for piece in pieces] for pieces in self._points]
        self._counts = [
            sum(sizes) // math.prod(item)
            for sizes, item in zip(self._sizes, self._items, strict=True)
        ]

    def _assign(self, limit: float) -> list[list[int]]:
        """For each parameter, the stacks that its parts belong to; the last is for coordinates."""
        filled: dict[tuple[int, ...], tuple[int, int]] = {}  # the last stack of a shape, its size
        targets: list[list[int]] = []
        for p, parts in zip(self.params, self._parts, strict=True):
            targets.append([])
            shapes = parts.items if parts else [tuple(p.shape[-2:])]
            rows = p.numel() // p.shape[-1] if parts else 1
            for item, size in zip(shapes, parts.sizes if parts else [p.numel()], strict=True):
                if not item:
                    targets[-1].append(-1)
                    continue
                k, held = filled.get(item, (-1, 0))
                if k < 0 or held + rows * size > limit:
                    k, held = len(self._items), 0
                    self._items.append(item)
                filled[item] = k, held + rows * size
                targets[-1].append(k)
        if any(-1 in mine for mine in targets):
            self._items.append(())
        last = len(self._items) - 1
        return [[last if k < 0 else k for k in mine] for mine in targets]

    def is_current(self) -> bool:
        """Whether the parameters are still at the memory they had."""
        return all(p.data_ptr() == q for p, q in zip(self.params, self._pointers, strict=True))

    def parts(self, vector: Tensor) -> tuple[Tensor, ...]:
        """Views of the numbers of each stack in a vector of scalars."""
        return torch.split_with_sizes(vector, self._counts)

    @property
    def frames(self) -> range:
        """Indices of the stacks of frames."""
        return range(len(self._items) - (self.coordinates is not None))

    def points(self, k: int) -> Tensor:
        """Copy the points of stack ``k`` into one tensor."""
        return self.join(self._points[k], k)

    def put_points(self, k: int, stack: Tensor) -> None:
        """Copy a stack back to where :meth:`points` found it."""
        self._put(self._points[k], self._sizes[k], stack)

    def _put(self, pieces: Sequence[Tensor], sizes: Sequence[int], stack: Tensor) -> None:
        parts = torch.split_with_sizes(stack.reshape(-1), sizes)
        sources = [
            part if piece.ndim == 1 else part.view(piece.shape)
            for part, piece in zip(parts, pieces, strict=True)
        ]
        torch._foreach_copy_(list(pieces), sources)

    def stack(self, arrays: Sequence[Tensor]) -> list[Tensor]:
        """Copy arrays, each laid out as its parameter, into stacks."""
        return [self.join(pieces, k) for k, pieces in enumerate(self.take_apart(arrays))]

    def stack_scalars(self, arrays: Sequence[Tensor]) -> Tensor:
        """Copy arrays, each with one number for a frame or coordinate, into one vector."""
        return torch.cat([piece.reshape(-1) for piece in self._scalar_pieces(arrays)])

    def put(self, stacks: Sequence[Tensor], arrays: Sequence[Tensor]) -> None:
        """Undo :meth:`stack`, into arrays that are there, each laid out as its parameter."""
        for pieces, sizes, stack in zip(self.take_apart(arrays), self._sizes, stacks, strict=True):
            self._put(pieces, sizes, stack)

    def put_scalars(self, vector: Tensor, arrays: Sequence[Tensor]) -> None:
        """Undo :meth:`stack_scalars`, into arrays that are there."""
        into = self._scalar_pieces(arrays)
        cut = torch.split_with_sizes(vector, [piece.numel() for piece in into])
        torch._foreach_copy_(
            into, [part.view(piece.shape) for part, piece in zip(cut, into, strict=True)]
        )

    def _scalar_pieces(self, arrays: Sequence[Tensor]) -> list[Tensor]:
        """Views of the numbers of each part of each parameter, in the order of the stacks."""
        pieces: list[list[Tensor]] = [[] for _ in self._items]
        for array, parts, targets in zip(arrays, self._parts, self._targets, strict=True):
            cut = array.split(parts.counts, -1) if parts else [array]
            for piece, k in zip(cut, targets, strict=True):
                pieces[k].append(piece)
        return [piece for stack in pieces for piece in stack]

    def take_apart(self, arrays: Sequence[Tensor]) -> list[list[Tensor]]:
        """Views of the parts of arrays that are laid out as the parameters, sorted by stack."""
        pieces: list[list[Tensor]] = [[] for _ in self._items]
        for array, parts, targets in zip(arrays, self._parts, self._targets, strict=True):
            if parts is None:
                pieces[targets[0]].append(array)
                continue
            # One split an array: views are most of what a small step costs.
            cut = torch.split_with_sizes(array, parts.sizes, -1)  # without the checks of split
            for piece, k in zip(cut, targets, strict=True):
                pieces[k].append(piece)
        return pieces

    def join(self, pieces: Sequence[Tensor], k: int) -> Tensor:
        """Copy the pieces of stack ``k`` into one tensor."""
        flat = torch.cat([piece if piece.ndim == 1 else piece.reshape(-1) for piece in pieces])
        return flat.view(-1, *self._items[k])
