"""The figure of a :class:`SpectrumMonitor`, and its place in a notebook."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from sttp_manifold.display import spread
from sttp_manifold.errors import SpectrumError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["NotebookPlace", "png_of", "spectra_figure"]

_MOST_LAYERS = 6


def spectra_figure(
    steps: Sequence[int],
    spectra: Mapping[str, Tensor],
    stable_ranks: Mapping[str, Sequence[float]],
    alarms: Sequence[tuple[str, int]],
) -> Figure:
    """Singular values over the largest, layer by layer, and the stable ranks of all.

    Args:
        steps: of the readings.
        spectra: of each layer.
        stable_ranks: of each layer, one for each reading.
        alarms: layer and step of each.

    Shape:
        - spectra: each ``(readings, r)``
    """
    from matplotlib.figure import Figure

    layers = spread(list(spectra), _MOST_LAYERS)
    figure = Figure(figsize=(2.4 * len(layers) + 3.4, 2.9), layout="constrained")
    panels = figure.subplots(1, len(layers) + 1, width_ratios=[1] * len(layers) + [1.5])
    for axes, layer in zip(panels, layers, strict=False):
        values = spectra[layer].numpy()
        relative = values / np.maximum(values[:, :1], 1e-30)
        axes.plot(steps, np.maximum(relative, 1e-6), color="#0072B2", linewidth=0.8, alpha=0.7)
        axes.set_yscale("log")
        axes.set_ylim(1e-3, 1.3)
        axes.set_title(layer or "(root)", fontsize=9)
        axes.set_xlabel("step")
        for name, step in alarms:
            if name == layer:
                axes.axvline(step, color="#D55E00", linewidth=1.2)
    panels[0].set_ylabel("singular value / largest")
    last = panels[-1]
    for layer in spectra:
        last.plot(steps, stable_ranks[layer], linewidth=1.2, label=layer or "(root)")
    last.set_ylim(bottom=0)
    last.set_title("stable rank", fontsize=9)
    last.set_xlabel("step")
    if len(spectra) <= 2 * _MOST_LAYERS:
        last.legend(fontsize=6, frameon=False, ncols=2)
    return figure


def png_of(figure: Figure) -> bytes:
    """The bytes of a figure's PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=90, facecolor="white")
    return out.getvalue()


class NotebookPlace:
    """A place in the output of a notebook's cell, whose picture is replaced.

    Raises:
        SpectrumError: IPython is not installed.
    """

    def __init__(self) -> None:
        try:
            from IPython import display
        except ImportError as error:
            raise SpectrumError(
                "monitor.live() shows its figure in a notebook, and IPython is not installed; "
                "monitor.figure() makes one anywhere"
            ) from error
        self._display: Any = display
        self._handle: Any = None

    def show(self, png: bytes) -> None:
        """Put a picture there, in place of the one before."""
        image = self._display.Image(data=png, format="png")
        if self._handle is None:
            self._handle = self._display.display(image, display_id=True)
        else:
            self._handle.update(image)
