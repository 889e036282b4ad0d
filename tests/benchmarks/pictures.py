"""The figures of the benchmarks, drawn from records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from growth import exponents
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from sttp_manifold.experiments.reading.style import STYLE

Row = Mapping[str, Any]
# Okabe & Ito (2008), as in the figures of a comparison; a marker each, so that none needs colour.
LOOKS = {
    "dense": ("#000000", "o"),
    "SVDP chart": ("#0072B2", "s"),
    "SVDP Riemannian": ("#56B4E9", "^"),
    "STTP chart": ("#D55E00", "D"),
    "STTP Riemannian": ("#E69F00", "v"),
}
THREADS = ({"marker": "o", "color": "#0072B2"}, {"marker": "s", "color": "#D55E00"})


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    figure.savefig(path, format="png", facecolor="white", metadata={"Software": None})


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def targets(records: Sequence[Row], path: Path) -> None:
    """Each result over its target, a dot for each number of threads."""
    judged = [r for r in records if r["status"] in ("met", "missed")]
    names = list(dict.fromkeys(label(r) for r in judged))
    threads = sorted({r["threads"] for r in judged})
    with mpl.rc_context(STYLE):
        figure = _figure(10.4, 1.4 + 0.24 * max(len(names), 3))
        axis = figure.subplots()
        for count, look in zip(threads, THREADS * len(threads), strict=False):
            mine = [r for r in judged if r["threads"] == count]
            axis.plot(
                [_progress(r) for r in mine],
                [names.index(label(r)) for r in mine],
                linestyle="none",
                label=in_words(count),
                **look,
            )
        axis.axvline(1.0, color="0.3", linewidth=1)
        axis.set(xscale="log", xlabel="result over target", yticks=range(len(names)))
        axis.set_yticklabels(names, fontsize=7)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:g}"))
        axis.set_ylim(len(names) - 0.4, -0.6)
        if threads:
            figure.legend(*axis.get_legend_handles_labels(), loc="outside upper right", ncols=2)
        _save(figure, path)


def in_words(count: int) -> str:
    """1 thread, 2 threads."""
    return f"{count} thread{'s' if count > 1 else ''}"


def label(record: Row) -> str:
    """What was held against what: of several ways of ours, each has a label of its own."""
    case = f"{record['row']}: {record['case']}, {record['work']}"
    return f"{case}; {record['ours']} against {record['peer']}"


def _progress(record: Row) -> float:
    mine = record["ratio"] if record["measure"] == "ratio" else record["ours_value"]
    over = record["target"] / mine if record["at_most"] else mine / record["target"]
    return float(over)


def training(cases: Sequence[Row], path: Path) -> None:
    """Time of dense as bars, one for each number of threads, and the flop ratio as a mark."""
    networks = list(dict.fromkeys(c["network"] for c in cases))
    with mpl.rc_context(STYLE):
        figure = _figure(10.4, 3.9)
        axes = figure.subplots(1, len(networks), squeeze=False)[0]
        for axis, network in zip(axes, networks, strict=True):
            _training_panel(axis, [c for c in cases if c["network"] == network])
            axis.set_title(network)
        axes[0].set_ylabel("of the dense network")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        _save(figure, path)


def _training_panel(axis: Axes, cases: Sequence[Row]) -> None:
    methods = list(dict.fromkeys(c["method"] for c in cases))
    threads = sorted({c["threads"] for c in cases})
    width = 0.8 / len(threads)
    for k, (count, look) in enumerate(zip(threads, THREADS * len(threads), strict=False)):
        mine = {c["method"]: c["time_ratio"] for c in cases if c["threads"] == count}
        places = [m + (k - (len(threads) - 1) / 2) * width for m in range(len(methods))]
        heights = [mine[method] for method in methods]
        axis.bar(places, heights, width, label=f"time, {in_words(count)}", color=look["color"])
    flops = {c["method"]: c["flop_ratio"] for c in cases}
    for m, method in enumerate(methods):
        axis.hlines(
            flops[method], m - 0.45, m + 0.45, color="black", linewidth=2,
            label=None if m else "flops",
        )  # fmt: skip
    axis.set_xticks(range(len(methods)), [method.replace(" ", "\n") for method in methods])
    axis.grid(visible=False, axis="x")


def growth(cases: Sequence[Row], path: Path) -> None:
    """Time against each size, both logarithmic, the flop count dashed."""
    axes_names = list(dict.fromkeys(c["axis"] for c in cases))
    slopes = exponents(cases)
    with mpl.rc_context(STYLE):
        lines = -(-len(axes_names) // 2)
        figure = _figure(10.8, 4.4 * lines)
        panels = iter(figure.subplots(lines, 2, squeeze=False).flat)
        for name, panel in zip(axes_names, panels, strict=False):
            for method, (colour, marker) in LOOKS.items():
                curve = [c for c in cases if c["axis"] == name and c["method"] == method]
                if not curve:
                    continue
                sizes = np.array([c["size"] for c in curve], dtype=float)
                ms = 1e3 * np.array([c["seconds"] for c in curve])
                flops = np.array([c["flops"] for c in curve], dtype=float)
                label = "{}: {:.2f} ({:.2f})".format(method, *slopes[name, method])
                panel.plot(sizes, ms, color=colour, marker=marker, label=label)
                scaled = flops / flops[-1] * ms[-1]
                panel.plot(sizes, scaled, color=colour, linewidth=0.9, linestyle=(0, (4, 2)))
            panel.set(xscale="log", yscale="log", xlabel=name, ylabel="ms a training step")
            sizes = [c["size"] for c in cases if c["axis"] == name]
            panel.set_xticks(sorted(set(sizes)), minor=False)
            panel.set_xticks([], minor=True)
            for axis in (panel.xaxis, panel.yaxis):
                axis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:g}"))
            panel.yaxis.set_minor_formatter(NullFormatter())
            panel.legend(
                fontsize=8, title="exponent of time (of flops)", title_fontsize=8, frameon=True,
                framealpha=0.85, edgecolor="none", loc="upper left",
            )  # fmt: skip
        for panel in panels:
            panel.set_visible(False)
        _save(figure, path)
