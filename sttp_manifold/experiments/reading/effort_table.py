"""What it took to reach the target: table and sentences, from records only.

Medians over seeds, with the least and the greatest: counts of runs that reached the target only, so
that how many did is always told beside them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sttp_manifold.experiments.records import Record, read_for

__all__ = [
    "NOTE",
    "EffortRow",
    "effort_cells",
    "effort_header",
    "effort_rows",
    "say_efforts",
    "show_range",
    "target_of",
]

NOTE = (
    "Medians over the seeds that reached the target (least to greatest), in calls of the cost "
    "function, iterations, products with the Hessian, and seconds without evaluation. Residual: "
    "geometric mean over all seeds, on the observed entries; test error likewise, on entries never "
    "shown. An iteration is not one unit of work: one of trust regions holds many products, each "
    "about as dear as a gradient or two."
)

# A fit of what is seen is no recovery of what is not.
_RECOVERED = 1e-6


@dataclass(frozen=True)
class EffortRow:
    """One method at one rank, over its seeds; runs that ended in an error are left out.

    Attributes:
        method: name of the method.
        rank: of the weights.
        solver: whether it solves rather than trains.
        efforts: by seed.
        tests: test error by seed.
        runs: planned and done, finished or not.
    """

    method: str
    rank: int
    solver: bool
    efforts: dict[int, dict[str, Any]]
    tests: dict[int, float]
    runs: int

    @property
    def reached(self) -> dict[int, dict[str, Any]]:
        """The efforts that met the target, by seed."""
        return {
            seed: effort
            for seed, effort in self.efforts.items()
            if effort["iterations_to_target"] is not None
        }

    def values(self, name: str) -> list[float]:
        """One count of the runs that met the target."""
        return [effort[name] for effort in self.reached.values()]

    def median(self, name: str) -> float:
        """Median of a count; not a number where no run met the target."""
        values = self.values(name)
        return statistics.median(values) if values else math.nan


def target_of(records: Sequence[Record]) -> float | None:
    """The target of the records that have one."""
    return next((r["effort"]["target"] for r in records if r["effort"] is not None), None)


def effort_rows(records: Sequence[Record]) -> list[EffortRow]:
    """Rows in the order of rank, then of the records."""
    groups: dict[tuple[int, str], list[Record]] = {}
    for record in records:
        if record["effort"] is not None:
            key = (record["spec"]["rank"], record["spec"]["method"])
            groups.setdefault(key, []).append(record)
    rows = []
    for rank, method in sorted(groups, key=lambda key: key[0]):
        group = groups[rank, method]
        ok = {r["spec"]["seed"]: r for r in group if r["status"] == "ok"}
        rows.append(
            EffortRow(
                method=method,
                rank=rank,
                solver=read_for(group[0], "effort"),
                efforts={seed: r["effort"] for seed, r in ok.items()},
                tests={seed: r["test_metric"] for seed, r in ok.items()},
                runs=len(group),
            )
        )
    return rows


def show_range(values: Sequence[float], show: Callable[[float], str]) -> str:
    """Median, least and greatest as text."""
    if not values:
        return "-"
    middle = show(statistics.median(values))
    low, high = show(min(values)), show(max(values))
    return middle if low == high else f"{middle} ({low} to {high})"


def effort_header(target: float) -> list[str]:
    """Titles of :func:`effort_cells`."""
    return [
        "rank",
        "method",
        f"reached {target:g}",
        "iterations",
        "evaluations",
        "Hessian products",
        "seconds",
        "final residual",
        "test error",
    ]


def effort_cells(row: EffortRow) -> list[str]:
    """A row as text."""
    residuals = [e["residual"] for e in row.efforts.values() if e["residual"] is not None]
    return [
        str(row.rank),
        row.method,
        f"{len(row.reached)} of {row.runs}",
        show_range(row.values("iterations_to_target"), _count),
        show_range(row.values("evaluations_to_target"), _count),
        show_range(row.values("hessian_products"), _count),
        show_range(row.values("seconds_to_target"), "{:.2f}".format),
        _geometric(residuals),
        _geometric(list(row.tests.values())),
    ]


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _geometric(values: Sequence[float]) -> str:
    if not values:
        return "-"
    return f"{10 ** statistics.fmean(math.log10(max(value, 1e-300)) for value in values):.1e}"


# --- Sentences ---


def say_efforts(records: Sequence[Record]) -> list[str]:
    """What the efforts say, weak results first."""
    table = effort_rows(records)
    if not any(row.solver for row in table):
        return []
    target = target_of(records)
    assert target is not None
    said = _missed(table, target) + _unrecovered(table)
    for rank in dict.fromkeys(row.rank for row in table):
        here = [row for row in table if row.rank == rank and row.solver]
        said += _against_product(here, target) + _least(here, target)
    said.append(
        "Solvers stop at the target: how far below it they end, and so their test errors, are no "
        "order of merit. Times were taken on a machine that runs may have shared."
    )
    return said


def _missed(table: Sequence[EffortRow], target: float) -> list[str]:
    missed = [
        f"{row.method} at rank {row.rank} ({row.runs - len(row.reached)} of {row.runs} runs"
        + (f"; residuals end at {_spread(row)}" if row.efforts else "")
        + ")"
        for row in table
        if len(row.reached) < row.runs
    ]
    if not missed:
        return [f"Every run reached a residual of {target:g} on the observed entries."]
    return [f"Residual {target:g} was not reached within the budget by {'; '.join(missed)}."]


def _spread(row: EffortRow) -> str:
    ends = [
        effort["residual"]
        for seed, effort in row.efforts.items()
        if seed not in row.reached and effort["residual"] is not None
    ]
    if not ends:
        return "nothing finite"
    low, high = f"{min(ends):.1e}", f"{max(ends):.1e}"
    return low if low == high else f"{low} to {high}"


def _unrecovered(table: Sequence[EffortRow]) -> list[str]:
    found = []
    for row in table:
        bad = [seed for seed in row.reached if row.tests[seed] > _RECOVERED]
        if bad:
            found.append(f"{row.method} at rank {row.rank} ({len(bad)} of {len(row.reached)})")
    if not found:
        return []
    return [
        "Some runs fit what they were shown and did not recover the rest (test error above "
        f"{_RECOVERED:g}): {'; '.join(found)}."
    ]


def _against_product(here: Sequence[EffortRow], target: float) -> list[str]:
    """The manifold of fixed TT rank against the product that it is the quotient of."""
    by_name = {row.method: row for row in here}
    said = []
    for algorithm in ("cg", "tr"):
        ours = by_name.get(f"fixed-rank-{algorithm}")
        theirs = by_name.get(f"product-{algorithm}")
        if ours is None or theirs is None:
            continue
        both = sorted(set(ours.reached) & set(theirs.reached))
        counts = f"{len(ours.reached)} and {len(theirs.reached)} of {ours.runs}"
        text = f"Rank {ours.rank}, {ours.method} and {theirs.method} reached {target:g} on {counts}"
        if not both:
            said.append(f"{text} seeds; no seed on which both did.")
            continue
        parts = []
        for noun, name in (
            ("iterations", "iterations_to_target"),
            ("evaluations", "evaluations_to_target"),
            ("Hessian products", "hessian_products"),
            ("time", "seconds_to_target"),
        ):
            if all(row.reached[seed][name] > 0 for row in (ours, theirs) for seed in both):
                ratios = [ours.reached[s][name] / theirs.reached[s][name] for s in both]
                parts.append(f"{show_range(ratios, '{:.2g}'.format)} of the {noun}")
        said.append(
            f"{text} seeds. Seed by seed, where both did, the first took {', '.join(parts)} of the "
            "second."
        )
    return said


def _least(here: Sequence[EffortRow], target: float) -> list[str]:
    whole = [row for row in here if row.reached and len(row.reached) == row.runs]
    if len(whole) < 2:
        return []
    said = []
    for noun, name, show in (
        ("fewest calls of the cost function", "evaluations_to_target", _count),
        ("least time", "seconds_to_target", "{:.2f} s".format),
    ):
        best = min(whole, key=lambda row: row.median(name))
        overlap = [
            row.method
            for row in whole
            if row is not best and min(row.values(name)) <= max(best.values(name))
        ]
        text = (
            f"Rank {best.rank}, among solvers that reached {target:g} on every seed: the {noun} "
            f"has {best.method}, {show_range(best.values(name), show)}"
        )
        if best.runs < 2:
            said.append(f"{text}, on one seed.")
        elif overlap:
            said.append(f"{text}; its range meets that of {', '.join(overlap)}.")
        else:
            said.append(f"{text}, apart from all others on every seed.")
    return said
