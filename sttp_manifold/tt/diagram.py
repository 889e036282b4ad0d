"""Tensor diagrams of modes and ranks, as text for a terminal and as SVG for a notebook.

A core is a triangle that points to the centre, the side on which its unfolding is orthonormal; it
is hollow where that unfolding is square, so that the core has no parameters of its own and is
merged into its neighbour.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from sttp_manifold.display import BLUE, ORANGE, svg_box, svg_line, svg_text

__all__ = ["diagram_svg", "diagram_text"]

# In a terminal a line ends somewhere: longer sides lose their middle.
_SIDE, _OUTER, _INNER = 8, 3, 4


def _absorbed(centre: int, modes: Sequence[int], ranks: Sequence[int]) -> list[bool]:
    """For each core, whether it is square and has an inner neighbour that can absorb it."""
    square = [
        a * n == b if k < centre else n * b == a
        for k, (a, n, b) in enumerate(zip(ranks[:-1], modes, ranks[1:], strict=True))
    ]
    return [is_square and k not in (centre - 1, centre) for k, is_square in enumerate(square)]


def _shown(cores: range, head: int, tail: int) -> list[int | None]:
    """The cores of a side that are drawn as text; None stands for those left out."""
    return list(cores) if len(cores) <= _SIDE else [*cores[:head], None, *cores[-tail:]]


def diagram_text(
    out_modes: Sequence[int], in_modes: Sequence[int], ranks: Sequence[int], *, full: bool = False
) -> str:
    """Tensor diagram for the terminal: modes of the rows above, of the columns below.

    Args:
        out_modes: modes of the rows, outermost first.
        in_modes: modes of the columns, from the centre outwards.
        ranks: ranks of all bonds, the outer two of which are 1.
        full: whether the centre is a full bond, a square instead of a diamond.

    Example:
        >>> print(diagram_text((12, 2), (2, 15), (1, 4, 4, 4, 1)))
        12  2
        │   │
        ▶─4─▶─4─◆─4─◀─4─◀
                    │   │
                    2   15
    """
    modes, centre = (*out_modes, *in_modes), len(out_modes)
    absorbed = _absorbed(centre, modes, ranks)
    items = [*_shown(range(centre), _OUTER, _INNER), -1]
    items += _shown(range(centre, len(modes)), _INNER, _OUTER)
    chain, labels, legs = "", ["", ""], ["", ""]
    for item, following in pairwise([*items, len(modes)]):
        if item is None:
            assert following is not None
            chain += f"⋯─{ranks[following]}─"
        elif item < 0:
            chain += f"{'■' if full else '◆'}─{ranks[centre]}─"
        else:
            side = int(item >= centre)
            chain = chain.ljust(len(labels[side]) + 1 if labels[side] else 0, "─")
            labels[side] = labels[side].ljust(len(chain)) + str(modes[item])
            legs[side] = legs[side].ljust(len(chain)) + "│"
            chain += "▶▷◀◁"[2 * side + absorbed[item]] + f"─{ranks[item + 1]}─"
    chain = chain.removesuffix("─1─")
    return "\n".join((labels[0], legs[0], chain, legs[1], labels[1]))


def diagram_svg(
    out_modes: Sequence[int], in_modes: Sequence[int], ranks: Sequence[int], *, full: bool = False
) -> str:
    """Tensor diagram as SVG: cores, modes at their legs, ranks at bonds of that weight.

    Args:
        out_modes: modes of the rows, outermost first.
        in_modes: modes of the columns, from the centre outwards.
        ranks: ranks of all bonds, the outer two of which are 1.
        full: whether the centre is a full bond.
    """
    modes, centre = (*out_modes, *in_modes), len(out_modes)
    absorbed = _absorbed(centre, modes, ranks)
    step, y, half = 41.0, 62.0, 8.0
    # The centre takes a place of its own between the two sides.
    places = [24 + step * (k + (k >= centre)) for k in range(len(modes))]
    middle = 24 + step * centre
    nodes = [*places[:centre], middle, *places[centre:]]
    bonds = [*ranks[1 : centre + 1], *ranks[centre:-1]]
    parts = []
    for a, b, rank in zip(nodes, nodes[1:], bonds, strict=False):
        width = 1 + math.log2(rank) / 2
        parts.append(svg_line(a + half, y, b - half, y, "currentColor", width))
        parts.append(svg_text((a + b) / 2, y - 9, str(rank), "fill-opacity='0.75' font-size='11'"))
    for k, (x, mode) in enumerate(zip(places, modes, strict=True)):
        left = k < centre
        colour, up = (BLUE, -1) if left else (ORANGE, 1)
        end = y + up * 34
        parts.append(svg_line(x, y + up * half / 2, x, end, colour, 1.6))
        parts.append(svg_text(x, end - 6 if left else end + 15, str(mode)))
        tip, back = (x + half, x - half) if left else (x - half, x + half)
        fill = "none" if absorbed[k] else colour
        parts.append(
            f"<path d='M{back:.1f} {y - half:.1f}L{tip:.1f} {y:.1f}L{back:.1f} {y + half:.1f}Z' "
            f"fill='{fill}' stroke='{colour}' stroke-width='1.6'/>"
        )
    s = 7.0
    shape = f"M{middle - s} {y}L{middle} {y - s}L{middle + s} {y}L{middle} {y + s}Z"
    if full:
        shape = f"M{middle - s} {y - s}h{2 * s}v{2 * s}h{-2 * s}Z"
    parts.append(f"<path d='{shape}'/>")
    rows, columns = ("·".join(map(str, modes)) for modes in (out_modes, in_modes))
    title = f"Tensor diagram: modes {rows} | {columns}, ranks {'-'.join(map(str, ranks))}"
    return svg_box(nodes[-1] + 24, 126, title, parts)
