"""What a comparison says, in sentences made from its records, and no more than they allow."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from sttp_manifold.experiments.reading.effort_table import say_efforts
from sttp_manifold.experiments.reading.result_table import Row, metric_of, rows, show_spread
from sttp_manifold.experiments.records import Record
from sttp_manifold.experiments.task import SEED_DRAWS, Metric

__all__ = ["conclude"]

_NAMES = {"svdp": "SVDP", "sttp": "STTP", "adam": "Adam", "sgd": "SGD", "muon": "Muon"}


def conclude(records: Sequence[Record], note: Mapping[str, Any]) -> list[str]:
    """Sentences, the reservations first.

    Two methods count as told apart when the 95 % interval of their mean difference, seed by seed,
    leaves out zero. Each interval speaks for itself alone: of twenty pairs that do not differ, one
    is told apart by chance, and the sentences say so.
    """
    metric = metric_of(records)
    everything = rows(records)
    said = _reservations(records, everything, note, metric) + say_efforts(records)
    # Solvers stop at a target: there is no best one by how far beyond it they fall.
    table = [row for row in everything if row.scored]
    if not table:
        return said
    for rank in dict.fromkeys(row.rank for row in table):
        here = [row for row in table if row.rank == rank and row.test]
        if here:
            said += _best(here, metric)
        if any(len(row.test) > 1 for row in here):
            said += _held_two_ways(here, metric)
            said += _sets(here, metric)
    said += _times(table)
    return said


def _show(row: Row, metric: Metric) -> str:
    unit = f" {metric.unit}" if metric.unit else ""
    return show_spread(metric, list(row.test.values())) + unit


def _gap(a: Row, b: Row, metric: Metric) -> str:
    """How far apart two rows are that are told apart, with the interval: points, or a ratio."""
    found = a.against(b)
    assert found is not None
    ends = sorted(map(abs, (found.low, found.high)))
    if metric.log:
        low, high = (f"{10**end:.2g}" for end in ends)
        return f"a factor of {10 ** abs(found.mean):.2g} ({low} to {high})"
    low, high = map(metric.show, ends)
    return f"{metric.show(abs(found.mean))} points ({low} to {high})"


def _reservations(
    records: Sequence[Record], table: Sequence[Row], note: Mapping[str, Any], metric: Metric
) -> list[str]:
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
            f"Learning rates were not tuned for {', '.join(untuned)}: no conclusion about these is "
            "fair until `sttp compare --tune`."
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
        if any(row.scored for row in table):
            said.append(
                "Two methods are told apart when the 95 % interval of their mean difference, seed "
                "by seed"
                + (" and of logarithms" if metric.log else "")
                + ", leaves out zero; of twenty pairs that do not differ, one is by chance."
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
    for unit, name in (("epochs", "epochs"), ("evaluations", "max_evaluations")):
        lengths = {record["spec"].get(name) for record in records} - {None}
        before = {found.get(name) for found in tuned.values()} - {None} - lengths
        if before and lengths:
            said.append(
                f"Learning rates were tuned for {', '.join(map(str, sorted(before)))} {unit} and "
                f"used for {', '.join(map(str, sorted(lengths)))}."
            )
    return said


def _best(here: Sequence[Row], metric: Metric) -> list[str]:
    ordered = sorted(here, key=lambda row: row.mean, reverse=metric.higher)
    best, rest = ordered[0], ordered[1:]
    adjective = "highest" if metric.higher else "lowest"
    said = (
        f"Rank {best.rank}: {best.method} has the {adjective} mean test {metric.name}, "
        f"{_show(best, metric)}"
    )
    close = [row.method for row in rest if not best.apart_from(row)]
    if not rest:
        return [said + "; it is the only method that finished."]
    if len(best.test) < 2:
        return [said + ", on one seed."]
    if close:
        return [said + f". These seeds do not tell it apart from {', '.join(close)}."]
    return [said + ", apart from all others."]


def _held_two_ways(here: Sequence[Row], metric: Metric) -> list[str]:
    """Chart against manifold: the same set of weights and optimizer, held in two ways."""
    found = {(row.kind, row.optimizer, row.parameterization): row for row in here}
    said = []
    for kind, optimizer in dict.fromkeys((row.kind, row.optimizer) for row in here):
        chart = found.get((kind, optimizer, "householder"))
        point = found.get((kind, optimizer, "riemannian"))
        if chart is None or point is None:
            continue
        text = (
            f"Rank {chart.rank}, {_NAMES.get(kind, kind)} by {_NAMES.get(optimizer, optimizer)}: "
            f"Householder chart {_show(chart, metric)}, Riemannian {_show(point, metric)}; "
        )
        if chart.apart_from(point):
            ahead = chart if metric.better(chart.mean, point.mean) else point
            seeds = sorted(set(chart.test) & set(point.test))
            behind = point if ahead is chart else chart
            wins = sum(metric.better(ahead.test[s], behind.test[s]) for s in seeds)
            text += (
                f"{'the chart' if ahead is chart else 'the Riemannian one'} is ahead by "
                f"{_gap(chart, point, metric)}, on {wins} of {len(seeds)} seeds."
            )
        else:
            text += "these seeds do not tell them apart."
        said.append(text)
    return said


def _sets(here: Sequence[Row], metric: Metric) -> list[str]:
    """Best of each set of weights, since sets differ in size."""
    best: dict[str, Row] = {}
    for row in here:
        if row.kind not in best or metric.better(row.mean, best[row.kind].mean):
            best[row.kind] = row
    said = []
    for small, large in (("svdp", "dense"), ("sttp", "dense"), ("sttp", "svdp")):
        if small not in best or large not in best:
            continue
        a, b = best[small], best[large]
        if not a.dimension or not b.dimension:
            continue
        name, other = _NAMES.get(small, small), _NAMES.get(large, large)
        text = (
            f"Rank {a.rank}: {name} has {100 * a.dimension / b.dimension:.2g} % of the degrees of "
            f"freedom of {other}; "
        )
        if not a.apart_from(b):
            text += f"the best method of each ({a.method}, {b.method}) are not told apart."
        else:
            word = "better" if metric.better(a.mean, b.mean) else "worse"
            text += f"its best method ({a.method}) is {word} than {b.method} by "
            text += _gap(a, b, metric) + "."
        said.append(text)
    return said


def _times(table: Sequence[Row]) -> list[str]:
    """Training time of an epoch against dense, at the largest rank."""
    rank = max(row.rank for row in table)
    here = [row for row in table if row.rank == rank and row.seconds]
    dense = [row.epoch_seconds for row in here if row.kind == "dense"]
    others: dict[tuple[str, str], list[float]] = {}
    for row in here:
        if row.kind != "dense":
            others.setdefault((row.kind, row.parameterization), []).append(row.epoch_seconds)
    if not dense or not others:
        return []
    base = statistics.median(dense)
    words = {"householder": "chart", "riemannian": "Riemannian"}
    parts = [
        f"{_NAMES.get(kind, kind)} {words.get(held, held)} {statistics.median(times) / base:.1f}"
        for (kind, held), times in others.items()
    ]
    return [
        f"Training time of an epoch at rank {rank}, in multiples of dense: {', '.join(parts)}. "
        "Weights this small are no measure of speed; runs shared the machine."
    ]
