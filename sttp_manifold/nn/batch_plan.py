"""Static plan of a batch of weights: which numbers of which vector become which entry of what.

The halves of all chains form a forest: halves whose first cores have one shape as matrices share a
node, and so on inwards, so that the halves of unlike chains share their products as far as they
agree. The frames of a level lie in one stack; small frames of any shape are padded to one shape,
which needs no mask: a column of zeros is the reflector of a unit vector beyond the frame, which
leaves the frame alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sttp_manifold.spectrum import SpectrumMap
from sttp_manifold.tt.plans import cheapest_cut
from sttp_manifold.tt.shape import TTShape

__all__ = ["Bucket", "Layout", "Node", "Plan", "batch_map"]

Index = NDArray[np.int64]
Table = Callable[[Index], Tensor]

# Frames of at most so many columns are padded into one batch: up to there calls cost more than the
# arithmetic of the padding.
_SMALL = 16
# So many multiplications more are worth it where both halves are then contracted the same way.
_WORTH = 100_000
_CHARTS = ("full", "reduced")


@dataclass(frozen=True)
class Layout:
    """Where the numbers of a weight lie in its vector.

    Attributes:
        shape: the chain, as its cores are stored.
        map: the spectrum map.
        full: for each frame, whether its chart is full or reduced; None for frames of a point.
        starts: where the numbers of each frame start.
        sizes: how many they are; zero for a constant frame, minus the identity.
        spectrum: where the coordinates of the spectrum start.
        size: length of the vector.
        signs: whether constant signs, or singular values, come with it, which are the spectrum.
    """

    shape: TTShape
    map: SpectrumMap
    full: tuple[bool | None, ...]
    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    spectrum: int
    size: int
    signs: bool

    @property
    def is_views(self) -> bool:
        """Whether one weight is formed faster from views of its vector than by a gather."""
        wide = any(r > _SMALL for _, r in self.shape.frame_shapes)
        return wide and all(full is None for full in self.full)

    def __hash__(self) -> int:
        return hash((self.shape, self.map, self.full, self.size))


def batch_map(map_: SpectrumMap) -> SpectrumMap:
    """The map for a layout: of constant singular values, which come as a tensor, that of ones.

    So weights that differ in these values alone share a plan.
    """
    return SpectrumMap("identity", map_.rank) if map_.is_constant else map_


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
        scaled: whether the spectrum multiplies columns of any of the cores.
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


@dataclass
class Bucket:
    """Frames that are computed by one call.

    Attributes:
        full: the chart.
        d, r: shape of each frame, perhaps padded.
        right: whether the transposes are computed.
        rows: rows of the reflectors that are stored, of each frame.
        count: how many frames.
        nodes: the nodes that take them, one after another.
        take: for padded frames, which entries are wanted; and
        give: for each entry of a frame, its place among those, the last one being none.
    """

    full: bool
    d: int
    r: int
    right: bool
    rows: int
    count: int = 0
    nodes: list[Node] = field(default_factory=list)
    take: Tensor | None = None
    give: Tensor | None = None


class Plan:
    """Everything about a batch of weights that does not depend on their values.

    Args:
        layouts: the weights.
        forms: for each one, ``"dense"``, ``"factors"`` or ``"cores"``.
        dtype: dtype in which frames are computed.
        device: where.

    Attributes:
        fetch: entries of the joined vectors, signs, a zero and a one, in the order of their use:
            first those that are used as they are, then the reflectors of each bucket.
        cuts: lengths of these parts.
        scatter: for each entry of the joined vectors, its place in what was fetched.
        raw: lengths of the parts of the first one: coordinates of the spectra, then each raw node.
        direct: how many of these coordinates are a spectrum already.
        maps: for the others, the map and how many spectra; they follow.
        scale: entries of the spectra that multiply columns, and ``scale_cuts``, how many in each
            scaled node.
        buckets, roots, nodes: the frames, and the forest.
        outputs: for each weight, for each part, the node and the place in it where it ends.
        middle: for each weight, the rank of the bond between its two parts.
        spectra: for each weight, where its spectrum starts among all of them.
        kind: dtype and device.
    """

    def __init__(
        self,
        layouts: Sequence[Layout],
        forms: Sequence[str],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.layouts = tuple(layouts)
        self.kind = dtype, device
        self.forms = tuple(forms)
        ends = np.cumsum([0, *(layout.size for layout in layouts)])
        self.sizes = [layout.size for layout in layouts]
        self._starts: list[int] = ends[:-1].tolist()
        self._total = int(ends[-1])
        self._zero = self._total + sum(lay.shape.rank for lay in layouts if lay.signs)
        self.middle = [0] * len(layouts)
        halves = [half for i in range(len(layouts)) for half in self._halves(i)]
        halves.sort(key=lambda h: str(self.layouts[h.weight].shape.core_shapes))
        self.roots = [
            node
            for kind in "LR"
            for node in _forest([half for half in halves if half.kind == kind], 0, kind)
        ]
        self.nodes: list[Node] = []
        self._number(self.roots)
        self.outputs: list[list[tuple[int, int]]] = [[] for _ in layouts]
        places = {
            (half.weight, half.part): (node.number, j)
            for node in self.nodes
            for j, half in enumerate(node.halves[: node.ends])
        }
        for weight, part in sorted(places):
            self.outputs[weight].append(places[weight, part])
        # A tensor born in inference mode could not be saved for a backward pass.
        with torch.inference_mode(False), torch.no_grad():
            self._tables(dtype, device)

    # -- chains ---------------------------------------------------------------------------------

    def _halves(self, i: int) -> list[Half]:
        layout, form = self.layouts[i], self.forms[i]
        shape = layout.shape
        split = len(shape.out_modes)
        bonded = layout.map.name == "full"
        scales = not bonded and (layout.map.name != "identity" or layout.signs)
        cores = [
            Core(k, size, frame, k >= split, scales and k == split - 1, _source(layout, k))
            for k, (size, frame) in enumerate(
                zip(shape.core_shapes, shape.frame_shapes, strict=True)
            )
        ]
        r = shape.rank
        if bonded:
            cores.insert(split, Core(-1, (r, 1, r), (r, r), False, False, "raw"))
        if form == "cores":
            return [
                self._half(i, part, [core._replace(scaled=False)])
                for part, core in enumerate(cores)
            ]
        cut = cheapest_cut(shape) if form == "dense" else split
        cut += bonded and cut >= split
        self.middle[i] = cores[cut].size[0]
        return [self._half(i, 0, cores[:cut]), self._half(i, 1, cores[cut:])]

    @staticmethod
    def _half(i: int, part: int, cores: list[Core]) -> Half:
        sizes = [core.size for core in cores]
        more = _sweep(sizes) - _sweep([size[::-1] for size in reversed(sizes)])
        small = max(core.frame[1] for core in cores) <= _SMALL
        kind = "L" if part == 0 or more <= (_WORTH if small else 0) or len(cores) == 1 else "R"
        if kind == "R":
            cores = cores[::-1]
        keys, matrices = [], []
        for place, core in enumerate(cores):
            (a, n, b), r = core.size, core.frame[1]
            matrix = (a * n, b) if (place == 0) == (kind == "L") else (a, n * b)
            matrices.append(matrix)
            keys.append((matrix, *_apart(core, small=r <= _SMALL)))
        return Half(i, part, tuple(cores), kind, tuple(matrices), tuple(keys))

    def _number(self, nodes: Sequence[Node]) -> None:
        for node in nodes:
            node.number = len(self.nodes)
            self.nodes.append(node)
            self._number(node.children)

    # -- tables ---------------------------------------------------------------------------------

    def _tables(self, dtype: torch.dtype, device: torch.device) -> None:
        table = partial(_table, device=device)
        parts = [self._spectra(table)]
        self.raw = [len(parts[0])]
        for node in self.nodes:
            if node.source == "raw":
                parts += [self._raw(half, half.cores[node.depth]) for half in node.halves]
                self.raw.append(node.numel)
            elif node.source == "constant":
                r = node.halves[0].cores[node.depth].frame[1]
                minus = -torch.eye(r, dtype=dtype, device=device)
                node.constant = minus.view(node.rows, node.columns).repeat(len(node.halves), 1, 1)
        self.cuts = [sum(map(len, parts))]
        self.buckets: list[Bucket] = []
        for entries in self._bucket_entries():
            bucket, reflectors = self._bucket(entries, table)
            self.buckets.append(bucket)
            parts.append(reflectors)
            self.cuts.append(len(reflectors))
        fetch = np.concatenate(parts)
        scatter = np.zeros(self._total, np.int64)
        mine = fetch < self._total
        scatter[fetch[mine]] = np.arange(len(fetch))[mine]
        self.fetch, self.scatter = table(fetch), table(scatter)
        self.constants = torch.tensor([0.0, 1.0], dtype=dtype, device=device)
        self.one = self.constants[1:]
        self.zero = self.constants[:1]

    def _spectra(self, table: Table) -> Index:
        """Coordinates of the spectra, first a one and those that are spectra already."""
        one, sign = self._zero + 1, self._total
        direct: list[Index] = [np.array([one])]
        mapped: dict[SpectrumMap, list[tuple[int, Index]]] = {}
        self.spectra = [0] * len(self.layouts)
        self.direct = 1
        for i, layout in enumerate(self.layouts):
            r, start = layout.shape.rank, self._starts[i] + layout.spectrum
            name = layout.map.name
            if name == "full":
                continue
            if name in ("normalized", "bounded"):
                mapped.setdefault(layout.map, []).append((i, np.arange(start, start + r)))
                continue
            self.spectra[i] = self.direct
            self.direct += r
            if layout.signs:
                direct.append(np.arange(sign, sign + r))
                sign += r
            else:
                direct.append(
                    np.full(r, one) if name == "identity" else np.arange(start, start + r)
                )
        place = self.direct
        self.maps: list[tuple[SpectrumMap, int]] = []
        for map_, mine in mapped.items():
            self.maps.append((map_, len(mine)))
            for i, index in mine:
                self.spectra[i] = place
                place += map_.rank
                direct.append(index)
        scale, self.scale_cuts = [np.zeros(0, np.int64)], []
        for node in self.nodes:
            cores = [half.cores[node.depth] for half in node.halves]
            if any(core.scaled for core in cores):
                node.scaled = True
                self.scale_cuts.append(node.columns * len(cores))
                for half, core in zip(node.halves, cores, strict=True):
                    r = core.size[2] if core.scaled else 0
                    own = np.arange(self.spectra[half.weight], self.spectra[half.weight] + r)
                    scale.append(np.resize(own, node.columns) if r else np.zeros(node.columns, int))
        self.scale = table(np.concatenate(scale))
        return np.concatenate(direct)

    def _raw(self, half: Half, core: Core) -> Index:
        layout, start = self.layouts[half.weight], self._starts[half.weight]
        d, r = core.frame
        if core.k < 0:
            return np.arange(start + layout.spectrum, start + layout.spectrum + d * r)
        first = start + layout.starts[core.k]
        index = np.arange(first, first + d * r).reshape(d, r)
        return (index.T if core.right else index).ravel()

    def _bucket_entries(self) -> list[list[tuple[Node, Half]]]:
        found: dict[object, list[tuple[Node, Half]]] = {}
        for node in self.nodes:
            for half in node.halves if node.source in _CHARTS else ():
                core = half.cores[node.depth]
                key = () if core.frame[1] <= _SMALL else (core.frame, core.source, core.right)
                found.setdefault(key, []).append((node, half))
        return list(found.values())

    def _bucket(self, entries: list[tuple[Node, Half]], table: Table) -> tuple[Bucket, Index]:
        cores = [half.cores[node.depth] for node, half in entries]
        r = max(core.frame[1] for core in cores)
        d = max(r, *(core.frame[0] for core in cores))
        padded = r <= _SMALL
        # A reduced chart is a full one with zeros above.
        full = padded or cores[0].source == "full"
        bucket = Bucket(full, d, r, cores[0].right and not padded, d if full else d - r)
        bucket.count = len(entries)
        bucket.nodes = list({node.number: node for node, _ in entries}.values())
        Y = np.full((len(entries), bucket.rows, r), self._zero)
        for row, ((_, half), core) in enumerate(zip(entries, cores, strict=True)):
            own_d, own_r = core.frame
            start = self._starts[half.weight] + self.layouts[half.weight].starts[core.k]
            if core.source == "full":
                i, j = np.tril_indices(own_r, -1)
                Y[row, i, j] = np.arange(start, start + len(i))
                start += len(i)
            below = np.arange(start, start + (own_d - own_r) * own_r).reshape(-1, own_r)
            if full:
                Y[row, own_r:own_d, :own_r] = below
            else:
                Y[row] = below
        if padded and any(core.frame != (d, r) or core.right for core in cores):
            take = []
            for row, core in enumerate(cores):
                own_d, own_r = core.frame
                index = (row * d + np.arange(own_d))[:, None] * r + np.arange(own_r)
                take.append((index.T if core.right else index).ravel())
            wanted = np.concatenate(take)
            give = np.full(len(entries) * d * r, len(wanted))
            give[wanted] = np.arange(len(wanted))
            bucket.take, bucket.give = table(wanted), table(give)
        return bucket, Y.ravel()


def _table(index: Index, device: torch.device) -> Tensor:
    return torch.from_numpy(index.astype(np.int32)).to(device)


def _source(layout: Layout, k: int) -> str:
    if layout.full[k] is None:
        return "raw"
    return _CHARTS[not layout.full[k]] if layout.sizes[k] else "constant"


def _apart(core: Core, small: bool) -> tuple[object, ...]:
    """What keeps a core from others of its shape as a matrix.

    Small frames of both charts, of either side, scaled or not, go together.
    """
    if core.source == "raw":
        return ("raw",) if small else ("raw", core.scaled)
    if core.source in _CHARTS and small:
        return ()
    return core[2:]


def _sweep(sizes: Sequence[tuple[int, ...]]) -> int:
    """Multiplications of contracting cores from the left."""
    work, rows = 0, sizes[0][0] * sizes[0][1]
    for a, n, b in sizes[1:]:
        work += rows * a * n * b
        rows *= n
    return work


def _forest(halves: Sequence[Half], depth: int, kind: str) -> list[Node]:
    groups: dict[object, list[Half]] = {}
    for half in halves:
        groups.setdefault(half.keys[depth], []).append(half)
    nodes = []
    for mine in groups.values():
        rows, columns = mine[0].matrices[depth]
        done = [half for half in mine if len(half.cores) == depth + 1]
        rest = [half for half in mine if len(half.cores) > depth + 1]
        children = _forest(rest, depth + 1, kind)
        ordered = done + [half for child in children for half in child.halves]
        cuts = ([len(done)] if done else []) + [len(child.halves) for child in children]
        source = mine[0].cores[depth].source
        nodes.append(
            Node(rows, columns, depth == 0, kind, depth, source, ordered, len(done), children, cuts)
        )
    return nodes
