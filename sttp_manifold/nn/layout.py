"""Static plan of a batch of weights: which parameters are stacked, and what is made of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor

from sttp_manifold.spectrum import SpectrumMap
from sttp_manifold.tt.shape import TTShape

if TYPE_CHECKING:
    from sttp_manifold.nn.riemannian import RiemannianWeight
    from sttp_manifold.nn.weight import SpectralWeight

__all__ = ["Layout", "Member", "partners"]

Kind = tuple[torch.dtype, torch.device]


class Member(NamedTuple):
    """A weight in a form, and the tensors that it is computed from."""

    weight: SpectralWeight
    form: str
    tensors: tuple[Tensor, ...]

    @property
    def trainable(self) -> bool:
        """Whether any of the tensors is."""
        return any(tensor.requires_grad for tensor in self.tensors)

    @property
    def kind(self) -> Kind:
        """Dtype and device."""
        return self.tensors[0].dtype, self.tensors[0].device


class FrameKey(NamedTuple):
    """What frames of one batch have in common."""

    d: int
    r: int
    full: bool
    right: bool
    kind: Kind


def frame_keys(member: Member) -> list[FrameKey | None]:
    """Key of each core's frame; None for a constant one, and for frames that are stored as such."""
    weight = member.weight
    plan = weight.shape.merged
    split = len(plan.out_modes)
    chart = getattr(weight, "chart", None)
    if chart is None:
        return []
    return [
        FrameKey(d, r, full, k >= split, member.kind) if size else None
        for k, ((d, r), full, size) in enumerate(
            zip(plan.frame_shapes, chart.is_full, chart.frame_sizes, strict=True)
        )
    ]


@dataclass
class Chain:
    """Weights of one plan, one kind and one form.

    Attributes:
        plan: the merged chain.
        map: the spectrum map.
        form: ``"dense"``, ``"factors"`` or ``"cores"``.
        rows: the members, by position in the layout.
        pieces: for each core, the group of frames and the place in it; None for a constant core.
        leaf: the stack of spectra, or of points.
        cuts: for points, where the flat vector is cut: length of each part, and the order of the
            parts: frames in the order of the chain, then the spectrum.
    """

    plan: TTShape
    map: SpectrumMap
    form: str
    rows: list[int]
    pieces: list[tuple[FrameKey, int] | None] = field(default_factory=list)
    leaf: int = -1
    cuts: tuple[list[int], list[int]] | None = None


class Layout:
    """Which tensors are stacked into which batch, and what is computed from the batches.

    Args:
        members: the weights.

    Attributes:
        leaves: for each batch, its tensors: member and position among the tensors of that.
        rows: for each weight, where its tensors are: batch, and row in it.
        chains: the weights by plan and form.
        shapes: for each weight, the shapes of its tensors.
        widths: for each weight, the number of tensors of its form.
        groups: for each batch of frames, how many of them belong to each core that uses it.
        first_frame: the place in ``leaves`` of the first batch of frames, in that order.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        self.leaves: list[list[tuple[int, int]]] = []
        self.chains: list[Chain] = []
        self.shapes = [[tuple(t.shape) for t in member.tensors] for member in members]
        self.widths = [_width(member) for member in members]
        self.groups: dict[FrameKey, list[int]] = {}
        stacks: dict[FrameKey, list[tuple[int, int]]] = {}
        by_plan: dict[object, list[int]] = {}
        for i, member in enumerate(members):
            weight = member.weight
            plan = (type(weight), weight.shape.merged, weight.map, member.form, member.kind)
            by_plan.setdefault(plan, []).append(i)
        for rows in by_plan.values():
            first = members[rows[0]]
            weight = first.weight
            chain = Chain(weight.shape.merged, weight.map, first.form, rows)
            stored = 0
            for key in frame_keys(first):
                if key is None:
                    chain.pieces.append(None)
                    continue
                counts = self.groups.setdefault(key, [])
                chain.pieces.append((key, len(counts)))
                counts.append(len(rows))
                stacks.setdefault(key, []).extend((i, stored) for i in rows)
                stored += 1
            if not chain.pieces:
                chain.cuts = _cuts(first)
            chain.leaf = len(self.leaves)
            self.leaves.append([(i, stored) for i in rows])
            self.chains.append(chain)
        self.first_frame = len(self.leaves)
        self.leaves.extend(stacks[key] for key in self.groups)
        places: list[dict[int, tuple[int, int]]] = [{} for _ in members]
        for leaf, stack in enumerate(self.leaves):
            for row, (i, k) in enumerate(stack):
                places[i][k] = leaf, row
        self.rows = [[mine[k] for k in range(len(mine))] for mine in places]


def _width(member: Member) -> int:
    if member.form == "cores":
        return len(member.weight.shape.merged.core_shapes) + 1
    return 1 if member.form == "dense" else 2


def _cuts(member: Member) -> tuple[list[int], list[int]]:
    """Lengths of the parts of a flat point as they lie, and the order in which they are wanted."""
    manifold = cast("RiemannianWeight", member.weight).manifold
    starts = [*manifold._starts, manifold.spectrum_slice.start]
    ends = sorted(starts)[1:] + [manifold.spectrum_slice.stop]
    lying = sorted(range(len(starts)), key=lambda k: (starts[k], k))
    sizes = [end - starts[k] for k, end in zip(lying, ends, strict=True)]
    order = [lying.index(k) for k in range(len(starts))]
    return sizes, order


def partners(members: Sequence[Member]) -> list[float]:
    """For each weight, how many frames on average are computed at once with one of its own."""
    groups: Counter[object] = Counter()
    keys = []
    for member in members:
        plan = (type(member.weight), member.weight.shape.merged, member.weight.map, member.kind)
        mine: list[object] = [key for key in frame_keys(member) if key is not None]
        keys.append(mine + [plan])
        groups.update(keys[-1])
    return [sum(groups[key] for key in mine) / len(mine) for mine in keys]
