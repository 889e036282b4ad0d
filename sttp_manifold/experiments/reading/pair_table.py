"""Row beats column by: the paired differences of all methods at one rank, as a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

from sttp_manifold.experiments.reading.paired import LEVEL, Paired
from sttp_manifold.experiments.reading.result_table import Row, show_spread
from sttp_manifold.experiments.task import Metric

__all__ = ["Lead", "PairTable", "lead", "lead_of", "pair_note", "pair_tables"]

_LARGEST_EXPONENT = 300
_MOST_DIGITS = 4
_SHADE = "rgba(0,114,178,.13)"


class Lead(NamedTuple):
    """By how much one method beats another, as text.

    Attributes:
        mean: with its sign, more where the first is better: ``+1.2``, or a factor, ``×2.3``.
        reach: half the width of the 95 % interval: ``± 0.8``, or ``×÷ 1.5``.
        ahead: whether the first is the better one in the mean.
        apart: whether the interval leaves out no difference at all.
        unit: ``points``, the unit of the metric, or nothing.
    """

    mean: str
    reach: str
    ahead: bool
    apart: bool
    unit: str

    def __str__(self) -> str:
        return f"{self.mean} {self.reach}"

    @property
    def amount(self) -> str:
        """The lead in a sentence, without its sign."""
        text = f"{self.mean.lstrip('+-−')} {self.reach}"
        return f"{text} {self.unit}" if self.unit else text


def lead(first: Row, second: Row, metric: Metric) -> Lead | None:
    """By how much a row beats another on the seeds that both have; None where they share no two."""
    found = first.against(second)
    return None if found is None else lead_of(found, metric, first.resolution)


def lead_of(found: Paired, metric: Metric, resolution: float | None = None) -> Lead:
    """A paired difference as text.

    Args:
        found: of values, or of logarithms where the metric is logarithmic.
        metric: what the values are.
        resolution: the least difference that two values can have; None where there is none.
    """
    mean, reach = found.mean if metric.higher else -found.mean, (found.high - found.low) / 2
    if metric.log:
        return Lead(f"×{_power(mean)}", f"×÷ {_power(reach)}", mean > 0, found.apart, "")
    spec = metric.spec
    if resolution is not None:
        # Much finer than one test example is more than a score can say.
        digits = math.ceil(-math.log10(max(resolution, 10.0**-_MOST_DIGITS)))
        spec = f".{max(1, digits)}f"
    sign = "−" if mean < 0 else "+"
    unit = "points" if metric.unit == "%" else metric.unit
    return Lead(f"{sign}{abs(mean):{spec}}", f"± {reach:{spec}}", mean > 0, found.apart, unit)


def _power(exponent: float) -> str:
    if abs(exponent) > _LARGEST_EXPONENT:
        return f"1e{exponent:+.0f}"
    return f"{10**exponent:.2g}"


@dataclass(frozen=True)
class PairTable:
    """All methods of one rank against each other, the best mean first.

    Attributes:
        rank: of the methods.
        metric: what they are judged by.
        methods: their names.
        scores: mean and spread of each, as text.
        leads: for each method, by how much it beats each that comes after it; None where the two
            share fewer than two seeds.
    """

    rank: int
    metric: Metric
    methods: Sequence[str]
    scores: Sequence[str]
    leads: Sequence[Sequence[Lead | None]]

    @property
    def name(self) -> str:
        """Title of the table."""
        unit = next((f" ({x.unit})" for line in self.leads for x in line if x and x.unit), "")
        return f"Rank {self.rank}: row beats column by{unit}"

    @property
    def titles(self) -> list[str]:
        """Of the columns. A method is a number there, so that a dozen find room."""
        unit = f" ({self.metric.unit})" if self.metric.unit else ""
        columns = map(str, range(2, len(self.methods) + 1))
        return ["", "method", f"test {self.metric.name}{unit}", *columns]

    def lines(self, apart: str = "{} *", other: str = "{}") -> list[list[str]]:
        """Cells of each row as text.

        Args:
            apart: form of a difference that is told apart.
            other: form of one that is not.
        """

        def text(found: Lead | None) -> str:
            return "-" if found is None else (apart if found.apart else other).format(found)

        return [
            [str(k + 1), name, score, *[""] * k, *map(text, line)]
            for k, (name, score, line) in enumerate(
                zip(self.methods, self.scores, self.leads, strict=True)
            )
        ]

    def to_html(self) -> str:
        """The table, in the page's own colours; every text is escaped."""
        style = "padding:2px 8px;white-space:nowrap;line-height:1.25"

        def cell(text: str, side: str = "right") -> str:
            return f"<td style='{style};text-align:{side}'>{text}</td>"

        def pair(found: Lead | None) -> str:
            if found is None:
                return cell("-")
            shown = f"{escape(found.mean)}<br/><small>{escape(found.reach)}</small>"
            if not found.apart:
                return f"<td style='{style};text-align:right;opacity:.75'>{shown}</td>"
            return f"<td style='{style};text-align:right;background:{_SHADE}'><b>{shown}</b></td>"

        names = [None, None, None, *self.methods[1:]]
        head = "".join(
            f"<th style='{style};text-align:{'left' if title == 'method' else 'right'}'"
            + (f" title='{escape(name)}'" if name else "")
            + f">{escape(title)}</th>"
            for title, name in zip(self.titles, names, strict=True)
        )
        body = "".join(
            f"<tr>{cell(str(k + 1))}{cell(escape(name), 'left')}{cell(escape(score))}"
            + cell("") * k
            + "".join(map(pair, line))
            + "</tr>"
            for k, (name, score, line) in enumerate(
                zip(self.methods, self.scores, self.leads, strict=True)
            )
        )
        return (
            "<table style='border-collapse:collapse;color:inherit;background:none'>"
            f"<caption style='text-align:left;color:inherit;padding:4px 8px'>{escape(self.name)}"
            f"</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        )


def pair_tables(table: Sequence[Row], metric: Metric) -> list[PairTable]:
    """One table for each rank at which two methods share two seeds."""
    found = []
    for rank in dict.fromkeys(row.rank for row in table):
        here = [row for row in table if row.rank == rank and row.scored and row.test]
        here.sort(key=lambda row: row.mean, reverse=metric.higher)
        leads = [[lead(a, b, metric) for b in here[k + 1 :]] for k, a in enumerate(here)]
        if any(one is not None for line in leads for one in line):
            names = [row.method for row in here]
            scores = [show_spread(metric, list(row.test.values())) for row in here]
            found.append(PairTable(rank, metric, names, scores, leads))
    return found


def pair_note(tables: Sequence[PairTable], table: Sequence[Row]) -> str:
    """How to read :func:`pair_tables`."""
    if not tables:
        return ""
    metric = tables[0].metric
    pairs = sum(one is not None for t in tables for line in t.leads for one in line)
    text = (
        f"Mean over the seeds that both have of the difference in test {metric.name}, ± half the "
        f"width of its {100 * LEVEL:.0f} % interval (Student's); "
    )
    if metric.log:
        text = (
            f"Geometric mean over the seeds that both have of the factor in test {metric.name}, "
            f"×÷ the factor that its {100 * LEVEL:.0f} % interval (Student's, of logarithms) "
            "reaches to each side; "
        )
    text += (
        "best mean first, columns by the numbers of the rows. Bold, or starred, where the interval "
        f"leaves out {'the factor 1' if metric.log else 'zero'}: these two are told apart, all "
        "others are not. Each interval speaks for itself alone: if none of the methods differed, "
        f"about {(1 - LEVEL) * pairs:.0f} of these {pairs} pairs would be told apart by chance."
    )
    resolution = next((row.resolution for row in table if row.resolution), None)
    if resolution is not None:
        text += (
            " Where a difference is the same on every seed, one test example "
            f"({resolution:.2g} points) stands for the half width."
        )
    return text
