"""Chains of many weights as a forest, in which equal products are one.

Each chain is contracted in two halves, from both ends inwards. Halves whose first cores have one
shape as matrices share a node, and so on inwards, so that the halves of unlike chains share their
products as far as they agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from sttp_manifold.nn.layout import SMALL, Layout
from sttp_manifold.tt.plans import cheapest_cut

__all__ = ["CHARTS", "Core", "Half", "Node", "forest", "halves_of"]

CHARTS = ("full", "reduced")
"""Sources of cores that are computed from coordinates."""

# So many multiplications more are worth it where both halves are then contracted the same way.
_WORTH = 100_000


class Core(NamedTuple):
    """A core of a chain, or a full bond as a core of mode one.

    Attributes:
        k: number of its frame; -1 for a bond.
        size: shape ``(a, n, b)``.
        frame: shape ``(d, r)`` of the frame behind it.
        right: whether it is the transpose of that.
        scaled: whether its columns are to be multiplied by the spectrum.
        source: ``"raw"`` numbers as they are, a ``"full"`` or ``"reduced"`` chart of them, or a
            ``"constant"``.
    """

    k: int
    size: tuple[int, int, int]
    frame: tuple[int, int]
    right: bool
    scaled: bool
    source: str


class Half(NamedTuple):
    """Neighbouring cores of one weight, in the order in which they are contracted.

    Attributes:
        weight: number of the weight.
        part: number of the half among those of the weight.
        cores: the cores.
        kind: ``"L"`` from the left inwards, ``"R"`` from the right.
        matrices: for each core, its shape as a matrix.
        keys: for each core, what those of one node have in common.
    """

    weight: int
    part: int
    cores: tuple[Core, ...]
    kind: str
    matrices: tuple[tuple[int, int], ...]
    keys: tuple[object, ...]


@dataclass
class Node:
    """Cores of one level, contracted with what came before them by one product.

    Attributes:
        rows, columns: shape of the cores as matrices.
        first: whether nothing comes before.
        kind: as of a half.
        depth: place of the core in its half.
        source: as of a core.
        halves: whose cores these are, first those that end here.
        ends: how many do.
        children: the nodes that go on, in the order of the halves.
        cuts: how the product is divided: the halves that end, then one part for each child.
        scaled: whether the spectrum multiplies columns of any of the cores here, not in the leaf.
        number: place in the order in which the forest is walked.
        constant: the stack, where it is none of any parameter.
    """

    rows: int
    columns: int
    first: bool
    kind: str
    depth: int
    source: str
    halves: list[Half]
    ends: int
    children: list[Node]
    cuts: list[int]
    scaled: bool = False
    number: int = -1
    constant: Tensor | None = None

    @property
    def numel(self) -> int:
        """Elements of the stack."""
        return len(self.halves) * self.rows * self.columns


def halves_of(i: int, layout: Layout, form: str) -> list[Half]:
    """The cores of a weight, as they are contracted: two halves, or each core on its own.

    Args:
        i: number of the weight.
        layout: the weight.
        form: ``"dense"``, ``"factors"``, ``"rows"`` or ``"cores"``.
    """
    shape = layout.shape
    split = len(shape.out_modes)
    bonded = layout.map.name == "full"
    scales = not bonded and (layout.map.name != "identity" or layout.signs)
    cores = [
        Core(k, size, frame, k >= split, scales and k == split - 1, _source(layout, k))
        for k, (size, frame) in enumerate(zip(shape.core_shapes, shape.frame_shapes, strict=True))
    ]
    r = shape.rank
    if bonded:
        cores.insert(split, Core(-1, (r, 1, r), (r, r), False, False, "raw"))
    if form == "cores":
        return [_half(i, part, [core._replace(scaled=False)]) for part, core in enumerate(cores)]
    cut = cheapest_cut(shape) if form == "dense" else split
    cut += bonded and cut >= split
    return [_half(i, 0, cores[:cut]), _half(i, 1, cores[cut:])]


def _half(i: int, part: int, cores: list[Core]) -> Half:
    sizes = [core.size for core in cores]
    more = _sweep(sizes) - _sweep([size[::-1] for size in reversed(sizes)])
    small = max(core.frame[1] for core in cores) <= SMALL
    kind = "L" if part == 0 or more <= (_WORTH if small else 0) or len(cores) == 1 else "R"
    if kind == "R":
        cores = cores[::-1]
    keys, matrices = [], []
    for place, core in enumerate(cores):
        (a, n, b), r = core.size, core.frame[1]
        matrix = (a * n, b) if (place == 0) == (kind == "L") else (a, n * b)
        matrices.append(matrix)
        keys.append((matrix, *_apart(core, small=r <= SMALL)))
    return Half(i, part, tuple(cores), kind, tuple(matrices), tuple(keys))


def _source(layout: Layout, k: int) -> str:
    if layout.full[k] is None:
        return "raw"
    return CHARTS[not layout.full[k]] if layout.sizes[k] else "constant"


def _apart(core: Core, small: bool) -> tuple[object, ...]:
    """What keeps a core from others of its shape as a matrix.

    Small frames of both charts, of either side, scaled or not, go together.
    """
    if core.source == "raw":
        return ("raw",) if small else ("raw", core.scaled)
    if core.source in CHARTS and small:
        return ()
    return core[2:]


def _sweep(sizes: Sequence[tuple[int, ...]]) -> int:
    """Multiplications of contracting cores from the left."""
    work, rows = 0, sizes[0][0] * sizes[0][1]
    for a, n, b in sizes[1:]:
        work += rows * a * n * b
        rows *= n
    return work


def forest(halves: Sequence[Half], depth: int, kind: str) -> list[Node]:
    """Trees of halves, from a depth inwards.

    Args:
        halves: the halves, all of a kind and at least so long.
        depth: place of the core in its half.
        kind: the kind.
    """
    groups: dict[object, list[Half]] = {}
    for half in halves:
        groups.setdefault(half.keys[depth], []).append(half)
    nodes = []
    for mine in groups.values():
        rows, columns = mine[0].matrices[depth]
        done = [half for half in mine if len(half.cores) == depth + 1]
        rest = [half for half in mine if len(half.cores) > depth + 1]
        children = forest(rest, depth + 1, kind)
        ordered = done + [half for child in children for half in child.halves]
        cuts = ([len(done)] if done else []) + [len(child.halves) for child in children]
        source = mine[0].cores[depth].source
        nodes.append(
            Node(rows, columns, depth == 0, kind, depth, source, ordered, len(done), children, cuts)
        )
    return nodes
