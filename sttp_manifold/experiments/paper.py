"""Counts of [STTP] from plans alone: degrees of freedom and ratios Z, beside the paper's figures.

No weights are made: networks are on torch's meta device, and a weight is its
:class:`~sttp_manifold.TTShape`. Published figures are those that this file holds; where it holds
none, no figure stands beside a count.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from operator import attrgetter

from tabulate import tabulate

from sttp_manifold.errors import ConfigError
from sttp_manifold.experiments.models import network, weight_sizes
from sttp_manifold.nn.counts import count_elements, ratio
from sttp_manifold.tt.shape import TTShape

__all__ = [
    "FORMATS",
    "KINDS",
    "LAYERS",
    "NETWORKS",
    "RANKS",
    "SPECTRA",
    "Count",
    "as_csv",
    "as_markdown",
    "as_text",
    "layer_counts",
    "network_counts",
    "paper_counts",
    "verdict",
    "written",
]

NETWORKS = (
    "sngan-32-discriminator",
    "sngan-48-discriminator",
    "sngan-32-generator",
    "wrn-28-10",
)
"""Networks of the paper's experiments."""

RANKS = (4, 8, 16, 32, 64, 128, 256)
"""Ranks that are counted unless others are asked for."""

KINDS = ("svdp", "sttp")
"""Parameterizations of the paper."""

SPECTRA = ("identity", "free")
"""Spectra of the paper's tables; ``free`` is what it calls learned."""

LAYERS: dict[tuple[tuple[int, ...], int], dict[tuple[str, str], int]] = {
    ((16, 8, 3, 3), 4): {
        ("svdp", "identity"): 326,
        ("svdp", "free"): 336,
        ("sttp", "identity"): 106,
        ("sttp", "free"): 116,
    },
    ((64, 64), 16): {
        ("svdp", "identity"): 1656,
        ("svdp", "free"): 1792,
        ("sttp", "identity"): 1144,
        ("sttp", "free"): 1280,
    },
    ((512, 512, 3, 3), 64): {
        ("svdp", "identity"): 321504,
        ("svdp", "free"): 323584,
        ("sttp", "identity"): 39392,
        ("sttp", "free"): 41472,
    },
}
"""Published degrees of freedom of single weights: ``{(shape, rank): {(kind, spectrum): DOF}}``."""

_RATIOS: dict[tuple[str, int], dict[tuple[str, str], float]] = {
    ("sngan-32-discriminator", 64): {
        ("svdp", "identity"): 51.743,
        ("svdp", "free"): 53.358,
        ("sttp", "identity"): 16.713,
        ("sttp", "free"): 18.329,
    },
}


@dataclass(frozen=True)
class Count:
    """One network, or one weight, held in one way.

    Attributes:
        name: of the network, or sizes of the weight.
        rank: uniform rank, lowered where a weight cannot carry it.
        spectrum: spectrum map.
        kind: ``"svdp"`` or ``"sttp"``.
        weights: how many weights it has.
        dof: degrees of freedom of all its weights, the numbers of their non-redundant charts.
        rest: what is not reparameterized: biases, norms and their running statistics.
        dense: elements of the dense network, the rest included.
        published_dof: the paper's figure; None where there is none.
        published_ratio: the paper's figure, to three decimals; None where there is none.
    """

    name: str
    rank: int
    spectrum: str
    kind: str
    weights: int
    dof: int
    rest: int
    dense: int
    published_dof: int | None = None
    published_ratio: float | None = None

    @property
    def Z(self) -> float:
        """``100 (dof + rest) / dense``, as published."""
        return ratio(self.dof + self.rest, self.dense)

    @property
    def agrees(self) -> bool | None:
        """Whether it is as published; None where nothing is."""
        pairs = ((self.published_dof, self.dof), (self.published_ratio, round(self.Z, 3)))
        found = [published == ours for published, ours in pairs if published is not None]
        return all(found) if found else None


def network_counts(name: str, ranks: Iterable[int] = RANKS) -> list[Count]:
    """Counts of a network with all its linear and convolution layers reparameterized.

    Args:
        name: of a :func:`~sttp_manifold.experiments.models.network`.
        ranks: uniform ranks.

    Raises:
        ConfigError: an unknown network, or a rank below one.

    References:
        [STTP] Sec. 4 (the ratio Z).

    Example:
        >>> [f"{c.kind} {c.Z:.3f}" for c in network_counts("sngan-32-discriminator", [64])]
        ['svdp 51.743', 'sttp 16.713', 'svdp 53.358', 'sttp 18.329']
    """
    model = network(name, device="meta")
    return _counts(name, weight_sizes(model), count_elements(model), ranks)


def layer_counts(size: Sequence[int], ranks: Iterable[int] = RANKS) -> list[Count]:
    """Counts of one weight, without a bias.

    Args:
        size: ``(d_out, d_in)``, or ``(c_out, c_in, k_1, ...)`` of a convolution.
        ranks: uniform ranks.

    Raises:
        ConfigError: a rank below one.
        ShapeError: a size that no weight has.

    Example:
        >>> [c.dof for c in layer_counts((16, 8, 3, 3), [4])]
        [326, 106, 336, 116]
    """
    size = tuple(size)
    return _counts(" x ".join(map(str, size)), [size], math.prod(size), ranks)


def paper_counts(
    networks: Iterable[str] | None = None, ranks: Iterable[int] = RANKS
) -> list[Count]:
    """Counts of networks; of those of the paper, after the layers that are published alone.

    Args:
        networks: names of networks; the :data:`NETWORKS` and :data:`LAYERS` if there are none.
        ranks: uniform ranks; a layer is counted where its own rank is among them.

    Raises:
        ConfigError: an unknown network, or a rank below one.
    """
    ranks = list(dict.fromkeys(ranks))
    found: list[Count] = []
    for size, rank in LAYERS if networks is None else ():
        if rank in ranks:
            found += layer_counts(size, [rank])
    for name in dict.fromkeys(NETWORKS if networks is None else networks):
        found += network_counts(name, ranks)
    return found


def _counts(
    name: str, sizes: Sequence[tuple[int, ...]], dense: int, ranks: Iterable[int]
) -> list[Count]:
    found = []
    rest = dense - sum(map(math.prod, sizes))
    single = len(sizes) == 1 and not rest
    for rank in dict.fromkeys(ranks):
        if rank < 1:
            raise ConfigError(f"rank {rank}: expected 1 or more")
        plans = {kind: [TTShape.for_weight(s, rank, kind=kind) for s in sizes] for kind in KINDS}
        layer = LAYERS.get((sizes[0], rank), {}) if single else {}
        published = _RATIOS.get((name, rank), {})
        for spectrum in SPECTRA:
            for kind in KINDS:
                dof = sum(plan.num_parameters(spectrum) for plan in plans[kind])
                key = (kind, spectrum)
                figures = layer.get(key), published.get(key)
                found.append(
                    Count(name, rank, spectrum, kind, len(sizes), dof, rest, dense, *figures)
                )
    return found


# -- tables ---------------------------------------------------------------------------------------

_TITLES = ("rank", "spectrum", "SVDP DOF", "Z", "paper", "STTP DOF", "Z", "paper", "")
_LEGEND = """\
DOF: numbers of the charts of all weights. Z: the percentage of the dense network's numbers that
these and what is not reparameterized come to. paper: the published DOF of a weight, Z of a network;
empty where none is known here."""
_ALIGN = ("right", "left", *("right",) * 6, "left")


def _published(count: Count) -> str:
    if count.published_dof is not None:
        return f"{count.published_dof:,}"
    return "" if count.published_ratio is None else f"{count.published_ratio:.3f}"


def _line(rank: int, spectrum: str, kinds: dict[str, Count]) -> tuple[object, ...]:
    """A line of the table: one way of holding the spectrum, both kinds."""
    cells = [
        cell
        for kind in KINDS
        for cell in (f"{kinds[kind].dof:,}", f"{kinds[kind].Z:.3f}", _published(kinds[kind]))
    ]
    known = [count.agrees for count in kinds.values() if count.agrees is not None]
    word = ("agrees" if all(known) else "differs") if known else ""
    return (rank, spectrum, *cells, word)


def _tables(counts: Sequence[Count], style: str, title: str) -> str:
    parts = []
    for name, group in groupby(counts, attrgetter("name")):
        same = list(group)
        lines = [
            _line(rank, spectrum, {count.kind: count for count in pair})
            for (rank, spectrum), pair in groupby(same, attrgetter("rank", "spectrum"))
        ]
        first = same[0]
        what = f"{first.weights} weights" if first.weights > 1 else "a weight"
        rest = f", {first.rest:,} of them not reparameterized" if first.rest else ""
        table = tabulate(
            lines, headers=_TITLES, tablefmt=style, colalign=_ALIGN, disable_numparse=True
        )
        parts += [f"{title.format(name)}: {what}, {first.dense:,} numbers{rest}", table]
    return "\n\n".join((*parts, _LEGEND, verdict(counts))) + "\n"


def verdict(counts: Iterable[Count]) -> str:
    """In words: how many published figures come out, and which do not.

    Args:
        counts: what was counted.
    """
    known = [count for count in counts if count.agrees is not None]
    if not known:
        return "No known published figure is among these."
    differ = [count for count in known if not count.agrees]
    words = [f"{len(known) - len(differ)} of {len(known)} known published figures come out."]
    for count in differ:
        ours = f"{count.dof:,}" if count.published_dof is not None else f"{count.Z:.3f}"
        words.append(
            f"{count.name}, rank {count.rank}, {count.kind}, {count.spectrum}: {ours}, "
            f"published {_published(count)}."
        )
    return "\n".join(words)


def as_text(counts: Sequence[Count]) -> str:
    """Tables for a terminal, one a network, and the :func:`verdict`."""
    return _tables(counts, "simple", "{}")


def as_markdown(counts: Sequence[Count]) -> str:
    """The same in Markdown."""
    return _tables(counts, "pipe", "**{}**")


def as_csv(counts: Iterable[Count]) -> str:
    """One line a :class:`Count`, with the names of its attributes on the first one."""
    names = [field.name for field in fields(Count)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*names, "Z"])
    for count in counts:
        writer.writerow([*(getattr(count, name) for name in names), f"{count.Z:.3f}"])
    return text.getvalue()


FORMATS: dict[str, Callable[[Sequence[Count]], str]] = {
    "text": as_text,
    "markdown": as_markdown,
    "csv": as_csv,
}
"""How counts are written, by name."""


def written(counts: Sequence[Count], form: str = "text") -> str:
    """Counts as text in one of the :data:`FORMATS`.

    Raises:
        ConfigError: another format.
    """
    if form not in FORMATS:
        raise ConfigError(f"unknown format {form!r}. The formats are: {', '.join(FORMATS)}")
    return FORMATS[form](counts)
