"""All frames of a vector of coordinates as one operator, which a compiler need not look into.

Spelled out in a graph, a frame is some twenty operations and their derivatives, and a chain has up
to a dozen frames: minutes of compilation, and code that is no faster. ``torch.compile`` finds one
operator forth and one back instead, which run as in eager mode: by kernels where there are some
(:mod:`sttp_manifold.frames._kernel_table`), else small frames padded into one stack, the derivative
written out (:mod:`sttp_manifold.frames._wy_form`). Exported programs have plain
operations, which run where this package is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sttp_manifold.frames._kernel_table import (
    FrameTable,
    Placed,
    has_kernel,
    kept_numbers,
    kernels_serve,
)
from sttp_manifold.frames._wy_form import (
    Chart,
    FullChart,
    Parts,
    ReducedChart,
    refuse_overflow,
    transforms_active,
)

__all__ = ["all_frames", "is_wanted"]

# Frames of up to so many columns are padded into one stack, where calls cost more than zeros do.
_SMALL = 16


def is_wanted() -> bool:
    """Whether ``torch.compile`` writes down what is done, not for an export, nor a transform.

    A version of torch that cannot tell an export from a compilation gets plain operations.
    """
    exporting = getattr(torch.compiler, "is_exporting", None)
    if exporting is None or not torch.compiler.is_compiling():
        return False
    return not exporting() and not transforms_active()


def all_frames(
    vector: Tensor, shapes: Sequence[tuple[int, int]], full: Sequence[bool]
) -> list[Tensor]:
    """The frames that a vector holds one after another, by one operator.

    Args:
        vector: their coordinates, in float32 or float64.
        shapes: rows and columns of each.
        full: whether the chart of each is the full one.

    Shape:
        - vector: ``(n,)``
        - output: ``(d, r)`` each
    """
    # No coordinates: minus the identity. They are written here, where they are constants.
    held = [k for k, (d, r) in enumerate(shapes) if _size(d, r, full[k])]
    frames = [-torch.eye(d, r, dtype=vector.dtype, device=vector.device) for d, r in shapes]
    if held:
        rows, columns = [shapes[k][0] for k in held], [shapes[k][1] for k in held]
        flat, _ = torch.ops.sttp_manifold.frames(vector, rows, columns, [full[k] for k in held])
        order = [held[n] for n in _written(columns)]
        parts = flat.split([shapes[k][0] * shapes[k][1] for k in order])
        for k, part in zip(order, parts, strict=True):
            frames[k] = part.view(shapes[k])
    return frames


def _size(d: int, r: int, full: bool) -> int:
    return d * r - r * (r + 1) // 2 if full else r * (d - r)


class _Bucket(NamedTuple):
    """Frames that are computed by one call.

    Attributes:
        chart: how.
        size: of the stack, ``(count, d, r)``.
        fetch: for each entry of the reflectors, its place in the vector, behind whose end is zero.
        take: entries of the frames that are wanted; None for all.
        give: for each entry of the frames, its place among those, behind whose end is none.
    """

    chart: type[Chart]
    size: tuple[int, int, int]
    fetch: Tensor
    take: Tensor | None
    give: Tensor | None

    def reflectors(self, joined: Tensor) -> Tensor:
        count, _, r = self.size
        return joined.index_select(0, self.fetch).view(count, -1, r)

    @property
    def cuts(self) -> list[int]:
        """Numbers of each part that the backward pass needs."""
        count, _, r = self.size
        return [self.fetch.numel(), count * r * r, count * r * r]

    def parts(self, saved: Sequence[Tensor]) -> Parts:
        count, _, r = self.size
        return Parts(*(part.view(count, -1, r) for part in saved))

    @property
    def numel(self) -> int:
        """Entries that are wanted."""
        count, d, r = self.size
        return count * d * r if self.take is None else self.take.numel()


class _Plan(NamedTuple):
    buckets: list[_Bucket]
    scatter: Tensor


class _Shapes(NamedTuple):
    """Rows and columns of each frame, and whether its chart is the full one: a key of a cache."""

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    full: tuple[bool, ...]

    @classmethod
    def of(cls, rows: Sequence[int], columns: Sequence[int], full: Sequence[bool]) -> _Shapes:
        return cls(tuple(rows), tuple(columns), tuple(full))

    def each(self) -> list[tuple[int, int, bool]]:
        return list(zip(*self, strict=True))

    def by_kernels(self, device: torch.device, dtype: torch.dtype) -> bool:
        return kernels_serve(device, dtype) and all(map(has_kernel, self.rows, self.columns))


@lru_cache(maxsize=256)
def _table(given: _Shapes, device: torch.device) -> FrameTable:
    """Frames in the order of their coordinates, written in that of buckets."""
    shapes = given.each()
    starts = list(accumulate((_size(*shape) for shape in shapes), initial=0))
    placed, place = [], 0
    for k in _written(given.columns):
        d, r, whole = shapes[k]
        placed.append(Placed(starts[k], place, d, r, whole, False))
        place += d * r
    return FrameTable(placed, device)


def _written(columns: Sequence[int]) -> list[int]:
    """The order in which frames are written: small ones first."""
    return sorted(range(len(columns)), key=lambda k: columns[k] > _SMALL)


@lru_cache(maxsize=256)
def _plan(given: _Shapes, device: torch.device) -> _Plan:
    """Buckets, and for each coordinate its place among all reflectors."""
    columns = given.columns
    with torch.inference_mode(False), torch.no_grad():
        shapes = given.each()
        starts = list(accumulate((_size(*shape) for shape in shapes), initial=0))
        small = [k for k, r in enumerate(columns) if r <= _SMALL]
        buckets = [_padded([(*shapes[k], starts[k]) for k in small], starts[-1])] if small else []
        buckets += [
            _alone(*shapes[k], starts[k], starts[-1]) for k, r in enumerate(columns) if r > _SMALL
        ]
        fetch = torch.cat([bucket.fetch for bucket in buckets])
        scatter = torch.zeros(starts[-1], dtype=torch.int64)
        mine = fetch < starts[-1]
        scatter[fetch[mine]] = mine.nonzero()[:, 0]
        tables = [
            bucket._replace(
                fetch=bucket.fetch.to(device),
                take=None if bucket.take is None else bucket.take.to(device),
                give=None if bucket.give is None else bucket.give.to(device),
            )
            for bucket in buckets
        ]
        return _Plan(tables, scatter.to(device))


def _reflectors(d: int, r: int, full: bool, start: int, zero: int) -> Tensor:
    """Places of the reflectors of a frame, as those of a full chart; zeros above a reduced one."""
    Y = torch.full((d, r), zero)
    if full:
        i, j = torch.tril_indices(r, r, -1)
        Y[i, j] = torch.arange(start, start + len(i))
        start += len(i)
    Y[r:] = torch.arange(start, start + (d - r) * r).view(d - r, r)
    return Y


def _padded(frames: Sequence[tuple[int, int, bool, int]], zero: int) -> _Bucket:
    """Frames of any shape in one: a column of zeros is a reflector that leaves the frame alone."""
    r = max(r for _, r, _, _ in frames)
    d = max(r, *(d for d, _, _, _ in frames))
    Y = torch.full((len(frames), d, r), zero)
    wanted = torch.zeros(len(frames), d, r, dtype=torch.bool)
    for k, (own_d, own_r, full, start) in enumerate(frames):
        Y[k, :own_d, :own_r] = _reflectors(own_d, own_r, full, start, zero)
        wanted[k, :own_d, :own_r] = True
    take = wanted.flatten().nonzero()[:, 0]
    give = torch.full((wanted.numel(),), len(take))
    give[take] = torch.arange(len(take))
    whole = len(take) == len(give)
    tables = (None, None) if whole else (take, give)
    return _Bucket(FullChart, (len(frames), d, r), Y.flatten(), *tables)


def _alone(d: int, r: int, full: bool, start: int, zero: int) -> _Bucket:
    Y = _reflectors(d, r, full, start, zero)
    chart = FullChart if full else ReducedChart
    return _Bucket(chart, (1, d, r), (Y if full else Y[r:]).flatten(), None, None)


def _frames(
    vector: Tensor, rows: list[int], columns: list[int], full: list[bool]
) -> tuple[Tensor, Tensor]:
    shapes = _Shapes.of(rows, columns, full)
    if shapes.by_kernels(vector.device, vector.dtype):
        return _table(shapes, vector.device).frames(vector.contiguous())
    plan = _plan(shapes, vector.device)
    joined = torch.cat((vector, vector.new_zeros(1)))
    flat, saved = [], []
    for bucket in plan.buckets:
        parts = bucket.chart.parts(bucket.reflectors(joined), refuse_overflow)
        Q = bucket.chart.assemble(parts, False).flatten()
        flat.append(Q if bucket.take is None else Q.index_select(0, bucket.take))
        saved += [part.flatten() for part in parts]
    return torch.cat(flat), torch.cat(saved)


def _pulled_back(
    gradient: Tensor,
    vector: Tensor,
    saved: Tensor,
    rows: list[int],
    columns: list[int],
    full: list[bool],
) -> Tensor:
    shapes = _Shapes.of(rows, columns, full)
    if shapes.by_kernels(vector.device, vector.dtype):
        table = _table(shapes, vector.device)
        return table.pulled_back(torch.zeros_like(vector), vector.contiguous(), gradient, saved)
    plan = _plan(shapes, saved.device)
    kept = iter(saved.split([cut for bucket in plan.buckets for cut in bucket.cuts]))
    gradients = gradient.contiguous().split([bucket.numel for bucket in plan.buckets])
    found = []
    for bucket, G in zip(plan.buckets, gradients, strict=True):
        if bucket.give is not None:
            G = torch.cat((G, G.new_zeros(1))).index_select(0, bucket.give)
        parts = bucket.parts([next(kept) for _ in bucket.cuts])
        found.append(bucket.chart.pull_back(parts, G.view(bucket.size)).flatten())
    return torch.cat(found).index_select(0, plan.scatter)


def _numbers_saved(vector: Tensor, rows: list[int], columns: list[int], full: list[bool]) -> int:
    """What the operator keeps for its backward pass."""
    given = _Shapes.of(rows, columns, full)
    if given.by_kernels(vector.device, vector.dtype):
        return sum(map(kept_numbers, columns))
    shapes = given.each()
    small = [(d, r) for d, r, _ in shapes if r <= _SMALL]
    saved = sum((d if whole else d - r) * r + 2 * r * r for d, r, whole in shapes if r > _SMALL)
    if small:
        r = max(r for _, r in small)
        d = max(r, *(d for d, _ in small))
        saved += len(small) * (d * r + 2 * r * r)
    return saved


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
    schema=f"(Tensor gradient, Tensor vector, Tensor saved, {_SIZES}) -> Tensor",
)


@_forth.register_fake
def _(
    vector: Tensor, rows: list[int], columns: list[int], full: list[bool]
) -> tuple[Tensor, Tensor]:
    numel = sum(d * r for d, r in zip(rows, columns, strict=True))
    return vector.new_empty(numel), vector.new_empty(_numbers_saved(vector, rows, columns, full))


@_back.register_fake
def _(gradient: Tensor, vector: Tensor, saved: Tensor, *sizes: list[Any]) -> Tensor:
    return saved.new_empty(sum(map(_size, *sizes)))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], output[1])
    ctx.sizes = inputs[1:]


def _backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
    found = torch.ops.sttp_manifold.frames_pulled_back(gradient, *ctx.saved_tensors, *ctx.sizes)
    return found, None, None, None


_forth.register_autograd(_backward, setup_context=_keep)
