"""The figure of solvers: residual against iterations, evaluations and seconds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from sttp_manifold.experiments.reading.pictures import Picture, png
from sttp_manifold.experiments.reading.style import (
    STYLE,
    Look,
    legend,
    ranks_note,
    shown_ranks,
    solver_looks,
)
from sttp_manifold.experiments.records import Record, read_for

__all__ = ["draw_convergence"]

_AXES = {
    "iteration": "iterations",
    "evaluations": "calls of the cost function",
    "seconds": "seconds, evaluation left out",
}
_FLOOR = 1e-17


def draw_convergence(records: Sequence[Record]) -> list[Picture]:
    """The figure, where there are solvers; every run is a line of its own.

    Args:
        records: of one task.
    """
    shown = [record for record in records if record["effort"] is not None]
    looks = solver_looks(shown)
    if not any(read_for(record, "effort") for record in shown):
        return []
    ranks = shown_ranks(shown)
    target = shown[0]["effort"]["target"]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(12.6, 3.4 * len(ranks) + 1.1), layout="constrained")
        panels = figure.subplots(len(ranks), len(_AXES), squeeze=False, sharey=True)
        for rank, line in zip(ranks, panels, strict=True):
            for axes, (x, label) in zip(line, _AXES.items(), strict=True):
                for record in shown:
                    if record["spec"]["rank"] == rank:
                        _draw(axes, record, x, looks[record["spec"]["method"]])
                axes.axhline(target, color="#777777", linewidth=0.8, linestyle=":")
                axes.set_xscale("log")
                axes.set_yscale("log")
                # Sixteen decades would get no minor ticks, or far too many.
                axes.yaxis.set_major_locator(LogLocator(numticks=9))
                axes.yaxis.set_minor_formatter(NullFormatter())
                axes.set_xlabel(label)
            line[0].set_ylabel("residual on observed entries")
            line[0].set_title(f"rank {rank}", loc="left")
        legend(figure, list({look.label: look for look in looks.values()}.values()))
        caption = (
            "Relative residual on the observed entries against iterations, calls of the cost "
            "function, and time. Every line is one run; a marker shows where it ends. The dotted "
            f"line is the target, {target:g}. Hessian products are in the time, not in the calls."
        )
        return [Picture("convergence", caption + ranks_note(shown), png(figure))]


def _draw(axes: Axes, record: Record, x: str, look: Look) -> None:
    curves = record["curves"]
    pairs = [
        (at, max(math.sqrt(loss), _FLOOR))
        for at, loss in zip(curves[x], curves["train_loss"], strict=True)
        # The start has no place on a logarithmic axis.
        if at and loss is not None
    ]
    if not pairs:
        return
    axes.plot(
        *zip(*pairs, strict=True),
        color=look.colour,
        linestyle=look.line,
        linewidth=1.2,
        marker=look.marker,
        markerfacecolor=look.face,
        markevery=[len(pairs) - 1],
        alpha=0.85,
    )
