"""All frames of a vector of coordinates, as ``torch.compile`` and ``torch.export`` are given them.

Where there are kernels, one operator forms all frames, and a compiler need not look into it
(:mod:`sttp_manifold.frames.operator`). Elsewhere they are plain operations, which it puts into one
loop between two products, and whose derivative torch finds: equal frames that follow each other as
one batch, and small ones padded into one stack, whatever their shape. One by one they would be
twenty operations each, and a chain has up to a dozen.

A frame with a reflector whose squared norm overflows is NaN, as on an accelerator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from sttp_manifold.frames._kernel_table import has_kernel, kernels_serve
from sttp_manifold.frames._wy_form import (
    Chart,
    FullChart,
    chart_of,
    poison_overflow,
    transforms_active,
)
from sttp_manifold.frames.operator import frames_by_kernels

__all__ = ["all_frames", "is_wanted"]

# Frames of up to so many columns are padded into one stack: calls cost more than zeros do.
_SMALL = 16


def is_wanted() -> bool:
    """Whether a compiler or an export writes down what is done, and no transform beside."""
    return torch.compiler.is_compiling() and not transforms_active()


def _takes_operators() -> bool:
    """Whether a graph may call operators of this package: not one that is exported.

    A version of torch that cannot tell an export from a compilation gets plain operations.
    """
    exporting = getattr(torch.compiler, "is_exporting", None)
    return exporting is not None and not exporting()


def all_frames(
    vector: Tensor, shapes: Sequence[tuple[int, int]], full: Sequence[bool]
) -> list[Tensor]:
    """The frames that a vector holds one after another.

    Args:
        vector: their coordinates, in float32 or float64.
        shapes: rows and columns of each.
        full: whether the chart of each is the full one.

    Shape:
        - vector: ``(n,)``
        - output: ``(d, r)`` each
    """
    # No coordinates: minus the identity. They are written here, where they are constants.
    frames = [-torch.eye(d, r, dtype=vector.dtype, device=vector.device) for d, r in shapes]
    sizes = [chart_of(whole).size(d, r) for (d, r), whole in zip(shapes, full, strict=True)]
    held = [k for k, size in enumerate(sizes) if size]
    kernels = kernels_serve(vector.device, vector.dtype) and _takes_operators()
    by_kernels = [k for k in held if kernels and has_kernel(*shapes[k])]
    others = [k for k in held if k not in by_kernels]
    parts = vector.split(sizes)
    for some, form in ((by_kernels, frames_by_kernels), (others, _plain_frames)):
        if some:
            own = vector if len(some) == len(held) else torch.cat([parts[k] for k in some])
            formed = form(own, [shapes[k] for k in some], [full[k] for k in some])
            for k, frame in zip(some, formed, strict=True):
                frames[k] = frame
    return frames


@dataclass
class _Run:
    """Equal frames that follow each other.

    Attributes:
        many: how many.
        d: rows of each.
        r: columns of each.
        full: whether their chart is the full one.
    """

    many: int
    d: int
    r: int
    full: bool

    @property
    def chart(self) -> type[Chart]:
        return chart_of(self.full)

    @property
    def numel(self) -> int:
        return self.many * self.chart.size(self.d, self.r)

    def reflectors(self, coordinates: Tensor) -> Tensor:
        """Those of the chart, without their ones."""
        return self.chart.unpack(coordinates.view(self.many, -1), self.d, self.r)


def _plain_frames(
    vector: Tensor, shapes: Sequence[tuple[int, int]], full: Sequence[bool]
) -> list[Tensor]:
    runs: list[_Run] = []
    for (d, r), whole in zip(shapes, full, strict=True):
        last = runs[-1] if runs else None
        if last is not None and (last.d, last.r, last.full) == (d, r, whole):
            runs[-1] = _Run(last.many + 1, d, r, whole)
        else:
            runs.append(_Run(1, d, r, whole))
    pieces = vector.split([run.numel for run in runs])
    found: list[list[Tensor]] = [[] for _ in runs]
    for places in _batches(runs):
        mine = [runs[k] for k in places]
        for k, Q in zip(places, _frames(mine, [pieces[k] for k in places]), strict=True):
            found[k] = list(Q.unbind())
    return [frame for frames in found for frame in frames]


def _batches(runs: Sequence[_Run]) -> list[list[int]]:
    """Which runs are computed as one."""
    small = [k for k, run in enumerate(runs) if run.r <= _SMALL]
    return ([small] if small else []) + [[k] for k, run in enumerate(runs) if run.r > _SMALL]


def _frames(runs: Sequence[_Run], coordinates: Sequence[Tensor]) -> list[Tensor]:
    """Frames ``(many, d, r)``: of one run by its own chart, of several by the full one."""
    Y = [run.reflectors(vector) for run, vector in zip(runs, coordinates, strict=True)]
    if len(runs) == 1:
        chart = runs[0].chart
        return [chart.assemble(chart.parts(Y[0], poison_overflow), False)]
    d, r = max([run.d for run in runs]), max([run.r for run in runs])
    padded = []
    for run, X in zip(runs, Y, strict=True):
        # Reduced frames are full ones whose reflectors are zero above, and a column of zeros is a
        # reflector that leaves the frame alone.
        above = 0 if run.full else run.r
        padded.append(pad(X, (0, r - run.r, above, d - above - X.shape[1])))
    Q = FullChart.assemble(FullChart.parts(torch.cat(padded), poison_overflow), False)
    parts = Q.split([run.many for run in runs])
    return [X[:, : run.d, : run.r] for run, X in zip(runs, parts, strict=True)]
