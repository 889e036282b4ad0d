"""Where runs go: here one after another, or in processes; every record to disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import joblib

from sttp_manifold.experiments.files import RECORDS
from sttp_manifold.experiments.methods import METHODS
from sttp_manifold.experiments.plan import Planned, Settings
from sttp_manifold.experiments.records import DONE, Record, RecordFile, latest
from sttp_manifold.experiments.runs.execute import execute
from sttp_manifold.experiments.tasks import TASKS

__all__ = ["run_plan"]


def _execute_all(todo: Sequence[Planned], jobs: int, data_dir: Path | None) -> Iterator[Record]:
    calls = [
        (run.spec, TASKS[run.spec.task], METHODS[run.spec.method], run.lr_source, data_dir)
        for run in todo
    ]
    if jobs == 1 or len(calls) <= 1:
        for call in calls:
            yield execute(*call)
        return
    parallel = joblib.Parallel(
        n_jobs=min(jobs, len(calls)),
        backend="loky",
        batch_size=1,
        return_as="generator_unordered",
    )
    yield from parallel(joblib.delayed(execute)(*call) for call in calls)


def run_plan(
    runs: Sequence[Planned],
    settings: Settings,
    *,
    file_name: str = RECORDS,
    on_start: Callable[[int, int, int], None] | None = None,
    on_record: Callable[[Record], None] | None = None,
) -> list[Record]:
    """Do the runs whose records are not there yet; every record is on disk before the next.

    Args:
        runs: what :func:`plan` gave.
        settings: where, and how many at a time.
        file_name: file in the folder.
        on_start: told the number of runs, how many of them are done, and the bytes of a torn line.
        on_record: told each record, old ones first.

    Returns:
        One record for each planned run, in the order of the plan.

    Raises:
        ConfigError: the task's data is not there, or the file is held by another process.
    """
    load = TASKS[runs[0].spec.task].load if runs else None
    if load is not None:
        load(settings.data_dir)
    jobs = settings.jobs
    if jobs is None:
        on_gpu = any(run.spec.device == "cuda" for run in runs)
        jobs = 1 if on_gpu else joblib.cpu_count()
    wanted = {run.spec.hash for run in runs}
    with RecordFile(settings.out / file_name) as file:
        found = {
            record["hash"]: record
            for record in latest(file.records)
            if record["hash"] in wanted and record["status"] in DONE
        }
        if on_start:
            on_start(len(runs), len(found), file.torn_bytes)
        if on_record:
            for record in found.values():
                on_record(record)
        todo = [run for run in runs if run.spec.hash not in found]
        for record in _execute_all(todo, jobs, settings.data_dir):
            file.append(record)
            found[record["hash"]] = record
            if on_record:
                on_record(record)
    return [found[run.spec.hash] for run in runs]
