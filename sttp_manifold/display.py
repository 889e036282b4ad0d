"""Tables, boxes, bars and curves of numbers and strings: text for a terminal, HTML for a notebook.

Strings only, no plotting library. Two colours are readable on light and dark pages, everything else
is drawn in the colour of the text around it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

__all__ = [
    "BLUE",
    "ORANGE",
    "bars_text",
    "box_html",
    "curves_svg",
    "descent_svg",
    "spread",
    "svg_box",
    "svg_line",
    "svg_text",
    "table_html",
]

# Of middling lightness: contrast above 3 against both white and near-black.
BLUE, ORANGE = "#3f83c8", "#c96a1b"
_BLOCKS = "▁▂▃▄▅▆▇█"
_BARS, _CURVES = 32, 16
_FONT = "font-family='system-ui, sans-serif' font-size='12'"


def bars_text(values: Sequence[float]) -> str:
    """Descending numbers as a row of blocks, scaled to the largest, and the ends of their range.

    Args:
        values: numbers that are not negative, the largest first; of a longer row the first 32 are
            drawn.

    Example:
        >>> bars_text([4.0, 2.0, 1.0])
        '█▄▂  4 to 1'
    """
    if not values:
        return "none"
    if not all(map(math.isfinite, values)):
        return "not finite"
    top = max(values) or 1.0
    heights = [max(0, math.ceil(8 * (v / top)) - 1) for v in values[:_BARS]]
    more = "…" if len(values) > _BARS else ""
    return f"{''.join(_BLOCKS[h] for h in heights)}{more}  {values[0]:.4g} to {values[-1]:.4g}"


def spread(names: Sequence[str], most: int) -> list[str]:
    """Some of many names, evenly from the first to the last; two at the least.

    Example:
        >>> spread("abcdefg", 3)
        ['a', 'd', 'g']
    """
    if len(names) <= most:
        return list(names)
    step = (len(names) - 1) / (most - 1)
    return [names[round(k * step)] for k in range(most)]


def svg_box(width: float, height: float, label: str, parts: Iterable[str]) -> str:
    """A drawing of a size from its parts, with a title for those who do not see it."""
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' role='img' width='{width:.0f}' "
        f"height='{height:.0f}' viewBox='0 0 {width:.0f} {height:.0f}' {_FONT} "
        f"fill='currentColor' style='max-width:none'><title>{escape(label)}</title>"
        f"{''.join(parts)}</svg>"
    )


def svg_text(x: float, y: float, text: str, style: str = "") -> str:
    """Text centred at a point; escaped."""
    return f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='middle' {style}>{escape(text)}</text>"


def svg_line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float) -> str:
    """A straight line between two points."""
    return (
        f"<line x1='{x1:.1f}' y1='{y1:.1f}' x2='{x2:.1f}' y2='{y2:.1f}' stroke='{colour}' "
        f"stroke-width='{width:.1f}'/>"
    )


def curves_svg(curves: Sequence[Sequence[float]], label: str) -> str:
    """Curves of numbers against their index from one as SVG, from zero to the largest.

    Args:
        curves: rows of one length of numbers that are not negative; the first sixteen are drawn,
            without what is not finite.
        label: what the numbers are.

    Example:
        >>> "singular values 1 to 3" in curves_svg([[4.0, 2.0, 1.0]], "singular values")
        True
    """
    width, height, left, bottom, top = 260.0, 126.0, 46.0, 22.0, 14.0
    curves = curves[:_CURVES]
    finite = [s for curve in curves for s in curve if math.isfinite(s)]
    highest, count = max(finite, default=0.0) or 1.0, max((*map(len, curves), 1))

    def at(k: int, s: float) -> tuple[float, float]:
        x = left + (width - left - 12) * ((k + 0.5) / count)
        return x, height - bottom - (height - bottom - top) * (s / highest)

    base = height - bottom
    parts = [
        svg_line(left, base, width - 8, base, "currentColor", 0.8),
        svg_line(left, base, left, top - 4, "currentColor", 0.8),
        f"<text x='{left - 6}' y='{top + 4}' text-anchor='end'>{highest:.3g}</text>",
        f"<text x='{left - 6}' y='{base + 4}' text-anchor='end'>0</text>",
        svg_text((left + width) / 2, height - 5, f"{label} 1 to {count}"),
    ]
    for curve in curves:
        points = [at(k, s) for k, s in enumerate(curve) if math.isfinite(s)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(
            f"<polyline points='{path}' fill='none' stroke='{BLUE}' stroke-width='1.4' "
            "stroke-opacity='0.7'/>"
        )
        if len(curves) == 1 and len(points) <= 64:
            parts += [
                f"<circle cx='{x:.1f}' cy='{y:.1f}' r='2.6' fill='{BLUE}'/>" for x, y in points
            ]
    return svg_box(width, height, f"{label}, the largest {highest:.3g}", parts)


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
    span = math.log(high) - math.log(low) or 1.0

    def at(k: int, v: float) -> str:
        x, y = (right - left) * k / last, (base - top) * (math.log(v) - math.log(low)) / span
        return f"{left + x:.1f},{base - y:.1f}"

    path = " ".join(at(k, v) for k, v in points)
    parts = [
        svg_line(left, base, width - 8, base, "currentColor", 0.8),
        svg_line(left, base, left, top - 4, "currentColor", 0.8),
        f"<text x='{left - 6}' y='{top + 4}' text-anchor='end'>{high:.0e}</text>",
        f"<text x='{left - 6}' y='{base + 4}' text-anchor='end'>{low:.0e}</text>",
        svg_text((left + width) / 2, height - 5, f"{label}, iterations 0 to {len(values) - 1}"),
        f"<polyline points='{path}' fill='none' stroke='{BLUE}' stroke-width='1.4'/>",
    ]
    return svg_box(width, height, f"{label}, from {points[0][1]:.3g} to {points[-1][1]:.3g}", parts)


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
