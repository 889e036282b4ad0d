"""How to get each row of a table again: the command, and the versions it was made with."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from sttp_manifold.experiments.reading.frontier import z_of
from sttp_manifold.experiments.reading.paired import interval
from sttp_manifold.experiments.reading.result_table import average, metric_of
from sttp_manifold.experiments.records import Record
from sttp_manifold.experiments.task import Metric

__all__ = ["HEADER_NOTE", "command_of", "lettered", "row_cells", "row_header"]

HEADER_NOTE = (
    "Mean over seeds with half the width of its 95 % interval (Student's; of an error, the "
    "geometric mean). Z as in the paper. The letter names versions and device, listed below."
)
# Fields of a specification that are an option of the command each, by the kind of run.
_FIELDS = {
    "train": ("epochs", "batch_size", "schedule"),
    "solve": ("max_evaluations", "max_iterations", "max_seconds"),
}


def command_of(group: Sequence[Record], command: str = "compare") -> str:
    """The command that repeats the runs of one method at one rank.

    Args:
        group: their records; of some seeds.
        command: of ``sttp``.
    """
    spec = group[0]["spec"]
    seeds = ",".join(str(seed) for seed in sorted({r["spec"]["seed"] for r in group}))
    words = ["sttp", command, "--task", spec["task"], "--methods", spec["method"]]
    # Of a run that no rank changes, any will do.
    words += ["--ranks", str(spec["rank"] or 1), "--seeds", seeds]
    options = {name: spec.get(name) for name in _FIELDS.get(group[0]["run"], ())}
    for name, value in {**options, **spec.get("options", {})}.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif value is not None and value is not False:
            words += [flag, f"{value:g}" if isinstance(value, float) else str(value)]
    words += ["--dtype", spec["dtype"], "--device", spec["device"]]
    if spec["lr"] is not None:
        words += ["--lr", f"{spec['method']}={spec['lr']!r}"]
    return shlex.join(words)


def _made_by(record: Record) -> tuple[str, str]:
    words = ", ".join(f"{name} {value}" for name, value in record["versions"].items())
    return words, record["device"]


def lettered(records: Sequence[Record]) -> list[tuple[str, str, str]]:
    """Letter, versions and device of everything that records were made by, in their order."""
    made = list(dict.fromkeys(map(_made_by, records)))
    return [(chr(ord("A") + k % 26), *found) for k, found in enumerate(made)]


def row_header(metric: Metric) -> list[str]:
    """Titles of :func:`row_cells`."""
    unit = f" ({metric.unit})" if metric.unit else ""
    return ["rank", "method", f"test {metric.name}{unit}", "Z (%)", "seeds", "made by", "command"]


def row_cells(records: Sequence[Record], command: str = "compare") -> list[list[str]]:
    """A line for each method and rank: mean, interval, and the command that repeats it.

    Args:
        records: of one comparison.
        command: of ``sttp``, that made them.
    """
    metric = metric_of(records)
    letter_of = {tuple(made): letter for letter, *made in lettered(records)}
    groups: dict[tuple[int, str], list[Record]] = {}
    for record in records:
        spec = record["spec"]
        groups.setdefault((spec["rank"], spec["method"]), []).append(record)
    lines = []
    for (rank, method), group in sorted(groups.items(), key=lambda item: item[0][0]):
        values = [r["test_metric"] for r in group if r["status"] == "ok"]
        z = z_of(group[0])
        letters = {letter_of[_made_by(record)] for record in group}
        lines.append(
            [
                "any" if rank == 0 else str(rank),
                method,
                _mean(metric, [value for value in values if value is not None]),
                "-" if z is None else f"{z:.2f}",
                str(len(values)),
                " ".join(sorted(letters)),
                command_of(group, command),
            ]
        )
    return lines


def _mean(metric: Metric, values: Sequence[Any]) -> str:
    if not values:
        return "-"
    text = metric.show(average(values, log=metric.log))
    reach = None if metric.log else interval(values)
    return text if reach is None else f"{text} ± {metric.show(reach)}"
