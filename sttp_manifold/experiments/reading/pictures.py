"""A figure as a file."""

from __future__ import annotations

import io
from dataclasses import dataclass, field

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

__all__ = ["Picture", "png"]


@dataclass(frozen=True)
class Picture:
    """One figure. A notebook shows it.

    Attributes:
        name: of the file, without its suffix.
        caption: what it shows, and how to read it.
        png: the file.
    """

    name: str
    caption: str
    png: bytes = field(repr=False)

    def _repr_png_(self) -> bytes:
        return self.png


def png(figure: Figure) -> bytes:
    """The bytes of a figure's PNG file."""
    FigureCanvasAgg(figure)
    out = io.BytesIO()
    figure.savefig(out, format="png", facecolor="white")
    return out.getvalue()
