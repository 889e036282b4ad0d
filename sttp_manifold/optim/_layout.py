"""How frames of parameters are laid out in the stacks of a block: which, how padded, from where."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from sttp_manifold.optim._blocks import frame_shapes, spectrum_slice

__all__ = [
    "Run",
    "Segment",
    "Stack",
    "as_they_are",
    "element_index",
    "free_zeros",
    "is_small",
    "runs_of",
    "scalar_index",
    "segments_of",
    "sorted_into_stacks",
]

# Frames that are padded: columns and elements up to these. Beyond, the products of a stack cost
# more than the calls that one stack less would save.
_COLUMNS, _ELEMENTS = 16, 1 << 12
# Zeros that are taken for one stack less, beside as many as there are elements: measured on a CPU.
_FREE = 1 << 13
# An accelerator: seconds that the launches of a stack take, and multiplications and additions in a
# second. Assumed, not measured: the stacks of a network do not hang on a factor of two.
_LAUNCHES, _RATES = 13 * 5e-6, {torch.float32: 4e12, torch.float64: 5e11}


@dataclass
class Segment:
    """Adjacent elements of one parameter that belong to one block.

    Attributes:
        rows: how many points the parameter has; a segment is a part of each.
        groups: frames in it, ``(count, d, r)``, in their order.
        coordinates: how many coordinates follow.
    """

    rows: int
    groups: list[tuple[int, int, int]] = field(default_factory=list)
    coordinates: int = 0

    @property
    def size(self) -> int:
        """Elements of one point."""
        return sum(count * d * r for count, d, r in self.groups) + self.coordinates

    @property
    def small(self) -> bool:
        """Whether it goes into a padded block: small frames, or coordinates alone."""
        return not self.groups or is_small(*self.groups[0][1:])

    @property
    def scalars(self) -> int:
        """Frames and coordinates of one point."""
        return sum(count for count, _, _ in self.groups) + self.coordinates


class Run(NamedTuple):
    """Adjacent frames of one shape: where they and their scalars lie among joined segments."""

    many: int
    d: int
    r: int
    start: int
    scalar: int


def runs_of(segments: Iterable[Segment]) -> tuple[list[Run], list[Run]]:
    """Frames of joined segments, and their coordinates, each as a frame of one element."""
    frames: list[Run] = []
    coordinates: list[Run] = []
    start = scalar = 0
    for segment in segments:
        for _ in range(segment.rows):
            for count, d, r in segment.groups:
                frames.append(Run(count, d, r, start, scalar))
                start, scalar = start + count * d * r, scalar + count
            if segment.coordinates:
                coordinates.append(Run(segment.coordinates, 1, 1, start, scalar))
                start, scalar = start + segment.coordinates, scalar + segment.coordinates
    return frames, coordinates


class Stack(NamedTuple):
    """Frames of one stack: their rows, with those of zeros, their columns, and where they are."""

    d: int
    r: int
    runs: list[Run]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of the stack."""
        return sum(run.many for run in self.runs), self.d, self.r


def free_zeros(device: torch.device, dtype: torch.dtype) -> Callable[[int], float]:
    """How many zeros cost less than one stack more, of so many columns.

    A step multiplies and adds some twelve times for each element and column.
    """
    if device.type == "cpu":
        return lambda r: _FREE
    return lambda r: _LAUNCHES * _RATES[dtype] / (12 * r)


def sorted_into_stacks(
    frames: Sequence[Run], *, padded: bool, free: Callable[[int], float]
) -> list[Stack]:
    """Stacks of one shape each, or of as many columns where rows of zeros cost little.

    Args:
        frames: what is sorted.
        padded: whether to pad.
        free: zeros that cost less than a stack, as :func:`free_zeros` says.
    """
    kinds = list(dict.fromkeys((run.r, run.d) for run in frames))
    stacks: list[Stack] = []
    for r, d in sorted(kinds, reverse=True) if padded else kinds:
        runs = [run for run in frames if (run.r, run.d) == (r, d)]
        count = sum(run.many for run in runs)
        if padded and stacks and stacks[-1].r == r:
            zeros = count * (stacks[-1].d - d) * r
            if zeros <= max(free(r), count * d * r):
                stacks[-1].runs.extend(runs)
                continue
        stacks.append(Stack(d, r, runs))
    return stacks


def as_they_are(stacks: Sequence[Stack], coordinates: Sequence[Run]) -> bool:
    """Whether joined segments are the stacks already, without padding."""
    position = 0
    runs = [(stack.d, run) for stack in stacks for run in stack.runs]
    for d, run in [*runs, *((1, run) for run in coordinates)]:
        if run.d != d or run.start != position:
            return False
        position += run.many * run.d * run.r
    return True


def element_index(
    stacks: Sequence[Stack], coordinates: Sequence[Run], zero: int, device: torch.device
) -> Tensor:
    """For each element of a block the element of the joined segments, ``zero`` for none."""
    parts = []
    for stack in stacks:
        within = torch.arange(stack.d * stack.r, device=device)
        for run in stack.runs:
            size = run.d * run.r
            starts = run.start + size * torch.arange(run.many, device=device)
            index = torch.where(within < size, starts.view(-1, 1) + within, zero)
            parts.append(index.view(-1))
    parts += [run.start + torch.arange(run.many, device=device) for run in coordinates]
    return torch.cat(parts)


def scalar_index(
    stacks: Sequence[Stack], coordinates: Sequence[Run], device: torch.device
) -> Tensor:
    """For each frame and coordinate of a block its scalar among those of the joined segments."""
    runs = [*(run for stack in stacks for run in stack.runs), *coordinates]
    return torch.cat([run.scalar + torch.arange(run.many, device=device) for run in runs])


def is_small(d: int, r: int) -> bool:
    return r <= _COLUMNS and d * r <= _ELEMENTS


def segments_of(p: Tensor, limit: float) -> list[Segment]:
    """Segments of a parameter: small frames and coordinates that are adjacent, or large frames.

    Args:
        p: the parameter.
        limit: elements that a segment of several large frames may have; infinite: one segment.
    """
    rows, groups = frame_shapes(p)
    part = spectrum_slice(p)
    coordinates = part.stop - part.start if part is not None else 0
    if limit == math.inf:
        return [Segment(rows, list(groups), coordinates)]
    if p.ndim > 1 and len(groups) == 1 and p.shape[-2:] == groups[0][1:]:
        limit = math.inf  # a stack of single frames, which is no flat vector to cut
    segments: list[Segment] = []
    small: Segment | None = None
    for count, d, r in groups:
        if is_small(d, r):
            if small is None:
                small = Segment(rows)
                segments.append(small)
            small.groups.append((count, d, r))
            continue
        small = None
        most = count if limit == math.inf else max(1, min(int(limit) // (d * r), count))
        for start in range(0, count, most):
            segments.append(Segment(rows, [(min(most, count - start), d, r)]))
    if coordinates:
        if small is None:
            small = Segment(rows)
            segments.append(small)
        small.coordinates = coordinates
    return segments
