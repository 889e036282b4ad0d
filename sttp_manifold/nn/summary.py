"""`summary`: what each weight of a network is, stores and would store."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator, Sequence, Sized
from dataclasses import dataclass, replace

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sttp_manifold._arguments import explained
from sttp_manifold.display import box_html, table_html
from sttp_manifold.nn.adapted_tensor import adapted_in
from sttp_manifold.nn.counts import count_elements, counted_tensors, ratio
from sttp_manifold.nn.stack import WeightStack, parts_of
from sttp_manifold.nn.stock import stock_weights
from sttp_manifold.nn.torch_state import has_values
from sttp_manifold.nn.weight import SpectralWeight
from sttp_manifold.nn.weights_of import held_of, views_of, weights_of
from sttp_manifold.tt.shape import TTShape

__all__ = ["Summary", "SummaryRow", "summary"]

_HEADERS = ("layer", "kind", "shape", "ranks", "dimension", "stored", "dense", "Z", "top s.v.")


@dataclass(frozen=True)
class SummaryRow:
    """One weight, or the rest of the network.

    Attributes:
        layer: qualified name, empty for the root module.
        kind: how the weight is held; ``dense`` for a stock layer.
        shape: shape of the stock layer's weight.
        ranks: TT ranks; empty for a dense weight.
        dimension: dimension of the set of weights that can be reached.
        parameters: numbers of the non-redundant chart, as ``Z`` counts them: the dimension, and
            one more for a normalized spectrum.
        stored: numbers that the module stores.
        dense: elements of the dense weight.
        top: largest singular value of the weight as a matrix, None for what is no matrix. For a
            convolution this is not its Lipschitz constant.
        shared: name of the earlier layer that holds the same weight, where it is counted.
    """

    layer: str
    kind: str
    shape: tuple[int, ...]
    ranks: tuple[int, ...]
    dimension: int
    parameters: int
    stored: int
    dense: int
    top: float | None = None
    shared: str | None = None

    @property
    def Z(self) -> float:
        """``100 parameters / dense``."""
        return ratio(self.parameters, self.dense)


@dataclass(frozen=True)
class Summary:
    """Rows of a network and their sum; prints as a table.

    Attributes:
        rows: one row a weight.
        other: everything else: biases, norms with running statistics, and so on.
        left: the same by type of module, the largest first: ``layer`` is the type with how many
            there are, as in ``12 x LayerNorm``.
    """

    rows: tuple[SummaryRow, ...]
    other: SummaryRow
    left: tuple[SummaryRow, ...] = ()

    def share(self, row: SummaryRow) -> float:
        """What a row is of the dense network, in percent."""
        return ratio(row.dense, self.total.dense)

    @property
    def total(self) -> SummaryRow:
        """Sum of all rows; its ``Z`` is the published ratio of the network."""
        rows = (*self.rows, self.other)
        return SummaryRow(
            "total",
            "",
            (),
            (),
            sum(row.dimension for row in rows),
            sum(row.parameters for row in rows),
            sum(row.stored for row in rows),
            sum(row.dense for row in rows),
        )

    @property
    def Z(self) -> float:
        """The network's compression ratio in percent, as published."""
        return self.total.Z

    def _lines(self) -> list[tuple[str, ...]]:
        cells = [_cells(row, row.layer or "(root)") for row in self.rows]
        for row in self.left:
            kind = f"{row.kind}, {self.share(row):.1f} % of all"
            cells.append(_cells(replace(row, kind=kind), f"({row.layer})"))
        return [*cells, _cells(self.total, "total")]

    def _table(self, style: str) -> str:
        align = ("left",) * 4 + ("right",) * 5
        return tabulate(
            self._lines(), headers=_HEADERS, tablefmt=style, colalign=align, disable_numparse=True
        )

    def to_markdown(self) -> str:
        """The table in Markdown."""
        return self._table("pipe")

    def __str__(self) -> str:
        return self._table("simple")

    def _repr_html_(self) -> str:
        lines = self._lines()
        return box_html(table_html(_HEADERS, lines, right=range(4, 9), wrap=(3,), bold=(-1,)))


def _cells(row: SummaryRow, name: str) -> tuple[str, ...]:
    shape, ranks = "x".join(map(str, row.shape)), "-".join(map(str, row.ranks))
    top = "" if row.top is None else f"{row.top:.4g}"
    if row.shared is not None:
        return (name, f"as {row.shared or '(root)'}", shape, ranks, "", "", "", "", top)
    counts = (f"{count:,}" for count in (row.dimension, row.stored, row.dense))
    return (name, row.kind, shape, ranks, *counts, f"{row.Z:.3f}", top)


@explained
@torch.no_grad()
def summary(model: nn.Module) -> Summary:
    r"""What each weight of a network is, stores and would store.

    Three numbers are different and all are shown: the dimension of the set of weights, the
    numbers stored, and the elements of the dense weight. The ratio of the last row is the
    published :math:`Z = 100 \sum_l (P_l + C_l) / \sum_l (N_l + C_l)`, with :math:`P_l` the
    parameters of the non-redundant chart whatever the method, :math:`N_l` the elements of the
    dense weight, and :math:`C_l` what is not reparameterized: biases, norms and their running
    statistics. A weight that several layers share counts once. What is in no row of its own is
    listed by the type of its module, with its number and its share.

    Args:
        model: any network, compressed or not.

    References:
        [STTP] Sec. 4 (the ratio).

    Example:
        >>> table = summary(nn.Linear(64, 32))
        >>> table.rows[0].kind, table.total.dense, table.Z
        ('dense', 2080, 100.0)
    """
    rows: list[SummaryRow] = []
    first: dict[nn.Module | Tensor, str] = {}
    for name, key, shape in _weights(model):
        row = (
            _dense_row(name, key)
            if isinstance(key, Tensor)
            else _spectral_row(name, parts_of(key), shape)
        )
        if key in first:
            row = SummaryRow(
                name, row.kind, row.shape, row.ranks, 0, 0, 0, 0, row.top, shared=first[key]
            )
        first.setdefault(key, name)
        rows.append(row)
    rest = count_elements(model) - sum(row.stored for row in rows)
    other = SummaryRow("", "not in spectral form", (), (), *(rest,) * 4)
    return Summary(tuple(rows), other, _left(model, first))


def _left(model: nn.Module, rows: Container[object]) -> tuple[SummaryRow, ...]:
    """What is in no row of its own, by type of module."""
    seen: set[Tensor] = {
        p for m in model.modules() if isinstance(m, SpectralWeight) for p in m.parameters()
    }
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for module in model.modules():
        own = [t for t in counted_tensors(module) if t not in seen and t not in rows]
        if own and not isinstance(module, SpectralWeight):
            seen.update(own)
            kind = parametrize.type_before_parametrizations(module).__name__
            counts[kind] += 1
            sizes[kind] += sum(t.numel() for t in own)
    return tuple(
        SummaryRow(f"{counts[kind]} x {kind}", "not in spectral form", (), (), *(size,) * 4)
        for kind, size in sizes.most_common()
    )


def _weights(
    model: nn.Module,
) -> Iterator[tuple[str, SpectralWeight | WeightStack | Tensor, tuple[int, ...]]]:
    """Weights of layers, and spectral weights that are in no layer."""
    inside = {weight for m in model.modules() for weight in weights_of(m).values()}
    for name, module in model.named_modules():
        held, views = held_of(module), views_of(module)
        frozen = {key: ours.base for key, ours in adapted_in(module).items()}
        tensors: dict[str, Tensor] = {
            k: base for k, base in frozen.items() if isinstance(base, Tensor)
        }
        tensors |= stock_weights(module)
        several = [*held, *tensors]
        for key, weight in held.items():
            yield _row_name(name, key, several), weight, views[key].shape
        if isinstance(module, SpectralWeight) and module not in inside:
            yield name, module, (module.shape.d_out, module.shape.d_in)
        for key, tensor in tensors.items():
            yield _row_name(name, key, several), tensor, tuple(tensor.shape)


def _row_name(layer: str, weight: str, weights: Sized) -> str:
    """The layer's name, with that of the weight where there are several."""
    return layer if len(weights) == 1 else f"{layer}.{weight}".removeprefix(".")


def _spectral_row(
    name: str, weights: Sequence[SpectralWeight], shape: tuple[int, ...]
) -> SummaryRow:
    """Of one weight, or of a stack of equal ones."""
    first, different = weights[0], set(weights)
    plan = first.shape
    return SummaryRow(
        name,
        f"{_kind(plan)}, {first.method}, {first.spectrum}",
        shape,
        plan.ranks,
        sum(plan.dim(w.spectrum, w.map.values) for w in different),
        plan.num_parameters(first.spectrum) * len(different),
        sum(p.numel() for w in different for p in w.parameters()),
        plan.numel * len(weights),
        max(_top(weight.bond()) for weight in weights),
    )


def _kind(plan: TTShape) -> str:
    return "svdp" if len(plan.out_modes) == len(plan.in_modes) == 1 else "sttp"


def _dense_row(name: str, weight: Tensor) -> SummaryRow:
    size = weight.numel()
    top = _top(weight.flatten(1))
    return SummaryRow(name, "dense", tuple(weight.shape), (), size, size, size, size, top)


def _top(matrix: Tensor) -> float:
    """Largest singular value of a matrix, or of the diagonal one of a vector."""
    if not has_values(matrix) or not bool(torch.isfinite(matrix).all()):
        return float("nan")
    if matrix.ndim == 1:
        return float(matrix.abs().amax())
    return float(
        torch.linalg.matrix_norm(matrix.to(torch.promote_types(matrix.dtype, torch.float32)), 2)
    )
