"""The compression frontier: what each set of weights scores at a compression ratio.

Z is the paper's: the percentage of the dense network's numbers, running statistics included, that
the dimension of the weights and all that is not compressed come to.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from sttp_manifold.experiments.reading.pair_table import lead_of
from sttp_manifold.experiments.reading.paired import interval, paired
from sttp_manifold.experiments.reading.pictures import Picture, png
from sttp_manifold.experiments.reading.result_table import Row, metric_of, rows
from sttp_manifold.experiments.reading.style import STYLE, Look, legend, looks_of, plain
from sttp_manifold.experiments.records import Record
from sttp_manifold.experiments.task import Metric
from sttp_manifold.nn.counts import ratio

__all__ = [
    "NOTE",
    "SETS",
    "Point",
    "draw_frontier",
    "frontier_cells",
    "frontier_header",
    "frontiers",
    "say_frontier",
    "z_of",
]

SETS = {"svdp": "SVDP", "sttp": "STTP"}
NOTE = (
    "Z is the percentage of the dense network's numbers that the dimension of the weights, biases, "
    "norms and running statistics come to, as in the paper. Of the methods of one set at one rank, "
    "the one with the best mean on the validation split is shown. Intervals are the 95 % ones of "
    "means over seeds (Student's)."
)
_LEAST_RANKS = 3
_LINES = {"svdp": ("#0072B2", "-"), "sttp": ("#D55E00", "-")}


@dataclass(frozen=True)
class Point:
    """The best method of one set at one rank.

    Attributes:
        z: compression ratio.
        row: its results; chosen among the methods of the set by the validation split.
    """

    z: float
    row: Row


def z_of(record: Record) -> float | None:
    """The paper's compression ratio of a record; None where its counts are not known."""
    dimension, dense = record["dimension"], record["dense_elements"]
    if dimension is None or not dense:
        return None
    rest = (record["other_parameters"] or 0) + record.get("own", {}).get("running_statistics", 0)
    return ratio(dimension + rest, dense + rest)


def _ratios(records: Sequence[Record]) -> dict[tuple[str, int], float]:
    found = {}
    for record in records:
        z = z_of(record)
        if z is not None:
            found[record["spec"]["method"], record["spec"]["rank"]] = z
    return found


def frontiers(records: Sequence[Record]) -> dict[str, list[Point]]:
    """For each set of weights its points from the least ratio to the greatest.

    Empty where there are fewer than three ranks: two points are no frontier.

    Args:
        records: of one comparison, dense ones at each of its ranks.
    """
    table = [row for row in rows(records) if row.scored and row.test]
    if len({row.rank for row in table if row.kind in SETS}) < _LEAST_RANKS:
        return {}
    metric, z = metric_of(records), _ratios(records)
    found: dict[str, list[Point]] = {}
    for kind in (*SETS, "dense"):
        best: dict[int, Row] = {}
        for row in table:
            if row.kind == kind and (row.method, row.rank) in z:
                held = best.get(row.rank)
                if held is None or metric.better(_val(row), _val(held)):
                    best[row.rank] = row
        points = [Point(z[row.method, rank], row) for rank, row in best.items()]
        if points:
            found[kind] = sorted(points, key=lambda point: point.z)
    # Ranks beyond a matrix's side all have its ratio.
    ratios = {point.z for kind in SETS for point in found.get(kind, ())}
    return found if len(ratios) >= _LEAST_RANKS else {}


def _val(row: Row) -> float:
    return statistics.fmean(row.val.values())


def frontier_header(metric: Metric) -> list[str]:
    """Titles of :func:`frontier_cells`."""
    unit = f" ({metric.unit})" if metric.unit else ""
    return ["set", "rank", "Z (%)", "method", f"test {metric.name}{unit}", "95 %", "seeds"]


def frontier_cells(found: dict[str, list[Point]], metric: Metric) -> list[list[str]]:
    """The frontiers as lines of text, dense once."""
    lines = []
    for kind, points in found.items():
        for point in points[:1] if kind == "dense" else points:
            row = point.row
            reach = interval(list(row.test.values()))
            lines.append(
                [
                    SETS.get(kind, kind),
                    "-" if kind == "dense" else str(row.rank),
                    f"{point.z:.2f}",
                    row.method,
                    metric.show(row.mean),
                    "-" if reach is None else f"± {metric.show(reach)}",
                    str(len(row.test)),
                ]
            )
    return lines


# -- in words -------------------------------------------------------------------------------------


def _at(points: Sequence[Point], z: float, seed: int) -> float | None:
    """Score of a seed at a ratio, between two points by the logarithm of the ratio."""
    held = [point for point in points if seed in point.row.test]
    if not held or not held[0].z * (1 - 1e-9) <= z <= held[-1].z * (1 + 1e-9):
        return None
    places = [math.log(point.z) for point in held]
    return float(np.interp(math.log(z), places, [point.row.test[seed] for point in held]))


def _compared(found: dict[str, list[Point]], z: float) -> Any:
    """STTP minus SVDP at one ratio, seed by seed."""
    values: dict[str, dict[int, float]] = {}
    for kind in SETS:
        seeds = {seed for point in found[kind] for seed in point.row.test}
        values[kind] = {
            seed: score
            for seed in sorted(seeds)
            if (score := _at(found[kind], z, seed)) is not None
        }
    resolution = found["sttp"][0].row.resolution
    return paired(values["sttp"], values["svdp"], resolution)


def say_frontier(found: dict[str, list[Point]], metric: Metric) -> list[str]:
    """Whether STTP leads SVDP at equal ratios, strongly compressed and less so; a sentence.

    Args:
        found: of :func:`frontiers`.
        metric: what they are judged by.
    """
    if not set(SETS) <= set(found) or metric.log:
        return []
    svdp, sttp = found["svdp"], found["sttp"]
    low, high = max(svdp[0].z, sttp[0].z), min(svdp[-1].z, sttp[-1].z)
    if low > high:
        return [
            f"SVDP goes from Z = {svdp[0].z:.2g} to {svdp[-1].z:.2g} %, STTP from {sttp[0].z:.2g} "
            f"to {sttp[-1].z:.2g} %: they share no ratio at which to compare them."
        ]
    ends = {f"{low:.2g}", f"{high:.2g}"}
    middle = [p.z for points in (svdp, sttp) for p in points if low < p.z < high]
    # One that reads like an end would be said twice.
    middle = [z for z in middle if f"{z:.2g}" not in ends]
    places = sorted({low, *([statistics.median_low(middle)] if middle else []), high})
    parts = []
    for z in places:
        by = _compared(found, z)
        if by is None:
            return ["One seed shows no spread: at equal Z no set of weights is told apart."]
        amount = lead_of(by, metric, sttp[0].row.resolution).amount
        sign = by.mean if metric.higher else -by.mean
        outcome = (
            f"{'ahead' if sign > 0 else 'behind'} by {amount}"
            if by.apart
            else (f"not told apart ({'+' if sign > 0 else '−'}{amount})")
        )
        parts.append(f"at Z = {z:.2g} % {outcome}")
    first = _compared(found, low)
    lead = (first.mean > 0) == metric.higher
    verdict = (
        "STTP leads SVDP in the strongly compressed regime here, as in the paper"
        if first.apart and lead
        else "SVDP leads STTP in the strongly compressed regime here, unlike in the paper"
        if first.apart
        else "In the strongly compressed regime, where the paper has STTP lead, no lead of either "
        "is told apart here"
    )
    return [f"{verdict}. STTP against SVDP at equal ratios: {'; '.join(parts)}."]


# -- drawn ----------------------------------------------------------------------------------------


def draw_frontier(records: Sequence[Record]) -> list[Picture]:
    """Score against ratio: every method small, the frontier of each set bold, dense as a line.

    Args:
        records: of one comparison, dense ones at each of its ranks.
    """
    found = frontiers(records)
    if not found:
        return []
    metric, z, looks = metric_of(records), _ratios(records), looks_of(records)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10.4, 5.6), layout="constrained")
        axes = figure.subplots()
        for row in rows(records):
            if row.kind in SETS and row.test and (row.method, row.rank) in z:
                look = looks[row.method]
                axes.plot(
                    z[row.method, row.rank],
                    row.mean,
                    color=look.colour,
                    marker=look.marker,
                    markerfacecolor=look.face,
                    alpha=0.8,
                    linestyle="",
                    zorder=3,
                )
        _lines(axes, found, metric)
        # A line is no method: it goes through the best of each rank.
        marks = [replace(look, line="") for name, look in looks.items() if _drawn(records, name)]
        lines = [
            Look(*_LINES[kind], "", f"{kind.upper()}, the best of each rank")
            for kind in found
            if kind in _LINES
        ]
        legend(figure, [*marks, *lines])
    caption = (
        f"Test {metric.name} against the compression ratio Z. Thick lines are the frontiers of "
        "SVDP (blue) and STTP (red): at each rank the method that is best on the validation split, "
        "with the 95 % interval of its mean over seeds; small marks are all methods. "
        + ("The black line is the best dense method and its interval. " if "dense" in found else "")
        + "Further left is smaller."
    )
    return [Picture("frontier", caption, png(figure))]


def _drawn(records: Sequence[Record], method: str) -> bool:
    return any(r["spec"]["method"] == method and r["spec"]["kind"] in SETS for r in records)


def _lines(axes: Axes, found: dict[str, list[Point]], metric: Metric) -> None:
    for kind, points in found.items():
        means = [point.row.mean for point in points]
        reach = [interval(list(point.row.test.values())) or 0.0 for point in points]
        if kind == "dense":
            axes.axhline(means[0], color="#000000", linewidth=1.4)
            axes.axhspan(means[0] - reach[0], means[0] + reach[0], color="#000000", alpha=0.08)
            axes.annotate(
                "dense",
                (0.01, means[0]),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                xytext=(0, 4),
                fontsize=8,
            )
            continue
        colour, line = _LINES[kind]
        axes.errorbar(
            [point.z for point in points],
            means,
            yerr=None if metric.log else reach,
            color=colour,
            linestyle=line,
            linewidth=2.4,
            capsize=4,
        )
        for point in points:
            axes.annotate(
                f"r {point.row.rank}",
                (point.z, point.row.mean),
                textcoords="offset points",
                xytext=(6, -12),
                fontsize=8,
                color=colour,
            )
    axes.set_xscale("log")
    if metric.log:
        axes.set_yscale("log")
    ticks = [m * 10.0**e for e in range(-2, 3) for m in (1, 2, 5)]
    low, high = axes.get_xlim()
    axes.set_xticks([tick for tick in ticks if low <= tick <= high])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("Z: numbers of the network, % of dense")
    unit = f" ({metric.unit})" if metric.unit else ""
    axes.set_ylabel(plain(f"test {metric.name}{unit}"))
