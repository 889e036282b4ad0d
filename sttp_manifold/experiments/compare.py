"""A comparison: plan, run, tune, and the note of what belongs to it.

The front of this package: :func:`plan` and :func:`run_plan` come from the files that hold them.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sttp_manifold.experiments.distributed import is_first, of_all
from sttp_manifold.experiments.executor import run_plan
from sttp_manifold.experiments.files import COMPARISON, TUNING, named_errors, write_text
from sttp_manifold.experiments.methods import METHODS, left_out, methods_for
from sttp_manifold.experiments.plan import Planned, Settings, plan, tuning_plan
from sttp_manifold.experiments.records import Record
from sttp_manifold.experiments.runs.device import resolve_device
from sttp_manifold.experiments.runs.kinds import RUNS
from sttp_manifold.experiments.tasks import TASKS
from sttp_manifold.experiments.tune import (
    best_rate,
    check_writable,
    load_tuned,
    rate_beyond,
    save_tuned,
    tuned_path,
)

__all__ = ["Planned", "Settings", "UnfinishedError", "plan", "run_plan", "save_comparison", "tune"]


class UnfinishedError(Exception):
    """Runs of other shards are wanted first. Its text says which, and what to do."""


def tune(
    settings: Settings,
    *,
    on_start: Callable[[int, int, int], None] | None = None,
    on_record: Callable[[Record], None] | None = None,
    on_extend: Callable[[Mapping[str, float]], None] | None = None,
) -> tuple[Path, dict[str, dict[str, Any]]]:
    """Choose each method's learning rate and keep it with the task.

    Where the best rate of a method lies at an edge of its grid, the next one beyond is tried too,
    and so on, ``settings.extensions`` times at most and up to the method's largest rate.

    Args:
        settings: what to compare, and where.
        on_start: as of :func:`run_plan`, of the grid and of each extension.
        on_record: told each record.
        on_extend: told the rates beyond their grids, by method, before their runs.

    Returns:
        The file, and what was found for each method. A method that finished at no rate of the
        grid is not among them.

    Raises:
        ConfigError: as :func:`tuning_plan`, or the file of rates cannot be written.
        UnfinishedError: other shards have tuning runs to do.
    """
    planned = tuning_plan(settings)
    check_writable(TASKS[settings.task], settings.tuned_file)
    records: list[Record] = []
    for left in range(settings.extensions, -1, -1):
        done = run_plan(planned, settings, file_name=TUNING, on_start=on_start, on_record=on_record)
        records += done
        if settings.shard is not None and len(done) < len(planned):
            raise UnfinishedError(
                f"{len(done)} of {len(planned)} tuning runs are on record. Rates are chosen, and "
                "the comparison begins, when the other shards are done: the same command again"
            )
        # The first process alone has the records.
        beyond = of_all(_beyond(settings, records) if left and is_first() else {})
        if not beyond:
            break
        if on_extend:
            on_extend(beyond)
        planned = tuning_plan(settings, {name: [lr] for name, lr in beyond.items()})
    path = tuned_path(settings.task, settings.tuned_file)
    found: dict[str, dict[str, Any]] = {}
    if is_first():
        found = _chosen(settings, records)
        path = save_tuned(TASKS[settings.task], found, settings.tuned_file)
    # The other processes read the file that is there then.
    return of_all((path, found))


def _chosen(settings: Settings, records: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """The best rate of each method that finished at one."""
    task = TASKS[settings.task]
    by_method: dict[str, list[Record]] = {}
    for record in records:
        by_method.setdefault(record["spec"]["method"], []).append(record)
    found = {}
    for name, group in by_method.items():
        best = best_rate(task, group)
        if best is not None:
            found[name] = best
    return found


def _beyond(settings: Settings, records: Sequence[Record]) -> dict[str, float]:
    """The next rate of each method whose best lies at the edge of what was tried."""
    beyond = {name: rate_beyond(found) for name, found in _chosen(settings, records).items()}
    return {
        name: lr for name, lr in beyond.items() if lr is not None and lr <= METHODS[name].largest_lr
    }


def command_line(settings: Settings, rates: Mapping[str, float] | None = None) -> str:
    """The command that repeats a comparison.

    Args:
        settings: of it.
        rates: learning rates that were not given, and do not come with the package, by method.
    """
    task = TASKS[settings.task]
    names = methods_for(task, settings.methods)
    command = RUNS[METHODS[names[0]].run].command
    words = ["sttp", command, "--task", settings.task]
    words += ["--methods", ",".join(names)]
    words += ["--ranks", ",".join(map(str, settings.ranks or task.ranks))]
    words += ["--seeds", ",".join(map(str, settings.seeds_of(task)))]
    for kind in dict.fromkeys(METHODS[name].run for name in names):
        method = next(METHODS[name] for name in names if METHODS[name].run == kind)
        used = RUNS[kind].spec_fields(task, method, None, settings.given)
        for name, flag in RUNS[kind].options.items():
            value = used.get(name)
            if flag in words:
                continue
            if value is True:
                words += [flag]
            elif value not in (None, False):
                words += [flag, f"{value:g}" if isinstance(value, float) else str(value)]
    words += ["--dtype", settings.dtype or task.dtype]
    words += ["--device", resolve_device(settings.device)]
    for name, lr in {**settings.lrs, **(rates or {})}.items():
        words += ["--lr", f"{name}={lr:g}"]
    return shlex.join(words)


def save_comparison(settings: Settings, runs: Sequence[Planned]) -> None:
    """Note which records of the folder belong to this comparison, for its report.

    Raises:
        ConfigError: the folder cannot be written.
    """
    task = TASKS[settings.task]
    tuned = load_tuned(task, settings.tuned_file)
    used = {run.spec.method for run in runs if run.lr_source == "tuned"}
    rates = {name: tuned[name]["lr"] for name in sorted(used)}
    content = {
        "task": task.name,
        "summary": task.summary,
        "seed_draws": task.seed_draws,
        "command": command_line(settings, {} if settings.tuned_file is None else rates),
        "hashes": [run.spec.hash for run in runs],
        "left_out": {method.name: method.requires for method in left_out(task, settings.methods)},
        "tuned": {
            name: {
                key: tuned[name].get(key)
                for key in ("lr", "at_edge", "epochs", "max_evaluations", "steps", "ranks", "seeds")
            }
            for name in sorted(used)
        },
    }
    path = settings.out / COMPARISON
    with named_errors(path, "make room or name another folder with --out"):
        write_text(path, json.dumps(content, indent=1) + "\n")
