"""Static plan of a batch of weights: which numbers of which vector become which entry of what.

The frames of a level of the forest (:mod:`sttp_manifold.nn.chain_forest`) lie in one stack; small
frames of any shape are padded to one shape, which needs no mask: a column of zeros is the reflector
of a unit vector beyond the frame, which leaves the frame alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sttp_manifold.frames._kernel_table import FrameTable, Placed, has_kernel, kernels_serve
from sttp_manifold.nn.chain_forest import CHARTS, Core, Half, Node, forest, halves_of
from sttp_manifold.nn.layout import SMALL, Layout
from sttp_manifold.spectrum import SpectrumMap

__all__ = ["Bucket", "Plan"]

Index = NDArray[np.int64]
Table = Callable[[Index], Tensor]

# So many numbers are multiplied by the spectrum, or by one, sooner than the nodes that it scales.
_FEW = 4096


@dataclass
class Leaf:
    """Cores that come as one tensor: numbers as they are, or the frames of a bucket.

    Attributes:
        nodes: the nodes that take them, one after another; and
        cuts: how the tensor is divided among them.
        scaled: whether the spectrum, or a one, multiplies each number; else the nodes are
            multiplied that it scales.
    """

    nodes: list[Node]
    cuts: list[int]
    scaled: bool = False


@dataclass
class Bucket:
    """Frames that are computed by one call.

    Attributes:
        full: the chart.
        d, r: shape of each frame, perhaps padded.
        right: whether the transposes are computed.
        rows: rows of the reflectors that are stored, of each frame.
        count: how many frames.
        leaf: the nodes that take them.
        take: for padded frames, which entries are wanted; and
        give: for each entry of a frame, its place among those, the last one being none.
        entries: how many are wanted of all frames, if kernels form these; else 0.
    """

    full: bool
    d: int
    r: int
    right: bool
    rows: int
    count: int
    leaf: Leaf
    take: Tensor | None = None
    give: Tensor | None = None
    entries: int = 0


class Plan:
    """Everything about a batch of weights that does not depend on their values.

    Args:
        layouts: the weights.
        forms: for each one, ``"dense"``, ``"factors"``, ``"rows"`` or ``"cores"``.
        dtype: dtype in which frames are computed.
        device: where.

    Attributes:
        fetch: entries of the joined vectors, signs, a zero and a one, in the order of their use:
            coordinates of the spectra, cores that are used as they are, if there are any, then the
            reflectors of each bucket.
        cuts: lengths of these parts.
        scatter: for each entry of the joined vectors, its place in what was fetched.
        direct: how many coordinates of the spectra are a spectrum already.
        maps: for the others, the map and how many spectra; they follow.
        leaves: what comes as one tensor: cores as they are, if there are any, then each bucket.
        scale: entries of the spectra that multiply the numbers of leaves, then those that multiply
            columns, and ``scale_cuts``, how many in each of these leaves and nodes.
        buckets, roots, nodes: the frames, and the forest.
        constant_nodes, scaled_nodes: some of the nodes, in their order.
        table: the frames that kernels form, if any.
        outputs: for each weight, for each part, the node and the place in it where it ends.
        widths: of how many tensors each weight consists in its form.
        owners: for each of these tensors, the weight.
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
        halves = [half for i in range(len(layouts)) for half in self._halves(i)]
        self.middle = [0] * len(layouts)
        for half in halves:
            if half.part == 0:
                self.middle[half.weight] = half.cores[-1].size[2]
        halves.sort(key=lambda h: str(self.layouts[h.weight].shape.core_shapes))
        self.roots = [
            node
            for kind in "LR"
            for node in forest([half for half in halves if half.kind == kind], 0, kind)
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
        self.widths = [
            len(ends) + (lay.map.name != "full")
            if how == "cores"
            else 1 + (how in ("factors", "rows"))
            for how, ends, lay in zip(self.forms, self.outputs, self.layouts, strict=True)
        ]
        self.owners = [i for i, width in enumerate(self.widths) for _ in range(width)]
        # A tensor born in inference mode could not be saved for a backward pass.
        with torch.inference_mode(False), torch.no_grad():
            self._tables(dtype, device)

    def _halves(self, i: int) -> list[Half]:
        return halves_of(i, self.layouts[i], self.forms[i])

    def _number(self, nodes: Sequence[Node]) -> None:
        for node in nodes:
            node.number = len(self.nodes)
            self.nodes.append(node)
            self._number(node.children)

    # -- tables ---------------------------------------------------------------------------------

    def _tables(self, dtype: torch.dtype, device: torch.device) -> None:
        table = partial(_table, device=device)
        parts = [self._spectra()]
        raw_nodes = [node for node in self.nodes if node.source == "raw"]
        self.leaves: list[Leaf] = []
        if raw_nodes:
            raw = [self._raw(h, h.cores[node.depth]) for node in raw_nodes for h in node.halves]
            parts.append(np.concatenate(raw))
            self.leaves.append(Leaf(raw_nodes, [node.numel for node in raw_nodes]))
        self.constant_nodes = [node for node in self.nodes if node.source == "constant"]
        for node in self.constant_nodes:
            r = node.halves[0].cores[node.depth].frame[1]
            minus = -torch.eye(r, dtype=dtype, device=device)
            node.constant = minus.view(node.rows, node.columns).repeat(len(node.halves), 1, 1)
        self.buckets: list[Bucket] = []
        placed: list[Placed] = []
        for entries in self._bucket_entries():
            bucket, reflectors = self._bucket(entries, table)
            frames = self._placed(entries, sum(b.entries for b in self.buckets))
            if kernels_serve(device, dtype) and all(has_kernel(f.d, f.r) for f in frames):
                bucket.entries = sum(f.d * f.r for f in frames)
                bucket.leaf.cuts = [node.numel for node in bucket.leaf.nodes]
                placed += frames
                reflectors = reflectors[:0]
            self.buckets.append(bucket)
            self.leaves.append(bucket.leaf)
            parts.append(reflectors)
        self.cuts = [len(part) for part in parts]
        self._scales(table)
        self.table = FrameTable(placed, device) if placed else None
        fetch = np.concatenate(parts)
        scatter = np.zeros(self._total, np.int64)
        mine = fetch < self._total
        scatter[fetch[mine]] = np.arange(len(fetch))[mine]
        self.fetch, self.scatter = table(fetch), table(scatter)
        self.constants = torch.tensor([0.0, 1.0], dtype=dtype, device=device)
        self.zero = self.constants[:1]

    def _scales(self, table: Table) -> None:
        """What multiplies leaves of few numbers, number by number, and the other scaled nodes."""
        scale, self.scale_cuts = [np.zeros(0, np.int64)], []
        columns = [self._scale_of(node) for node in self.nodes]
        done: set[int] = set()
        for leaf in self.leaves:
            scaled = any(np.any(columns[node.number]) for node in leaf.nodes)
            if not scaled or sum(node.numel for node in leaf.nodes) > _FEW:
                continue
            each = [
                np.repeat(columns[node.number].reshape(-1, 1, node.columns), node.rows, 1).ravel()
                for node in leaf.nodes
            ]
            leaf.scaled = True
            scale += each
            self.scale_cuts.append(sum(map(len, each)))
            done |= {node.number for node in leaf.nodes}
        self.scaled_nodes: list[Node] = []
        for node, mine in zip(self.nodes, columns, strict=True):
            if node.number not in done and np.any(mine):
                node.scaled = True
                self.scaled_nodes.append(node)
                self.scale_cuts.append(len(mine))
                scale.append(mine)
        self.scale = table(np.concatenate(scale))

    def _scale_of(self, node: Node) -> Index:
        """Which entry of the spectra multiplies each column of the cores of a node."""
        found = []
        for half in node.halves:
            core = half.cores[node.depth]
            start, r = self.spectra[half.weight], core.size[2]
            own = np.arange(start, start + r) if core.scaled else np.zeros(1, np.int64)
            found.append(np.resize(own, node.columns))
        return np.concatenate(found)

    def _spectra(self) -> Index:
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
            for half in node.halves if node.source in CHARTS else ():
                core = half.cores[node.depth]
                key = () if core.frame[1] <= SMALL else (core.frame, core.source, core.right)
                found.setdefault(key, []).append((node, half))
        return list(found.values())

    def _placed(self, entries: list[tuple[Node, Half]], place: int) -> list[Placed]:
        """Frames of a bucket as kernels take them, written one after another from a place on."""
        found = []
        for node, half in entries:
            core = half.cores[node.depth]
            start = self._starts[half.weight] + self.layouts[half.weight].starts[core.k]
            found.append(Placed(start, place, *core.frame, core.source == "full", core.right))
            place += core.frame[0] * core.frame[1]
        return found

    def _bucket(self, entries: list[tuple[Node, Half]], table: Table) -> tuple[Bucket, Index]:
        cores = [half.cores[node.depth] for node, half in entries]
        r = max(core.frame[1] for core in cores)
        d = max(r, *(core.frame[0] for core in cores))
        padded = r <= SMALL
        # A reduced chart is a full one with zeros above.
        full = padded or cores[0].source == "full"
        leaf = Leaf(list({node.number: node for node, _ in entries}.values()), [])
        right, rows = cores[0].right and not padded, d if full else d - r
        bucket = Bucket(full, d, r, right, rows, len(entries), leaf)
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
        taken = bucket.take is not None
        leaf.cuts = [node.numel if taken else len(node.halves) for node in leaf.nodes]
        return bucket, Y.ravel()


def _table(index: Index, device: torch.device) -> Tensor:
    return torch.from_numpy(index.astype(np.int32)).to(device)
