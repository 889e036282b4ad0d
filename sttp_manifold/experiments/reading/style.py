"""How the figures look: one colour, line and marker for each method, in every figure.

Colour says what is held and how, line style and marker say the optimizer: no two methods differ by
colour alone. The colours are those of Okabe and Ito, which people with any kind of colour
vision tell apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sttp_manifold.experiments.records import Record, read_for

__all__ = [
    "OPTIMIZER_NAMES",
    "STYLE",
    "Look",
    "legend",
    "looks_of",
    "plain",
    "ranks_note",
    "shown_ranks",
    "solver_looks",
]

STYLE: Any = {
    "figure.dpi": 130,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "legend.frameon": False,
    "legend.handlelength": 2.8,
    "legend.fontsize": 9,
    "legend.columnspacing": 1.3,
}

# Okabe & Ito (2008), without the yellow that vanishes on white.
_COLOURS = {
    ("dense", "dense"): "#000000",
    ("dense", "plain"): "#000000",
    ("svdp", "householder"): "#0072B2",
    ("svdp", "riemannian"): "#56B4E9",
    ("sttp", "householder"): "#D55E00",
    ("sttp", "riemannian"): "#E69F00",
}
_SPARE = ("#009E73", "#CC79A7", "#999999")
_OPTIMIZERS: dict[str, tuple[Any, str]] = {
    "adam": ("-", "o"),
    "adam-elementwise": ((0, (5, 1.2, 1, 1.2)), "^"),
    "sgd": ((0, (4, 1.6)), "s"),
    "muon": ((0, (1, 1)), "D"),
    "muon-adaptive": ((0, (3, 1, 1, 1)), "v"),
}

OPTIMIZER_NAMES = {
    "adam": "Adam",
    "adam-elementwise": "elementwise Adam",
    "sgd": "SGD",
    "muon": "Muon",
    "muon-adaptive": "Muon, adaptive ranks",
}
_HELD = {
    ("dense", "dense"): "dense",
    ("dense", "plain"): "dense",
    ("svdp", "householder"): "SVDP chart",
    ("svdp", "riemannian"): "SVDP Riemannian",
    ("sttp", "householder"): "STTP chart",
    ("sttp", "riemannian"): "STTP Riemannian",
    ("svdp", "fixed-rank"): "SVDP fixed rank",
    ("sttp", "fixed-rank"): "STTP fixed rank",
}


@dataclass(frozen=True)
class Look:
    """How one method is drawn.

    Attributes:
        colour: of lines and markers.
        line: matplotlib's line style.
        marker: matplotlib's marker.
        label: for the legend.
    """

    colour: str
    line: Any
    marker: str
    label: str

    @property
    def face(self) -> str:
        """Filled circles and hollow squares are told apart where they overlap."""
        return self.colour if self.marker == "o" else "white"


def looks_of(records: Sequence[Record]) -> dict[str, Look]:
    """The look of each method in the records, in their order."""
    looks: dict[str, Look] = {}
    spare: dict[tuple[str, str], str] = {}
    for record in records:
        spec = record["spec"]
        key = (spec["kind"], spec["parameterization"])
        if key not in _COLOURS and key not in spare:
            spare[key] = _SPARE[len(spare) % len(_SPARE)]
        line, marker = _OPTIMIZERS.get(spec["optimizer"], (":", "^"))
        optimizer = OPTIMIZER_NAMES.get(spec["optimizer"], spec["optimizer"])
        label = f"{_HELD.get(key, ' '.join(key))}, {optimizer}"
        if any(look.label == label for name, look in looks.items() if name != spec["method"]):
            label = spec["method"]
        looks.setdefault(spec["method"], Look(_COLOURS.get(key) or spare[key], line, marker, label))
    return looks


# By geometry the colour, by algorithm the line: as for the methods that train.
_GEOMETRIES = {
    "fixed-rank": "#D55E00",
    "product": "#0072B2",
    "householder": "#009E73",
    "factors": "#000000",
}
_ALGORITHMS: dict[str, tuple[Any, str]] = {
    "cg": ("-", "o"),
    "tr": ((0, (5, 1.5)), "s"),
    "lbfgs": ((0, (1.2, 1.2)), "^"),
    "adam": ((0, (5, 1.5, 1, 1.5)), "D"),
}
_TRAINED = "#bbbbbb"
_MOST_PANELS = 12
# The one method that shares geometry and algorithm with another.
_SOLVERS = {"pymanopt-fixed-rank-cg": "#CC79A7"}


def solver_looks(records: Sequence[Record]) -> dict[str, Look]:
    """The look of each method where solvers are compared; those that train stay in the back."""
    looks: dict[str, Look] = {}
    for record in records:
        spec = record["spec"]
        name = spec["method"]
        if not read_for(record, "effort"):
            looks[name] = Look(_TRAINED, "-", "", "methods that train")
            continue
        colour = _SOLVERS.get(name) or _GEOMETRIES.get(spec["parameterization"], _SPARE[1])
        line, marker = _ALGORITHMS.get(spec["optimizer"], (":", "v"))
        looks[name] = Look(colour, line, marker, name)
    return looks


def legend(figure: Figure, looks: Sequence[Look]) -> None:
    """One legend under all panels, where it covers no data."""
    handles = [
        Line2D(
            [],
            [],
            color=look.colour,
            linestyle=look.line,
            marker=look.marker,
            markerfacecolor=look.face,
            label=plain(look.label),
        )
        for look in looks
    ]
    renderer = FigureCanvasAgg(figure).get_renderer()  # type: ignore[no-untyped-call]
    # Two rows put two optimizers of a method above each other; more, where they are too long.
    for n_rows in range(2, len(handles) + 2):
        drawn = figure.legend(
            handles=handles,
            loc="outside lower center",
            ncols=max(1, -(-len(handles) // n_rows)),
        )
        if drawn.get_window_extent(renderer).width <= 0.98 * figure.bbox.width:
            return
        if n_rows <= len(handles):
            drawn.remove()


def plain(text: str) -> str:
    """A text that is drawn letter by letter: no mathematics between dollars.

    A legend leaves out what begins with an underscore.
    """
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def shown_ranks(records: Sequence[Record]) -> list[int]:
    """The ranks that have panels: all, or some from the least to the greatest where many are.

    Two hundred panels would make a picture that no viewer opens.
    """
    ranks = sorted({record["spec"]["rank"] for record in records})
    if len(ranks) <= _MOST_PANELS:
        return ranks
    step = (len(ranks) - 1) / (_MOST_PANELS - 1)
    return [ranks[round(k * step)] for k in range(_MOST_PANELS)]


def ranks_note(records: Sequence[Record]) -> str:
    """What a caption adds where not every rank has a panel."""
    count = len({record["spec"]["rank"] for record in records})
    shown = len(shown_ranks(records))
    return "" if shown == count else f" Of {count} ranks, {shown} are shown."
