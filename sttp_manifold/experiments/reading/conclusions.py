"""What a comparison says, in sentences made from its records, and no more than they allow."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from sttp_manifold.experiments.reading.effort_table import say_efforts
from sttp_manifold.experiments.reading.frontier import frontiers, say_frontier
from sttp_manifold.experiments.reading.gan_table import say_gans
from sttp_manifold.experiments.reading.pair_table import lead
from sttp_manifold.experiments.reading.result_table import Row, metric_of, rows, show_spread
from sttp_manifold.experiments.reading.style import OPTIMIZER_NAMES
from sttp_manifold.experiments.records import Record
from sttp_manifold.experiments.task import SEED_DRAWS, Metric

__all__ = ["conclude", "reservations"]

_SETS = {"svdp": "SVDP", "sttp": "STTP"}
_MOST_RANKS = 3
_MOST_NAMES = 3


def conclude(records: Sequence[Record]) -> list[str]:
    """What the records say: at most three sentences on scores, then those on GANs and on solving.

    The three: which method is best, which way of holding one set of weights is ahead, and how far
    the small sets are behind; of a frontier (three ranks and more), whether STTP leads SVDP at
    equal compression takes the place of the first. Two methods count as told apart when the 95 %
    interval of their mean difference, seed by seed, leaves out zero; the table of all pairs is
    :func:`~sttp_manifold.experiments.reading.pair_table.pair_tables`.
    """
    metric = metric_of(records)
    # Solvers stop at a target: there is no best one by how far beyond it they fall.
    table = [row for row in rows(records) if row.scored and row.test]
    said = [_best(table, metric), _held_two_ways(table, metric), _sets(table, metric)]
    compared = say_frontier(frontiers(records), metric)
    if compared:
        # Where there is a frontier, it is what the comparison is for; dense is best by far.
        said = [*compared, said[2], said[1] or said[0]]
    return [sentence for sentence in said if sentence] + say_gans(records) + say_efforts(records)


def reservations(records: Sequence[Record], note: Mapping[str, Any]) -> list[str]:
    """What to bear in mind with the results: what is missing, untuned, or too coarse to tell."""
    metric, table = metric_of(records), rows(records)
    said = []
    missing = len(note["hashes"]) - len(records)
    if missing:
        said.append(f"{missing} of the {len(note['hashes'])} runs of this comparison are not done.")
    absent = note.get("left_out") or {}
    if absent:
        names = ", ".join(f"{name} (needs {package})" for name, package in absent.items())
        said.append(f"Left out, since a package is not installed: {names}.")
    for word in ("diverged", "failed"):
        rows_hit = [row for row in table if getattr(row, word)]
        if rows_hit:
            names = ", ".join(
                f"{row.method} at rank {row.rank} ({getattr(row, word)} of {row.runs})"
                for row in rows_hit
            )
            said.append(f"Some runs {word}: {names}. The numbers of those methods leave them out.")
    untuned = sorted({row.method for row in table if row.lr_source == "untuned"})
    if untuned:
        said.append(
            f"Learning rates were not tuned for {', '.join(untuned)} here: no conclusion about "
            "these is fair until they are, by `--tune`."
        )
    given = sorted({row.method for row in table if row.lr_source == "given"})
    if given:
        said.append(f"Learning rates were given by hand, not tuned, for {', '.join(given)}.")
    tuned = note["tuned"]
    edge = [name for name, found in tuned.items() if found["at_edge"]]
    if edge:
        said.append(
            f"The tuned learning rate lies at the edge of the grid for {', '.join(edge)}: a better "
            "one may lie beyond."
        )
    said += _other_lengths(records, tuned)
    seeds = {record["spec"]["seed"] for record in records}
    if len(seeds) < 2:
        said.append("One seed shows no spread: no two methods are told apart here.")
    else:
        said.append(
            f"The spread is over {len(seeds)} seeds, which draw "
            f"{note.get('seed_draws', SEED_DRAWS)}."
        )
    values = [row.mean for row in table if row.test]
    size = records[0]["examples"]["test"]
    if metric.unit == "%" and values and size:
        p = min(max(statistics.fmean(values) / 100, 0.0), 1.0)
        error = 100 * math.sqrt(p * (1 - p) / size)
        said.append(
            f"The test split has {size:,} examples: one is worth {100 / size:.2f} points, and the "
            f"sampling error of an accuracy near {100 * p:.0f} % is about {error:.1f} points, the "
            "same for all methods, since they share the split."
        )
    return said


def _other_lengths(records: Sequence[Record], tuned: Mapping[str, Any]) -> list[str]:
    """Learning rates that were tuned for another length of training than they are used for."""
    said = []
    units = {"epochs": "epochs", "evaluations": "max_evaluations", "steps": "steps"}
    for unit, name in units.items():
        specs: list[dict[str, Any]] = [
            {**r["spec"].get("options", {}), **r["spec"]} for r in records
        ]
        lengths: set[Any] = {spec.get(name) for spec in specs} - {None}
        before = {found.get(name) for found in tuned.values()} - {None} - lengths
        if before and lengths:
            said.append(
                f"Learning rates were tuned for {', '.join(map(str, sorted(before)))} {unit} and "
                f"used for {', '.join(map(str, sorted(lengths)))}."
            )
    return said


def _ranks(table: Sequence[Row]) -> list[list[Row]]:
    """Rows by rank; of many ranks the least, one between, and the greatest."""
    ranks = sorted({row.rank for row in table})
    if len(ranks) > _MOST_RANKS:
        ranks = [ranks[0], ranks[len(ranks) // 2], ranks[-1]]
    return [[row for row in table if row.rank == rank] for rank in ranks]


def _listed(names: Sequence[str], mark: str = ", ") -> str:
    if len(names) <= _MOST_NAMES:
        return mark.join(names)
    left = len(names) - _MOST_NAMES + 1
    return f"{mark.join(names[: _MOST_NAMES - 1])} and {left} others"


def _best(table: Sequence[Row], metric: Metric) -> str:
    parts = []
    for here in _ranks(table):
        best, *rest = sorted(here, key=lambda row: row.mean, reverse=metric.higher)
        unit = f" {metric.unit}" if metric.unit else ""
        text = f"at rank {best.rank} {best.method}, {show_spread(metric, list(best.test.values()))}"
        close = [row.method for row in rest if not best.apart_from(row)]
        if not rest:
            after = "the only method that finished"
        elif len(best.test) < 2:
            after = "on one seed"
        elif close:
            after = f"not told apart from {_listed(close)}"
        else:
            after = "apart from all others"
        parts.append(f"{text}{unit}, {after}")
    adjective = "Highest" if metric.higher else "Lowest"
    return f"{adjective} mean test {metric.name}: {'; '.join(parts)}." if parts else ""


def _held_two_ways(table: Sequence[Row], metric: Metric) -> str:
    """Chart against manifold: the same set of weights and optimizer, held in two ways."""
    ahead: dict[str, list[str]] = {"the manifold": [], "the chart": []}
    count = 0
    for here in _ranks(table):
        found = {(row.kind, row.optimizer, row.parameterization): row for row in here}
        for kind, optimizer in dict.fromkeys((row.kind, row.optimizer) for row in here):
            chart = found.get((kind, optimizer, "householder"))
            point = found.get((kind, optimizer, "riemannian"))
            by = lead(point, chart, metric) if chart and point else None
            if not chart or not point or by is None:
                continue
            count += 1
            if by.apart:
                forward = by if by.ahead else lead(chart, point, metric)
                assert forward is not None
                name = f"{_SETS.get(kind, kind)} by {OPTIMIZER_NAMES.get(optimizer, optimizer)}"
                ahead["the manifold" if by.ahead else "the chart"].append(
                    f"{name} at rank {chart.rank} by {forward.amount}"
                )
    if not count:
        return ""
    start = "Chart or manifold, where one set of weights has one optimizer on both: "
    parts = [
        f"{who} is ahead in {len(won)} ({_listed(won, '; ')})" for who, won in ahead.items() if won
    ]
    left = count - sum(map(len, ahead.values()))
    if not parts:
        pairs = "the one pair is not" if count == 1 else f"none of the {count} pairs is"
        return f"{start}{pairs} told apart."
    if left:
        parts.append(f"{left} {'is' if left == 1 else 'are'} not told apart")
    return f"{start}of {count} pair{'s' * (count > 1)}, {', '.join(parts)}."


def _sets(table: Sequence[Row], metric: Metric) -> str:
    """Best of each set of weights against dense, since sets differ in size."""
    parts = []
    for here in _ranks(table):
        best: dict[str, Row] = {}
        for row in here:
            if row.kind not in best or metric.better(row.mean, best[row.kind].mean):
                best[row.kind] = row
        dense = best.get("dense")
        said = []
        for kind, name in _SETS.items():
            small = best.get(kind)
            if small is None or dense is None or not dense.dimension:
                continue
            by = lead(dense, small, metric)
            if by is None:
                continue
            share = f"{100 * (small.dimension or 0) / dense.dimension:.2g} % of the dimension"
            if not by.apart:
                outcome = "not told apart"
            elif by.ahead:
                outcome = f"behind by {by.amount}"
            else:
                forward = lead(small, dense, metric)
                assert forward is not None
                outcome = f"ahead by {forward.amount}"
            said.append(f"{name} ({small.method}, {share}) {outcome}")
        if said:
            parts.append(f"at rank {here[0].rank} {', '.join(said)}")
    return f"Best of each set against the best dense method: {'; '.join(parts)}." if parts else ""
