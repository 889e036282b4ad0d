"""Tables of a comparison, and what they say in plain words. Both read records only."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sttp_manifold.experiments.reading.effort_table import EffortRow
from sttp_manifold.experiments.reading.paired import Paired, paired
from sttp_manifold.experiments.records import Record, read_for
from sttp_manifold.experiments.task import Metric

__all__ = [
    "Row",
    "at_every_rank",
    "average",
    "cells",
    "grid",
    "header",
    "metric_note",
    "metric_of",
    "rows",
    "show_spread",
    "spread_words",
    "to_csv",
    "to_markdown",
]

_LEFT = ("method", "notes", "set", "command")
# An error of exactly zero has no logarithm: it counts as this one.
_LEAST = 1e-300


@dataclass(frozen=True)
class Row:
    """One method at one rank, over its seeds.

    Attributes:
        method: name of the method.
        kind: ``dense``, ``svdp`` or ``sttp``.
        parameterization: how the weights were held.
        optimizer: ``adam``, ``sgd``, or another.
        rank: rank of the common initial weights.
        lr: learning rate; None where there is none.
        lr_source: ``tuned``, ``given`` or ``untuned``; None where there is no learning rate.
        test: test metric by seed.
        val: validation metric by seed, in the same order.
        seconds: training time by seed, evaluation left out.
        epochs: epochs of each run; None for solvers.
        stored: numbers trained in the compressed weights.
        dimension: dimension of the set of weights.
        dense: elements of the same weights when dense.
        diverged: runs that diverged.
        failed: runs that failed.
        log: whether the metric is averaged by its logarithm.
        scored: whether its runs are ranked by the metric at their end.
        resolution: what one test example is worth, in points, where the metric is a percentage.
    """

    method: str
    kind: str
    parameterization: str
    optimizer: str
    rank: int
    lr: float | None
    lr_source: str | None
    test: dict[int, float]
    val: dict[int, float]
    seconds: dict[int, float]
    epochs: int | None
    stored: int | None
    dimension: int | None
    dense: int | None
    diverged: int
    failed: int
    log: bool
    scored: bool = True
    resolution: float | None = None

    @property
    def runs(self) -> int:
        """Number of runs, finished or not."""
        return len(self.test) + self.diverged + self.failed

    @property
    def mean(self) -> float:
        """Mean test metric, geometric for errors; not a number when no run finished."""
        return average(list(self.test.values()), log=self.log) if self.test else math.nan

    def against(self, other: Row) -> Paired | None:
        """The difference to another row, seed by seed, in favour of this one where it is more.

        Errors are compared by their logarithms: one run that ends at 1e-5 among others at 1e-12
        would hide every difference below it. None where fewer than two seeds are shared.
        """
        a, b = (
            dict(zip(row.test, _scale(list(row.test.values()), row.log), strict=True))
            for row in (self, other)
        )
        return paired(a, b, self.resolution)

    def apart_from(self, other: Row) -> bool:
        """Whether the 95 % interval of the mean difference, seed by seed, leaves out zero."""
        found = self.against(other)
        return found is not None and found.apart

    @property
    def epoch_seconds(self) -> float:
        """Median time of an epoch."""
        if not self.seconds or self.epochs is None:
            return math.nan
        return statistics.median(self.seconds.values()) / self.epochs


def _scale(values: Sequence[float], log: bool) -> list[float]:
    return [math.log10(max(value, _LEAST)) for value in values] if log else list(values)


def average(values: Sequence[float], *, log: bool) -> float:
    """Arithmetic mean, or geometric where the metric is logarithmic."""
    mean = statistics.fmean(_scale(values, log))
    if not log:
        return mean
    # Rounding must not lift a mean of equal values out of them: bars reach to the extremes.
    return min(max(10**mean, min(values), _LEAST), max(max(values), _LEAST))


def metric_of(records: Sequence[Record]) -> Metric:
    """The metric that the records were judged by."""
    values = records[0]["metric"]
    return Metric(values["name"], values["unit"], values["higher"], values["log"], values["spec"])


def at_every_rank(records: Sequence[Record]) -> list[Record]:
    """The records, with those of rank 0, which no rank changes, at each rank of the others."""
    ranks = sorted({record["spec"]["rank"] for record in records} - {0})
    if not ranks:
        return list(records)
    return [
        record if rank is None else {**record, "spec": {**record["spec"], "rank": rank}}
        for record in records
        for rank in (ranks if record["spec"]["rank"] == 0 else (None,))
    ]


def rows(records: Sequence[Record]) -> list[Row]:
    """Rows in the order of rank, then of the records."""
    groups: dict[tuple[int, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record["spec"]["rank"], record["spec"]["method"]), []).append(record)
    table = []
    for rank, method in sorted(groups, key=lambda key: key[0]):
        group = groups[rank, method]
        spec = group[0]["spec"]
        ok = [record for record in group if record["status"] == "ok"]

        def first(name: str, group: list[Record] = group) -> Any:
            return next((r[name] for r in group if r[name] is not None), None)

        table.append(
            Row(
                method=method,
                kind=spec["kind"],
                parameterization=spec["parameterization"],
                optimizer=spec["optimizer"],
                rank=rank,
                lr=spec["lr"],
                lr_source=group[0]["lr_source"],
                test={r["spec"]["seed"]: r["test_metric"] for r in ok},
                val={r["spec"]["seed"]: r["val_metric"] for r in ok},
                seconds={r["spec"]["seed"]: r["curves"]["seconds"][-1] for r in ok},
                epochs=spec["epochs"],
                stored=first("stored_parameters"),
                dimension=first("dimension"),
                dense=first("dense_elements"),
                diverged=sum(r["status"] == "diverged" for r in group),
                failed=sum(r["status"] == "failed" for r in group),
                log=group[0]["metric"]["log"],
                scored=read_for(group[0], "score"),
                resolution=_resolution(group[0]),
            )
        )
    return table


def _resolution(record: Record) -> float | None:
    """What one example of the test split is worth, where the metric is a percentage of them."""
    size = record["examples"]["test"]
    return 100 / size if record["metric"]["unit"] == "%" and size else None


def show_spread(metric: Metric, values: Sequence[float]) -> str:
    """Mean and standard deviation as text; one value alone has no spread.

    A logarithmic metric shows its geometric mean and the factor that is one standard deviation.
    """
    if not values:
        return "-"
    text = metric.show(average(values, log=metric.log))
    if len(values) < 2:
        return text
    deviation = statistics.stdev(_scale(values, metric.log))
    return f"{text} ×÷ {10**deviation:.2g}" if metric.log else f"{text} ± {metric.show(deviation)}"


def spread_words(metric: Metric) -> str:
    """What :func:`show_spread` shows."""
    if metric.log:
        return "Geometric mean ×÷ the factor of one standard deviation, over seeds"
    return "Mean ± standard deviation over seeds"


def header(metric: Metric) -> list[str]:
    """Titles of :func:`cells`."""
    unit = f" ({metric.unit})" if metric.unit else ""
    return [
        "rank",
        "method",
        f"test {metric.name}{unit}",
        f"val {metric.name}{unit}",
        "stored",
        "dimension",
        "of dense",
        "lr",
        "train s",
        "seeds",
        "notes",
    ]


def cells(row: Row, metric: Metric) -> list[str]:
    """A row as text."""
    notes = []
    if row.diverged:
        notes.append(f"{row.diverged} diverged")
    if row.failed:
        notes.append(f"{row.failed} failed")
    if row.lr_source not in ("tuned", None):
        notes.append(f"lr {row.lr_source}")
    share = "-"
    if row.stored is not None and row.dense:
        share = f"{100 * row.stored / row.dense:.1f} %"
    return [
        str(row.rank),
        row.method,
        show_spread(metric, list(row.test.values())),
        show_spread(metric, list(row.val.values())),
        "-" if row.stored is None else f"{row.stored:,}",
        "-" if row.dimension is None else f"{row.dimension:,}",
        share,
        "-" if row.lr is None else f"{row.lr:g}",
        "-" if not row.seconds else f"{statistics.fmean(row.seconds.values()):.2f}",
        str(len(row.test)),
        ", ".join(notes),
    ]


def metric_note(metric: Metric) -> str:
    """How to read the table of :func:`cells`."""
    return (
        f"{spread_words(metric)}; {metric.name}: "
        f"{'higher' if metric.higher else 'lower'} is better. Stored, dimension and dense count "
        "the weight matrices, not the biases. Dense methods are free to leave the rank that they "
        "start at. Train s leaves evaluation out."
    )


def to_markdown(table: Sequence[Row], metric: Metric) -> str:
    """The table for people, in GitHub's Markdown."""
    body = [cells(row, metric) for row in table]
    return f"{grid(header(metric), body)}\n\n{metric_note(metric)}\n"


def grid(titles: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Texts as a Markdown table; method and notes to the left, numbers to the right."""
    # A rule that says "to the right" has two letters.
    widths = [
        max(len(title), *(len(line[k]) for line in body), 2) for k, title in enumerate(titles)
    ]
    left = {k for k, title in enumerate(titles) if title in _LEFT}

    def line(texts: Sequence[str]) -> str:
        padded = (
            text.ljust(width) if k in left else text.rjust(width)
            for k, (text, width) in enumerate(zip(texts, widths, strict=True))
        )
        return "| " + " | ".join(padded) + " |"

    rule = ("-" * width if k in left else "-" * (width - 1) + ":" for k, width in enumerate(widths))
    return "\n".join([line(titles), "| " + " | ".join(rule) + " |", *map(line, body)])


_SPENT = (
    "iterations_to_target",
    "evaluations_to_target",
    "hessian_products",
    "seconds_to_target",
)


def to_csv(table: Sequence[Row], efforts: Sequence[EffortRow] = ()) -> str:
    """The table for programs: plain numbers, empty where there is none."""
    spent = {(row.rank, row.method): row for row in efforts}
    lines = [_csv_cells(row, spent.get((row.rank, row.method))) for row in table]
    out = io.StringIO()
    writer = csv.DictWriter(out, list(lines[0]) if lines else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def _csv_cells(row: Row, effort: EffortRow | None) -> dict[str, Any]:
    test, val = list(row.test.values()), list(row.val.values())
    seconds = list(row.seconds.values())
    return {
        "rank": row.rank,
        "method": row.method,
        "kind": row.kind,
        "parameterization": row.parameterization,
        "optimizer": row.optimizer,
        "lr": "" if row.lr is None else row.lr,
        "lr_source": row.lr_source or "",
        "test_mean": statistics.fmean(test) if test else "",
        "test_std": statistics.stdev(test) if len(test) > 1 else "",
        "test_min": min(test, default=""),
        "test_max": max(test, default=""),
        "val_mean": statistics.fmean(val) if val else "",
        "val_std": statistics.stdev(val) if len(val) > 1 else "",
        "stored_parameters": row.stored,
        "dimension": row.dimension,
        "dense_elements": row.dense,
        "train_seconds_mean": statistics.fmean(seconds) if seconds else "",
        "epochs": "" if row.epochs is None else row.epochs,
        "runs": row.runs,
        "ok": len(test),
        "diverged": row.diverged,
        "failed": row.failed,
        "reached_target": "" if effort is None else len(effort.reached),
        **{
            f"{name}_median": effort.median(name) if effort and effort.reached else ""
            for name in _SPENT
        },
    }
