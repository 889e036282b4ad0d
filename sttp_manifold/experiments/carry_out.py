"""A comparison from its settings to what a terminal shows of it, for any command that runs one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from shlex import quote

from sttp_manifold.experiments import compare as comparing
from sttp_manifold.experiments import terminal
from sttp_manifold.experiments.distributed import is_first
from sttp_manifold.experiments.methods import left_out
from sttp_manifold.experiments.plan import Settings
from sttp_manifold.experiments.progress import RunProgress
from sttp_manifold.experiments.reading.comparison import load_comparison
from sttp_manifold.experiments.reading.report import write_outputs
from sttp_manifold.experiments.records import Record
from sttp_manifold.experiments.tasks import TASKS
from sttp_manifold.experiments.terminal import err
from sttp_manifold.experiments.terminal import out as console

__all__ = ["carry_out"]


def carry_out(settings: Settings, *, tune: bool, quiet: bool) -> list[Record]:
    """Run a comparison, write its report, and show it.

    Args:
        settings: what to compare, and where.
        tune: choose learning rates first.
        quiet: show nothing.

    Returns:
        One record for each run; of a shard, those that are known.

    Raises:
        ConfigError: a setting, or what the runs need, is not right.
    """
    task = TASKS[settings.task]
    metric = task.metric
    if not tune:
        # Names and numbers first: an error must not leave a folder behind.
        comparing.plan(settings)
    for method in [] if quiet else left_out(task, settings.methods):
        err.print(
            f"{method.name} is left out: {method.requires} is not installed "
            f"(pip install 'sttp-manifold[{method.requires}]')",
            soft_wrap=True,
        )
    if tune:
        with RunProgress(err, metric, "tuning", quiet=quiet) as progress:
            try:
                path, found = comparing.tune(
                    settings,
                    on_start=progress.start,
                    on_record=progress.record,
                    on_extend=progress.extend,
                )
            except comparing.UnfinishedError as unfinished:
                console.print(str(unfinished), soft_wrap=True)
                return []
        if not quiet:
            terminal.show_rates(path, found)
    runs = comparing.plan(settings)
    with RunProgress(err, metric, settings.task, quiet=quiet) as progress:

        def begin(total: int, skipped: int, torn_bytes: int) -> None:
            comparing.save_comparison(settings, runs)
            progress.start(total, skipped, torn_bytes)

        progress.follow(settings.out, [run.spec.hash for run in runs])
        records = comparing.run_plan(runs, settings, on_start=begin, on_record=progress.record)
    if not is_first():
        return []
    if len(records) < len(runs):
        console.print(
            f"{len(records)} of {len(runs)} runs are on record; when the other shards are done: "
            f"sttp report {quote(str(settings.out))}",
            soft_wrap=True,
        )
        return records
    written = write_outputs(settings.out)
    if not quiet:
        _show(settings.out, written)
    return records


def _show(out: Path, written: Sequence[Path]) -> None:
    comparison = load_comparison(out)
    *effort, results = comparison.tables
    if any(row.scored for row in comparison.rows):
        terminal.show_table(comparison.task, results.titles, results.lines)
    for pair in comparison.pairs:
        terminal.show_pairs(f"{pair.name} (* told apart)", pair.titles, pair.lines())
    for table in effort:
        what = "frontier" if table is comparison.frontier else "what it took"
        terminal.show_table(f"{comparison.task}: {what}", table.titles, table.lines)
    console.print(f"Report: {written[-1]}", soft_wrap=True)
