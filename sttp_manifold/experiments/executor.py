"""Where runs go: one after another, processes here, a cluster; every record to disk."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import joblib
from joblib.externals.loky.process_executor import TerminatedWorkerError

from sttp_manifold.errors import ConfigError
from sttp_manifold.experiments.checkpoint import Checkpoint
from sttp_manifold.experiments.cluster import on_cluster
from sttp_manifold.experiments.distributed import is_first, of_all, processes
from sttp_manifold.experiments.files import RECORDS
from sttp_manifold.experiments.image_models import with_model
from sttp_manifold.experiments.methods import METHODS
from sttp_manifold.experiments.plan import Planned, Settings
from sttp_manifold.experiments.records import DONE, Record, RecordFile, latest, read_folder
from sttp_manifold.experiments.runs.board import Board, check_board
from sttp_manifold.experiments.runs.execute import execute
from sttp_manifold.experiments.runs.pulse import Pulse
from sttp_manifold.experiments.specs import RunSpec
from sttp_manifold.experiments.task import Task
from sttp_manifold.experiments.tasks import TASKS

__all__ = ["run_plan", "task_of"]

_PR_SET_PDEATHSIG = 1
_SECONDS_BETWEEN_LOOKS = 0.5


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
        settings: where, how many at a time, and which shard of them.
        file_name: file in the folder.
        on_start: told the number of runs, how many of them are done, and the bytes of a last line
            that is no record.
        on_record: told each record, old ones first.

    Returns:
        One record for each planned run, in the order of the plan; of a shard, and in processes of
        ``torchrun`` beside the first, those that are known here.

    Raises:
        ConfigError: the task's data is not there, the file is held by another process or cannot
            be written, or a worker was killed.
    """
    _check_processes(runs, settings)
    _look_at_data(runs, settings.data_dir)
    if settings.tensorboard:
        check_board()
    if not is_first():
        return _beside_the_first(runs, settings)
    shard = settings.shard
    mine = [run for run in runs if shard is None or shard.has(run.spec.hash)]
    wanted = {run.spec.hash for run in runs}
    with RecordFile(settings.out / (shard.file_name(file_name) if shard else file_name)) as file:
        found = {
            record["hash"]: record
            for record in latest(read_folder(settings.out, file_name))
            if record["hash"] in wanted and record["status"] in DONE
        }
        todo = [run for run in mine if run.spec.hash not in found]
        if on_start:
            on_start(len(mine), len(mine) - len(todo), file.torn_bytes)
        if on_record:
            for run in mine:
                if run.spec.hash in found:
                    on_record(found[run.spec.hash])
        of_all([run.spec.hash for run in todo])
        for record in _execute_all(todo, _jobs(runs, settings), settings):
            file.append(record)
            Checkpoint(settings.out, record["hash"]).remove()
            found[record["hash"]] = record
            if on_record:
                on_record(record)
    return [found[run.spec.hash] for run in runs if run.spec.hash in found]


def _check_processes(runs: Sequence[Planned], settings: Settings) -> None:
    """Refuse what several processes cannot do together.

    Raises:
        ConfigError: a run that none of them could help with, or places for runs beside them.
    """
    if processes() == 1:
        return
    alone = sorted({run.spec.method for run in runs if METHODS[run.spec.method].run != "train"})
    if alone:
        raise ConfigError(
            f"{', '.join(alone)}: one process each; under torchrun only methods that train are "
            "shared. Leave torchrun out, or them out of --methods"
        )
    if settings.dask is not None or settings.jobs not in (None, 1):
        raise ConfigError(
            "--dask and --jobs are for many runs at a time; the processes of torchrun do one run "
            "together. Leave either out"
        )


def _beside_the_first(runs: Sequence[Planned], settings: Settings) -> list[Record]:
    """Do what the first process of ``torchrun`` does, with it; that one keeps the records."""
    todo = of_all([""])
    by_hash = {run.spec.hash: run for run in runs}
    return list(_execute_all([by_hash[key] for key in todo], 1, settings))


def _look_at_data(runs: Sequence[Planned], data_dir: Path | None) -> None:
    """Data that is not there, or has no examples, is found before the first run.

    Raises:
        ConfigError: such data.
    """
    task = TASKS[runs[0].spec.task] if runs else None
    if task is None or task.load is None:
        return
    splits = task.load(data_dir)
    for name in ("train", "val", "test"):
        if not len(getattr(splits, name)):
            raise ConfigError(
                f"the {name} split of the task {task.name!r} is empty"
                + (f" (from {data_dir})" if data_dir else "")
                + "; every split needs examples"
            )


def task_of(spec: RunSpec, data_dir: Path | None) -> Task:
    """What a specification is to be run on: its task, with the network that it names.

    Args:
        spec: of a run.
        data_dir: folder of the task's files.
    """
    model = spec.options.get("model")
    return with_model(TASKS[spec.task], None if model is None else str(model), data_dir)


def _jobs(runs: Sequence[Planned], settings: Settings) -> int:
    if processes() > 1:
        return 1
    if settings.jobs is not None:
        return settings.jobs
    return 1 if any(run.spec.device == "cuda" for run in runs) else int(joblib.cpu_count())


def _execute_all(todo: Sequence[Planned], jobs: int, settings: Settings) -> Iterator[Record]:
    out = settings.out.resolve()
    calls = [
        (
            *(run.spec, task_of(run.spec, settings.data_dir)),
            *(METHODS[run.spec.method], run.lr_source, settings.data_dir),
            *(Checkpoint(out, run.spec.hash), Pulse(out, run.spec.hash)),
            Board(out, run.spec) if settings.tensorboard and is_first() else None,
        )
        for run in todo
    ]
    if settings.dask is not None and calls:
        keys = [run.spec.hash for run in todo]
        yield from on_cluster(settings.dask, execute, list(zip(keys, calls, strict=True)))
        return
    if jobs == 1 or len(calls) <= 1:
        for call in calls:
            yield execute(*call)
        return
    parallel = joblib.Parallel(
        n_jobs=min(jobs, len(calls)),
        backend="loky",
        batch_size=1,
        return_as="generator_unordered",
        initializer=end_with_parent,
        initargs=(os.getpid(),),
    )
    try:
        yield from parallel(joblib.delayed(execute)(*call) for call in calls)
    except TerminatedWorkerError as error:
        raise ConfigError(
            "a worker process was killed, by a user or for want of memory. The runs that ended "
            "are kept; the same command goes on from here, with less memory under --jobs 1"
        ) from error


def end_with_parent(parent: int) -> None:
    """See to it that this process ends when its parent has, however that ended.

    A worker that outlived its parent would compute for nobody, and hold the pipes that it
    inherited. Linux can signal it; elsewhere a thread looks.

    Args:
        parent: the process that this one was started by.
    """
    if sys.platform == "linux":
        with suppress(AttributeError, OSError):  # a libc without it
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # The parent may have ended before that call, and other systems have no such signal.
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    os._exit(1)
