"""Figures of a comparison. They read records from files, never tensors in flight.

How each method looks is in :mod:`~sttp_manifold.experiments.reading.style`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from sttp_manifold.experiments.files import file_name
from sttp_manifold.experiments.reading.convergence import draw_convergence
from sttp_manifold.experiments.reading.frontier import draw_frontier
from sttp_manifold.experiments.reading.pictures import Picture, png
from sttp_manifold.experiments.reading.result_table import Row, average, metric_of, rows
from sttp_manifold.experiments.reading.style import (
    STYLE,
    legend,
    looks_of,
    plain,
    ranks_note,
    shown_ranks,
)
from sttp_manifold.experiments.records import Record, read_for
from sttp_manifold.experiments.task import Metric

__all__ = ["Picture", "draw"]


def _panels(count: int, across: int, height: float = 3.3) -> tuple[Figure, list[list[Axes]]]:
    figure = Figure(figsize=(max(5.2 * across, 10.4), height * count + 0.9), layout="constrained")
    grid = figure.subplots(count, across, squeeze=False)
    return figure, [list(line) for line in grid]


def _mean_curve(
    group: Sequence[Record], x: str, y: str, *, log: bool
) -> tuple[list[float], list[float], list[float], list[float]]:
    """Means over seeds of x and y, and the least and greatest y, epoch by epoch."""
    curves = [record["curves"] for record in group]
    length = min(len(curve["epoch"]) for curve in curves)
    xs, ys, low, high = [], [], [], []
    for k in range(length):
        values = [curve[y][k] for curve in curves]
        places = [curve[x][k] for curve in curves]
        if None in values or None in places:
            continue
        xs.append(statistics.fmean(places))
        ys.append(average(values, log=log))
        low.append(min(values))
        high.append(max(values))
    return xs, ys, low, high


def _by_method(records: Sequence[Record], rank: int) -> Iterator[tuple[str, list[Record]]]:
    methods: dict[str, list[Record]] = {}
    for record in records:
        if record["spec"]["rank"] == rank and record["curves"]["epoch"]:
            methods.setdefault(record["spec"]["method"], []).append(record)
    yield from methods.items()


def _curves(
    records: Sequence[Record],
    value: str,
    label: str,
    *,
    log: bool,
    name: str,
    caption: str,
    limits: Callable[[Axes], None] | None = None,
) -> Picture:
    """A value against epoch and against time: a line of panels for each rank."""
    looks = looks_of(records)
    ranks = shown_ranks(records)
    figure, panels = _panels(len(ranks), 2)
    for rank, (by_epoch, by_time) in zip(ranks, panels, strict=True):
        for axes, x in ((by_epoch, "epoch"), (by_time, "seconds")):
            for method, group in _by_method(records, rank):
                look = looks[method]
                xs, ys, low, high = _mean_curve(group, x, value, log=log)
                if not xs:
                    continue
                every = max(1, len(xs) // 6)
                axes.plot(
                    xs,
                    ys,
                    color=look.colour,
                    linestyle=look.line,
                    marker=look.marker,
                    markerfacecolor=look.face,
                    markevery=every,
                )
                axes.fill_between(xs, low, high, color=look.colour, alpha=0.12, linewidth=0)
            if log:
                axes.set_yscale("log")
            if limits:
                limits(axes)
            axes.set_title(f"rank {rank}", loc="left")
            axes.set_ylabel(label)
        by_epoch.set_xlabel("epoch")
        by_epoch.xaxis.set_major_locator(MaxNLocator(integer=True))
        by_time.set_xlabel("training time (s)")
    legend(figure, list(looks.values()))
    return Picture(name, caption + ranks_note(records), png(figure))


def _label(metric: Metric, split: str) -> str:
    return plain(f"{split} {metric.name}" + (f" ({metric.unit})" if metric.unit else ""))


def _spectra(records: Sequence[Record], optimizer: str) -> Picture | None:
    """Singular values over training, of the first seed, at the largest rank."""
    rank = shown_ranks(records)[-1]
    seed = records[0]["spec"]["seed"]
    shown = [
        record
        for record in records
        if record["spec"]["rank"] == rank
        and record["spec"]["seed"] == seed
        and record["spec"]["optimizer"] == optimizer
        and record["spectra"]
    ]
    if not shown:
        return None
    looks = looks_of(records)
    layers = list(shown[0]["spectra"])
    height = 2.1 if len(layers) > 1 else 3.2
    figure = Figure(
        figsize=(max(2.5 * len(shown) + 0.6, 6), height * len(layers) + 1.1), layout="constrained"
    )
    grid = figure.subplots(len(layers), len(shown), squeeze=False, sharey="row", sharex=True)
    colours = mpl.colormaps["cividis"]
    for line, layer in zip(grid, layers, strict=True):
        for axes, record in zip(line, shown, strict=True):
            epochs = record["curves"]["epoch"]
            values = [s[: 2 * rank] for s in record["spectra"][layer]]
            count = min(len(values[0]), 2 * rank)
            for k in range(count):
                beyond = k >= rank
                axes.plot(
                    epochs,
                    [s[k] for s in values],
                    color="#b0b0b0" if beyond else colours(0.9 * k / max(rank - 1, 1)),
                    linewidth=0.9 if beyond else 1.5,
                    linestyle=":" if beyond else "-",
                )
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        # Shared along the line, so once all of it is drawn.
        line[0].set_ylim(bottom=0)
        line[0].set_ylabel(f"layer {plain(layer)}\nsingular values")
    for axes, record in zip(grid[0], shown, strict=True):
        axes.set_title(plain(looks[record["spec"]["method"]].label), fontsize=10)
    for axes in grid[-1]:
        axes.set_xlabel("epoch")
    handles = [
        Line2D([], [], color=colours(0.0), label="largest"),
        Line2D([], [], color=colours(0.9), label=f"number {rank}"),
    ]
    if any(record["spec"]["kind"] == "dense" for record in shown):
        beyond_label = f"beyond {rank} (dense only)"
        handles.append(Line2D([], [], color="#b0b0b0", linestyle=":", label=beyond_label))
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    caption = (
        f"Singular values of each layer over training at rank {rank}, seed {seed} alone, from the "
        f"common initial weight. A dense weight may leave the rank it started from; of it, "
        f"{2 * rank} values at most are shown."
    )
    return Picture(f"spectrum-{file_name(optimizer)}", caption, png(figure))


def _drift(records: Sequence[Record]) -> Picture | None:
    held = [record for record in records if record["spec"]["kind"] != "dense"]
    if not held:
        return None
    looks = looks_of(held)
    ranks = shown_ranks(held)
    figure, panels = _panels(1, len(ranks), 3.8)
    for rank, axes in zip(ranks, panels[0], strict=True):
        for method, group in _by_method(held, rank):
            look = looks[method]
            xs, _, _, high = _mean_curve(group, "epoch", "drift", log=True)
            axes.plot(
                xs,
                # An exact zero has no place on a logarithmic axis.
                [max(value, 1e-17) for value in high],
                color=look.colour,
                linestyle=look.line,
                marker=look.marker,
                markerfacecolor=look.face,
                markevery=max(1, len(xs) // 6),
            )
        axes.set_yscale("log")
        axes.set_title(f"rank {rank}", loc="left")
        axes.set_xlabel("epoch")
        axes.set_ylabel("largest |QᵀQ − I|")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        # Whole decades, or noise about rounding looks like a trend.
        low, high_limit = (math.log10(limit) for limit in axes.get_ylim())
        axes.set_ylim(10 ** math.floor(low), 10 ** math.ceil(high_limit))
    legend(figure, list(looks.values()))
    epsilon = "1.2e-7" if records[0]["spec"]["dtype"] == "float32" else "2.2e-16"
    caption = (
        "How far the frames are from orthonormal: the largest entry over layers, cores and seeds. "
        f"One rounding of {records[0]['spec']['dtype']} is {epsilon}."
    )
    return Picture("drift", caption + ranks_note(held), png(figure))


def _trade(records: Sequence[Record], metric: Metric) -> Picture:
    looks = looks_of(records)
    table = [row for row in rows(records) if row.test and row.stored]
    figure = Figure(figsize=(10.4, 5.4), layout="constrained")
    axes = figure.subplots()
    for row in table:
        look = looks[row.method]
        values = list(row.test.values())
        axes.errorbar(
            _beside(row),
            row.mean,
            yerr=[[row.mean - min(values)], [max(values) - row.mean]],
            color=look.colour,
            marker=look.marker,
            markersize=8,
            markerfacecolor=look.face,
            markeredgewidth=1.6,
            capsize=3,
            linewidth=1.2,
        )
    for method in dict.fromkeys(row.method for row in table):
        line = [row for row in table if row.method == method]
        axes.plot(
            [_beside(row) for row in line],
            [row.mean for row in line],
            color=looks[method].colour,
            linestyle=looks[method].line,
            linewidth=0.9,
            alpha=0.6,
        )
    if metric.log:
        axes.set_yscale("log")
    axes.set_xscale("log")
    stored = [row.stored for row in table if row.stored]
    if stored and math.log10(max(stored) / min(stored)) < 2:
        _plain_ticks(axes, stored)
    axes.set_xlabel("numbers stored in the weights")
    axes.set_ylabel(_label(metric, "test"))
    legend(figure, list(looks.values()))
    ranks = ", ".join(map(str, sorted({row.rank for row in table})))
    caption = (
        f"Test {metric.name} against what the weights store, ranks {ranks} joined by lines. "
        "Bars go from the least to the greatest over seeds. A chart stores as many numbers as the "
        "set has dimensions; a point on the manifold stores its frames whole. Dense weights store "
        "the same number at every rank. Optimizers are drawn a little apart."
    )
    return Picture("trade-off", caption, png(figure))


def _beside(row: Row) -> float:
    """Where a row is drawn: bars of two optimizers would hide each other at one place."""
    nudge = {"adam": -0.03, "adam-elementwise": 0.03, "sgd": 0.0, "muon": 0.06}
    return (row.stored or 1) * (1.0 + nudge.get(row.optimizer, -0.06))


def _plain_ticks(axes: Axes, values: Sequence[int]) -> None:
    """Round numbers as ticks where an axis spans less than two decades."""
    low, high = min(values), max(values)
    steps = [m * 10**e for e in range(0, 9) for m in (1, 2, 5)]
    axes.set_xticks([step for step in steps if low / 2 <= step <= high * 2])
    axes.set_xlim(low / 1.4, high * 1.3)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


_TOP = " The axis is spaced by the logarithm of the error, which opens up its top."


def _open_the_top(axes: Axes) -> None:
    """Space percentages by the logarithm of what they lack of a hundred.

    Methods that end between 90 and 98 % would share a line's width otherwise.
    """

    def forward(percent: Any) -> Any:
        return -np.log(np.maximum(100.2 - np.asarray(percent), 0.05))

    def back(value: Any) -> Any:
        return 100.2 - np.exp(-np.asarray(value))

    low, high = axes.dataLim.y0, axes.dataLim.y1
    axes.set_yscale("function", functions=(forward, back))
    axes.set_yticks([0, 20, 40, 60, 80, 90, 95, 97, 98, 99, 100])
    axes.set_ylim(max(0.0, low - 4), 100 - 0.75 * (100 - high))


def draw(records: Sequence[Record]) -> list[Picture]:
    """Every figure that the records allow.

    Args:
        records: of one task; runs that did not finish are drawn as far as they came.
    """
    convergence = draw_convergence(records)
    records = [record for record in records if read_for(record, "curves")]
    if not any(record["curves"]["epoch"] for record in records):
        return convergence
    metric = metric_of(records)
    band = (
        "Lines are means over seeds (geometric for errors and losses), bands go from the least to "
        "the greatest. "
    )
    clock = "Training time leaves evaluation out."

    frontier = draw_frontier(records)
    with mpl.rc_context(STYLE):
        pictures: list[Picture | None] = [
            _curves(
                records,
                "val_metric",
                _label(metric, "validation"),
                log=metric.log,
                name="metric",
                caption=f"Validation {metric.name} against epoch and against training time. "
                f"{band}{clock}" + (_TOP if metric.unit == "%" else ""),
                limits=_open_the_top if metric.unit == "%" else None,
            ),
            _curves(
                records,
                "train_loss",
                "training loss",
                log=True,
                name="loss",
                caption="Training loss (mean over an epoch's steps; at epoch 0, of the initial "
                f"weights) against epoch and against training time. {band}{clock}",
            ),
            _trade(records, metric) if any(r["status"] == "ok" for r in records) else None,
            *(
                _spectra(records, optimizer)
                for optimizer in dict.fromkeys(r["spec"]["optimizer"] for r in records)
            ),
            _drift(records),
        ]
    return convergence + frontier + [picture for picture in pictures if picture is not None]
