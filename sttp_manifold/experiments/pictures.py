"""A figure as a file."""

from __future__ import annotations

import io
from dataclasses import dataclass

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

__all__ = ["Picture", "png"]


@dataclass(frozen=True)
class Picture:
    """One figure.

    Attributes:
        name: of the file, without its suffix.
        caption: what it shows, and how to read it.
        png: the file.
    """

    name: str
    caption: str
    png: bytes


def png(figure: Figure) -> bytes:
    """The bytes of a figure's PNG file."""
    FigureCanvasAgg(figure)
    out = io.BytesIO()
    figure.savefig(out, format="png", facecolor="white")
    return out.getvalue()
