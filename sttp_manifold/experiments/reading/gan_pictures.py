"""Figures of GANs: distances and spectra against steps, heat maps, and generated images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sttp_manifold.display import spread
from sttp_manifold.experiments.checkpoint import PRODUCTS
from sttp_manifold.experiments.reading.pictures import Picture, png
from sttp_manifold.experiments.reading.style import STYLE, Look, legend, looks_of, plain
from sttp_manifold.experiments.records import Record, read_for

__all__ = ["draw_gans"]

_GRID, _STRIPS = "samples.png", "interpolation.png"
_MOST_LAYERS = 5
_MOST_METHODS = 12
_ACROSS = 5


def draw_gans(records: Sequence[Record], folder: Path | None) -> list[Picture]:
    """Every figure that the records of GANs allow.

    Args:
        records: of one task.
        folder: of the comparison, for pictures that runs have left there.
    """
    records = [r for r in records if read_for(r, "gan") and r["curves"]["iteration"]]
    if not records:
        return []
    with mpl.rc_context(STYLE):
        found = [_distances(records), _stable_ranks(records), _heat_maps(records)]
        if folder is not None:
            found += [
                _images(records, folder, _GRID, "samples", "Images of the averaged generators"),
                _images(
                    records,
                    folder,
                    _STRIPS,
                    "interpolation",
                    "From one image to another: the vectors between two, along a great circle",
                ),
            ]
    return [picture for picture in found if picture is not None]


def _by_method(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Runs by method, at the largest rank of each."""
    rank = max(record["spec"]["rank"] for record in records)
    found: dict[str, list[Record]] = {}
    for record in records:
        if record["spec"]["rank"] == rank:
            found.setdefault(record["spec"]["method"], []).append(record)
    return found


def _line(axes: Axes, look: Look, group: Sequence[Record], x: str, y: str) -> None:
    """Mean over seeds, with a band from the least to the greatest."""
    length = min(len(r["curves"][x]) for r in group)
    places = np.array([r["curves"][x][:length] for r in group], dtype=float).mean(0)
    values = np.array([r["curves"][y][:length] for r in group], dtype=float)
    axes.plot(
        places,
        values.mean(0),
        color=look.colour,
        linestyle=look.line,
        marker=look.marker,
        markerfacecolor=look.face,
        markevery=max(1, length // 6),
    )
    axes.fill_between(
        places, values.min(0), values.max(0), color=look.colour, alpha=0.12, linewidth=0
    )


def _distances(records: Sequence[Record]) -> Picture:
    looks = looks_of(records)
    figure = Figure(figsize=(10.4, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, x, label in (
        (left, "iteration", "steps of the generator"),
        (right, "seconds", "training time (s)"),
    ):
        for method, group in _by_method(records).items():
            _line(axes, looks[method], group, x, "val_metric")
        axes.set_yscale("log")
        axes.set_xlabel(label)
    floors = [r["own"]["floor"] for r in records if r["own"].get("floor") is not None]
    if floors:
        for axes in (left, right):
            axes.axhline(sum(floors) / len(floors), color="#888888", linestyle=":", linewidth=1)
    left.set_ylabel("validation Fréchet distance")
    legend(figure, list(looks.values()))
    caption = (
        "Fréchet distance of features of a small classifier (not FID) between images of the "
        "averaged generator and the validation split. Lines are means over seeds, bands go from "
        "the least to the greatest; dotted, the distance of real images to the test split."
    )
    return Picture("distance", caption, png(figure))


def _stable_ranks(records: Sequence[Record]) -> Picture:
    looks = looks_of(records)
    figure = Figure(figsize=(10.4, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, name, label in (
        (left, "stable_rank", "stable rank, mean over layers"),
        (right, "ratio", "smallest / largest singular value"),
    ):
        for method, group in _by_method(records).items():
            _line(axes, looks[method], group, "iteration", name)
        axes.set_xlabel("steps of the generator")
        axes.set_ylabel(label)
    left.set_ylim(bottom=0)
    legend(figure, list(looks.values()))
    caption = (
        "Spectra of the discriminators: the sum of squares of the singular values over the largest "
        "square, and the smallest over the largest, means over layers with two singular values or "
        "more. A collapse is a fall of both."
    )
    return Picture("stable-rank", caption, png(figure))


def _heat_maps(records: Sequence[Record]) -> Picture | None:
    """Singular values over the largest, by number and step: a column for each method."""
    looks = looks_of(records)
    shown = {
        method: next((r for r in group if r["spectra"]), None)
        for method, group in _by_method(records).items()
    }
    columns = [(m, r) for m, r in shown.items() if r is not None][:_MOST_METHODS]
    if not columns:
        return None
    layers = spread(list(columns[0][1]["spectra"]), _MOST_LAYERS)
    figure = Figure(
        figsize=(1.6 * len(columns) + 1.6, 1.5 * len(layers) + 1.2), layout="constrained"
    )
    grid = figure.subplots(len(layers), len(columns), squeeze=False)
    image: Any = None
    for line, layer in zip(grid, layers, strict=True):
        for axes, (_, record) in zip(line, columns, strict=True):
            spectra = record["spectra"].get(layer)
            axes.grid(False)
            axes.set_xticks([])
            axes.set_yticks([])
            if not spectra:
                axes.set_axis_off()
                continue
            values = np.array(spectra, dtype=float).T
            relative = values / np.maximum(values[0], 1e-30)
            image = axes.imshow(
                np.log10(np.maximum(relative, 1e-3)),
                aspect="auto",
                vmin=-2,
                vmax=0,
                cmap="cividis",
                interpolation="nearest",
            )
        line[0].set_ylabel(plain(layer), fontsize=8)
    for axes, (method, _) in zip(grid[0], columns, strict=True):
        axes.set_title(plain(looks[method].label.replace(", ", "\n")), fontsize=8)
    for axes in grid[-1]:
        axes.set_xlabel("steps", fontsize=8)
    bar = figure.colorbar(image, ax=grid, shrink=0.8)
    bar.set_ticks([-2, -1, 0], labels=["1/100", "1/10", "1"])
    bar.set_label("singular value / the largest")
    first = columns[0][1]["spec"]["seed"]
    caption = (
        f"Heat maps of spectra over training, seed {first}: each column of pixels is a look, each "
        "row a singular value, the largest on top; dark is small beside the largest. A collapse "
        "darkens a map from below."
    )
    return Picture("spectra", caption, png(figure))


def _images(
    records: Sequence[Record], folder: Path, name: str, title: str, what: str
) -> Picture | None:
    """The pictures that the first run of each method has left, side by side."""
    from matplotlib.image import imread

    looks = looks_of(records)
    found = []
    for method, group in _by_method(records).items():
        for record in group:
            path = folder / PRODUCTS / record["hash"] / name
            if record["status"] == "ok" and path.is_file():
                found.append((method, record, imread(path)))
                break
    if not found:
        return None
    across = min(_ACROSS, len(found))
    down = math.ceil(len(found) / across)
    height, width = found[0][2].shape[:2]
    figure = Figure(
        figsize=(2.6 * across, (2.6 * height / width + 0.45) * down), layout="constrained"
    )
    panels = list(figure.subplots(down, across, squeeze=False).flat)
    for axes in panels:
        axes.set_axis_off()
    for axes, (method, record, image) in zip(panels, found, strict=False):
        axes.imshow(image, cmap="gray", vmin=0, vmax=1)
        score = record["test_metric"]
        shown = "" if score is None else f" {score:.2f}"
        axes.set_title(plain(looks[method].label) + shown, fontsize=7)
    seed = found[0][1]["spec"]["seed"]
    caption = (
        f"{what}, of seed {seed}, from the same vectors for all; none is chosen. Beside each name "
        "is its Fréchet distance to the test split."
    )
    return Picture(title, caption, png(figure))
