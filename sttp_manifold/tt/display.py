"""How plans, values and tables look: in a terminal as text, in a notebook as HTML with SVG.

Strings only, no plotting library. Two colours are readable on light and dark pages, everything else
is drawn in the colour of the text around it. A core is a triangle that points to the centre, the
side on which its unfolding is orthonormal; it is hollow where that unfolding is square, so that the
core has no parameters of its own and is merged into its neighbour.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from itertools import pairwise
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from sttp_manifold.tt.shape import TTShape
    from sttp_manifold.tt.spectral import SpectralTT

__all__ = [
    "box_html",
    "descent_svg",
    "diagram_svg",
    "diagram_text",
    "plan_html",
    "spectrum_svg",
    "spectrum_text",
    "table_html",
    "value_html",
    "value_text",
]

# Blue and orange of middling lightness: contrast above 3 against both white and near-black.
_ROWS, _COLUMNS = "#3f83c8", "#c96a1b"
_BLOCKS = "▁▂▃▄▅▆▇█"
# In a terminal a line ends somewhere: longer sides lose their middle.
_SIDE, _OUTER, _INNER = 8, 3, 4
_BARS, _CURVES = 32, 16
_FONT = "font-family='system-ui, sans-serif' font-size='12'"


def _absorbed(plan: TTShape) -> list[bool]:
    """For each core, whether it is square and has an inner neighbour that can absorb it."""
    inner = (len(plan.out_modes) - 1, len(plan.out_modes))
    return [d == r and k not in inner for k, (d, r) in enumerate(plan.frame_shapes)]


# -- text -----------------------------------------------------------------------------------------


def _shown(cores: range, head: int, tail: int) -> list[int | None]:
    """The cores of a side that are drawn as text; None stands for those left out."""
    return list(cores) if len(cores) <= _SIDE else [*cores[:head], None, *cores[-tail:]]


def diagram_text(plan: TTShape, *, full: bool = False) -> str:
    """Tensor diagram of a plan for the terminal: modes of the rows above, of the columns below.

    Args:
        plan: the plan; its own chain is drawn.
        full: whether the centre is a full bond, a square instead of a diamond.

    Example:
        >>> from sttp_manifold import TTShape
        >>> print(diagram_text(TTShape((12, 2), (2, 15), rank=4)))
        12  2
        │   │
        ▶─4─▶─4─◆─4─◀─4─◀
                    │   │
                    2   15
    """
    modes, centre, absorbed = plan.out_modes + plan.in_modes, len(plan.out_modes), _absorbed(plan)
    items = [*_shown(range(centre), _OUTER, _INNER), -1]
    items += _shown(range(centre, len(modes)), _INNER, _OUTER)
    chain, labels, legs = "", ["", ""], ["", ""]
    for item, following in pairwise([*items, len(modes)]):
        if item is None:
            assert following is not None
            chain += f"⋯─{plan.ranks[following]}─"
        elif item < 0:
            chain += f"{'■' if full else '◆'}─{plan.rank}─"
        else:
            side = int(item >= centre)
            chain = chain.ljust(len(labels[side]) + 1 if labels[side] else 0, "─")
            labels[side] = labels[side].ljust(len(chain)) + str(modes[item])
            legs[side] = legs[side].ljust(len(chain)) + "│"
            chain += "▶▷◀◁"[2 * side + absorbed[item]] + f"─{plan.ranks[item + 1]}─"
    chain = chain.removesuffix("─1─")
    return "\n".join((labels[0], legs[0], chain, legs[1], labels[1]))


def spectrum_text(values: Tensor) -> str:
    """Singular values as a row of blocks, scaled to the largest, and the ends of their range.

    Args:
        values: singular values, descending.

    Shape:
        - values: ``(r,)``

    Example:
        >>> import torch
        >>> spectrum_text(torch.tensor([4.0, 2.0, 1.0]))
        '█▄▂  4 to 1'
    """
    numbers = _numbers(values)
    if not numbers:
        return "none"
    if not all(map(math.isfinite, numbers)):
        return "not finite"
    top = max(numbers) or 1.0
    heights = [max(0, math.ceil(8 * s / top) - 1) for s in numbers[:_BARS]]
    more = "…" if len(numbers) > _BARS else ""
    return f"{''.join(_BLOCKS[h] for h in heights)}{more}  {numbers[0]:.4g} to {numbers[-1]:.4g}"


def value_text(tt: SpectralTT) -> str:
    """A weight for the terminal: diagram of its stored chain, spectrum, counts."""
    plan = tt.shape
    lines = [_title(tt), *diagram_text(plan.merged, full=tt.is_full).split("\n")]
    if not tt.batch_shape:
        lines.append(f"singular values  {_spectrum_of(tt)}")
    lines.append(f"dimension {_dim(tt):,}, dense {plan.numel:,}")
    return "\n".join(line.rstrip() for line in lines)


def _spectrum_of(tt: SpectralTT) -> str:
    return "on the meta device" if tt.spectrum.is_meta else spectrum_text(_values(tt))


def _title(tt: SpectralTT) -> str:
    batch = f"batch {tuple(tt.batch_shape)} of " if tt.batch_shape else ""
    dtype = str(tt.dtype).removeprefix("torch.")
    return (
        f"{type(tt).__name__}: {batch}{tt.shape.d_out} x {tt.shape.d_in}, rank {tt.shape.rank}"
        f"{', full bond' if tt.is_full else ''}, {dtype} on {tt.device}"
    )


def _dim(tt: SpectralTT) -> int:
    return tt.shape.dim("full" if tt.is_full else "free")


def _values(tt: SpectralTT) -> Tensor:
    """Singular values, NaN where the weight is not finite: LAPACK may refuse those."""
    tt = tt.detach()
    if tt.is_full and not bool(tt.spectrum.isfinite().all()):
        return tt.spectrum[..., 0] * math.nan
    return tt.singular_values()


def _numbers(values: Tensor) -> list[float]:
    return [float(s) for s in values.detach().double().cpu().flatten()]


# -- HTML -----------------------------------------------------------------------------------------


def _svg(width: float, height: float, label: str, parts: Iterable[str]) -> str:
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' role='img' width='{width:.0f}' "
        f"height='{height:.0f}' viewBox='0 0 {width:.0f} {height:.0f}' {_FONT} "
        f"fill='currentColor' style='max-width:none'><title>{escape(label)}</title>"
        f"{''.join(parts)}</svg>"
    )


def _text(x: float, y: float, text: str, style: str = "") -> str:
    return f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='middle' {style}>{escape(text)}</text>"


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float) -> str:
    return (
        f"<line x1='{x1:.1f}' y1='{y1:.1f}' x2='{x2:.1f}' y2='{y2:.1f}' stroke='{colour}' "
        f"stroke-width='{width:.1f}'/>"
    )


def diagram_svg(plan: TTShape, *, full: bool = False) -> str:
    """Tensor diagram of a plan as SVG: cores, modes at their legs, ranks at bonds of that weight.

    Args:
        plan: the plan; its own chain is drawn.
        full: whether the centre is a full bond.
    """
    modes, centre, absorbed = plan.out_modes + plan.in_modes, len(plan.out_modes), _absorbed(plan)
    step, y, half = 41.0, 62.0, 8.0
    # The centre takes a place of its own between the two sides.
    places = [24 + step * (k + (k >= centre)) for k in range(len(modes))]
    middle = 24 + step * centre
    nodes = [*places[:centre], middle, *places[centre:]]
    ranks = [*plan.ranks[1 : centre + 1], *plan.ranks[centre:-1]]
    parts = []
    for a, b, rank in zip(nodes, nodes[1:], ranks, strict=False):
        width = 1 + math.log2(rank) / 2
        parts.append(_line(a + half, y, b - half, y, "currentColor", width))
        parts.append(_text((a + b) / 2, y - 9, str(rank), "fill-opacity='0.75' font-size='11'"))
    for k, (x, mode) in enumerate(zip(places, modes, strict=True)):
        left = k < centre
        colour, up = (_ROWS, -1) if left else (_COLUMNS, 1)
        end = y + up * 34
        parts.append(_line(x, y + up * half / 2, x, end, colour, 1.6))
        parts.append(_text(x, end - 6 if left else end + 15, str(mode)))
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
    return _svg(nodes[-1] + 24, 126, f"Tensor diagram: modes {plan}", parts)


def spectrum_svg(values: Tensor) -> str:
    """Singular values against their index as SVG, from zero to the largest.

    Args:
        values: singular values, descending; a batch is drawn as one curve for each of the first
            sixteen.

    Shape:
        - values: ``(*b, r)``
    """
    width, height, left, bottom, top = 260.0, 126.0, 46.0, 22.0, 14.0
    curves = [_numbers(row) for row in values.reshape(-1, values.shape[-1])[:_CURVES]]
    finite = [s for curve in curves for s in curve if math.isfinite(s)]
    highest, count = max(finite, default=0.0) or 1.0, max(values.shape[-1], 1)

    def at(k: int, s: float) -> tuple[float, float]:
        x = left + (width - left - 12) * ((k + 0.5) / count)
        return x, height - bottom - (height - bottom - top) * s / highest

    base = height - bottom
    parts = [
        _line(left, base, width - 8, base, "currentColor", 0.8),
        _line(left, base, left, top - 4, "currentColor", 0.8),
        f"<text x='{left - 6}' y='{top + 4}' text-anchor='end'>{highest:.3g}</text>",
        f"<text x='{left - 6}' y='{base + 4}' text-anchor='end'>0</text>",
        _text((left + width) / 2, height - 5, f"singular values 1 to {values.shape[-1]}"),
    ]
    for curve in curves:
        points = [at(k, s) for k, s in enumerate(curve) if math.isfinite(s)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(
            f"<polyline points='{path}' fill='none' stroke='{_ROWS}' stroke-width='1.4' "
            "stroke-opacity='0.7'/>"
        )
        if len(curves) == 1 and len(points) <= 64:
            parts += [
                f"<circle cx='{x:.1f}' cy='{y:.1f}' r='2.6' fill='{_ROWS}'/>" for x, y in points
            ]
    return _svg(width, height, f"Singular values, the largest {highest:.3g}", parts)


def descent_svg(values: Sequence[float], label: str) -> str:
    """A quantity that falls over iterations as SVG, its logarithm against the index from zero.

    Args:
        values: one for each iterate; those that are not positive and finite are left out.
        label: what they are.

    Example:
        >>> "1e-08" in descent_svg([1.0, 1e-2, 1e-8], "gradient norm")
        True
    """
    points = [(k, v) for k, v in enumerate(values) if 0 < v < math.inf]
    if not points:
        return ""
    width, height, left, bottom, top = 260.0, 126.0, 46.0, 22.0, 14.0
    low, high = (f(v for _, v in points) for f in (min, max))
    last = max(len(values) - 1, 1)
    base, right = height - bottom, width - 12
    span = math.log(high / low) or 1.0

    def at(k: int, v: float) -> str:
        x, y = (right - left) * k / last, (base - top) * math.log(v / low) / span
        return f"{left + x:.1f},{base - y:.1f}"

    path = " ".join(at(k, v) for k, v in points)
    parts = [
        _line(left, base, width - 8, base, "currentColor", 0.8),
        _line(left, base, left, top - 4, "currentColor", 0.8),
        f"<text x='{left - 6}' y='{top + 4}' text-anchor='end'>{high:.0e}</text>",
        f"<text x='{left - 6}' y='{base + 4}' text-anchor='end'>{low:.0e}</text>",
        _text((left + width) / 2, height - 5, f"{label}, iterations 0 to {len(values) - 1}"),
        f"<polyline points='{path}' fill='none' stroke='{_ROWS}' stroke-width='1.4'/>",
    ]
    return _svg(width, height, f"{label}, from {points[0][1]:.3g} to {points[-1][1]:.3g}", parts)


def table_html(
    headers: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    right: Iterable[int] = (),
    wrap: Iterable[int] = (),
    bold: Iterable[int] = (),
) -> str:
    """A table as HTML, in the page's own colours; every cell is escaped.

    Args:
        headers: titles of the columns.
        rows: cells of each row.
        right: columns that are aligned to the right, as numbers are.
        wrap: columns whose cells may take several lines.
        bold: rows that stand out; negative ones count from the end.

    Example:
        >>> "&lt;b&gt;" in table_html(["name"], [["<b>"]])
        True
    """
    lines = [tuple(row) for row in rows]
    strong = {k % len(lines) for k in bold} if lines else set()
    aligned, wrapped = set(right), set(wrap)

    def cell(tag: str, column: int, text: str, weight: str = "") -> str:
        side = "right" if column in aligned else "left"
        space = "normal;min-width:10em" if column in wrapped else "nowrap"
        style = f"text-align:{side};padding:2px 10px;white-space:{space};{weight}"
        return f"<{tag} style='{style}'>{escape(str(text))}</{tag}>"

    head = "".join(cell("th", c, title) for c, title in enumerate(headers))
    body = "".join(
        "<tr>"
        + "".join(cell("td", c, t, "font-weight:600" * (k in strong)) for c, t in enumerate(line))
        + "</tr>"
        for k, line in enumerate(lines)
    )
    return (
        "<table style='border-collapse:collapse;color:inherit;background:none'>"
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    )


def box_html(*parts: str) -> str:
    """Parts one below the other; what is too wide scrolls by itself."""
    inner = "".join(f"<div style='overflow-x:auto'>{part}</div>" for part in parts)
    return f"<div class='sttp-display' style='color:inherit;line-height:1.4'>{inner}</div>"


def plan_html(plan: TTShape) -> str:
    """A plan for a notebook: its diagram, and its counts for each spectrum."""
    rows = [
        (name, f"{plan.dim(name):,}", f"{plan.num_parameters(name):,}", f"{plan.numel:,}")
        for name in ("free", "identity")
    ]
    counts = table_html(
        ("spectrum", "dimension", "stored by a chart", "dense"), rows, right=(1, 2, 3)
    )
    title = f"<b>TTShape</b> {plan.d_out} x {plan.d_in}, rank {plan.rank}"
    return box_html(title, diagram_svg(plan), counts)


def value_html(tt: SpectralTT) -> str:
    """A weight for a notebook: diagram of its stored chain, spectrum, counts."""
    name, _, rest = _title(tt).partition(":")
    drawing = diagram_svg(tt.shape.merged, full=tt.is_full)
    if not tt.spectrum.is_meta and tt.spectrum.numel():
        drawing += spectrum_svg(_values(tt))
    counts = f"dimension {_dim(tt):,}, dense {tt.shape.numel:,}, modes {tt.shape}"
    return box_html(
        f"<b>{escape(name)}</b>{escape(rest)}",
        f"<div style='white-space:nowrap'>{drawing}</div>",
        f"<small>{escape(counts)}</small>",
    )
