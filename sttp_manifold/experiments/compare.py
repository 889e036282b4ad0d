"""Comparisons: methods x ranks x seeds, resumed where they stopped."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import joblib

from sttp_manifold.errors import ConfigError
from sttp_manifold.experiments.files import write_text
from sttp_manifold.experiments.methods import METHODS
from sttp_manifold.experiments.records import DONE, Record, RecordFile, latest, read_records
from sttp_manifold.experiments.runs import DTYPES, execute, resolve_device
from sttp_manifold.experiments.specs import RunSpec
from sttp_manifold.experiments.tasks import TASKS, Task
from sttp_manifold.experiments.tune import TUNING_SEEDS, best_rate, load_tuned, save_tuned

__all__ = ["Planned", "Settings", "load_comparison", "plan", "run_plan", "tune"]

RECORDS = "records.jsonl"
TUNING = "tuning.jsonl"
COMPARISON = "comparison.json"


@dataclass(frozen=True)
class Settings:
    """What to compare, and where. None stands for the task's default.

    Attributes:
        task: name of the task.
        methods: names, wildcards, or ``all``.
        ranks: ranks of the common initial weight and of the compressed ones.
        seeds: of initial weights and order of data.
        epochs: epochs to train.
        lrs: learning rates that were given, by method or wildcard.
        device: ``auto``, ``cpu`` or ``cuda``.
        dtype: ``float32`` or ``float64``.
        jobs: runs at a time; None is one for each core, or one on a GPU.
        out: folder to write to.
        data_dir: folder of the task's files.
        tuned_file: file of learning rates in place of the task's own.
    """

    out: Path
    task: str = "digits"
    methods: Sequence[str] = ("all",)
    ranks: Sequence[int] | None = None
    seeds: Sequence[int] = (0, 1, 2)
    epochs: int | None = None
    lrs: Mapping[str, float] = field(default_factory=dict)
    device: str = "auto"
    dtype: str | None = None
    jobs: int | None = None
    data_dir: Path | None = None
    tuned_file: Path | None = None


@dataclass(frozen=True)
class Planned:
    """A run to do, and where its learning rate came from."""

    spec: RunSpec
    lr_source: str


def _checked(settings: Settings) -> Task:
    """The task, after a look at everything else.

    Raises:
        ConfigError: says what came and what was expected.
    """
    task = TASKS[settings.task]
    METHODS.select(settings.methods)
    for noun, values, least in (
        ("rank", task.ranks if settings.ranks is None else settings.ranks, 1),
        ("seed", settings.seeds, 0),
        ("epoch count", [task.epochs if settings.epochs is None else settings.epochs], 1),
        ("job count", [1 if settings.jobs is None else settings.jobs], 1),
    ):
        if not values:
            raise ConfigError(f"no {noun} given")
        for value in values:
            if value < least:
                raise ConfigError(f"{noun} {value}: expected {least} or more")
    dtype = settings.dtype or task.dtype
    if dtype not in DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}. The dtypes are: {', '.join(DTYPES)}")
    for name, lr in settings.lrs.items():
        METHODS.select([name])
        if not (math.isfinite(lr) and lr > 0):
            raise ConfigError(f"learning rate {lr}: expected a positive number")
    return task


def _spec(
    settings: Settings, task: Task, method_name: str, rank: int, seed: int, lr: float, purpose: str
) -> RunSpec:
    method = METHODS[method_name]
    return RunSpec(
        task=task.name,
        data=task.data,
        method=method.name,
        kind=method.kind,
        parameterization=method.parameterization,
        optimizer=method.optimizer,
        momentum=method.momentum,
        spectrum=None if method.is_dense else method.spectrum,
        rank=rank,
        seed=seed,
        epochs=settings.epochs or task.epochs,
        batch_size=task.batch_size,
        repeats=task.repeats,
        lr=float(lr),
        schedule="cosine",
        dtype=settings.dtype or task.dtype,
        device=resolve_device(settings.device),
        purpose=purpose,
    )


def plan(settings: Settings) -> list[Planned]:
    """The runs of a comparison. All methods of one seed come before the next seed.

    Raises:
        ConfigError: an unknown name or an impossible number.
    """
    task = _checked(settings)
    names = METHODS.select(settings.methods)
    tuned = load_tuned(task, settings.tuned_file)
    rates: dict[str, tuple[float, str]] = {}
    for name in names:
        given = [lr for pattern, lr in settings.lrs.items() if name in METHODS.select([pattern])]
        if given:
            # The last one that fits wins, so that `all` can be followed by exceptions.
            rates[name] = (given[-1], "given")
        elif name in tuned:
            rates[name] = (tuned[name]["lr"], "tuned")
        else:
            rates[name] = (METHODS[name].untuned_lr, "untuned")
    return [
        Planned(_spec(settings, task, name, rank, seed, rates[name][0], "compare"), rates[name][1])
        for seed in dict.fromkeys(settings.seeds)
        for rank in dict.fromkeys(settings.ranks or task.ranks)
        for name in names
    ]


def tuning_plan(settings: Settings) -> list[Planned]:
    """The runs that choose learning rates: the task's grid on the tuning seeds.

    Raises:
        ConfigError: as :func:`plan`, or a tuning seed is among the seeds to report.
    """
    task = _checked(settings)
    both = sorted(set(settings.seeds) & set(TUNING_SEEDS))
    if both:
        raise ConfigError(
            f"seeds {both} are kept for tuning; learning rates chosen on the seeds that are "
            "reported would flatter them. Choose others with --seeds"
        )
    return [
        Planned(_spec(settings, task, name, rank, seed, lr, "tune"), "given")
        for seed in TUNING_SEEDS
        for rank in dict.fromkeys(settings.ranks or task.ranks)
        for lr in task.lrs
        for name in METHODS.select(settings.methods)
    ]


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
    if runs:
        TASKS[runs[0].spec.task].load(settings.data_dir)
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


def tune(
    settings: Settings,
    *,
    on_start: Callable[[int, int, int], None] | None = None,
    on_record: Callable[[Record], None] | None = None,
) -> tuple[Path, dict[str, dict[str, Any]]]:
    """Choose each method's learning rate and keep it with the task.

    Returns:
        The file, and what was found for each method. A method that finished at no rate of the
        grid is not among them.

    Raises:
        ConfigError: as :func:`tuning_plan`.
    """
    records = run_plan(
        tuning_plan(settings),
        settings,
        file_name=TUNING,
        on_start=on_start,
        on_record=on_record,
    )
    task = TASKS[settings.task]
    by_method: dict[str, list[Record]] = {}
    for record in records:
        by_method.setdefault(record["spec"]["method"], []).append(record)
    found = {}
    for name, group in by_method.items():
        best = best_rate(task, group)
        if best is not None:
            found[name] = best
    return save_tuned(task, found, settings.tuned_file), found


def command_line(settings: Settings) -> str:
    """The command that repeats a comparison."""
    task = TASKS[settings.task]
    words = ["sttp", "compare", "--task", settings.task]
    words += ["--methods", ",".join(METHODS.select(settings.methods))]
    words += ["--ranks", ",".join(map(str, settings.ranks or task.ranks))]
    words += ["--seeds", ",".join(map(str, settings.seeds))]
    words += ["--epochs", str(settings.epochs or task.epochs)]
    words += ["--dtype", settings.dtype or task.dtype]
    words += ["--device", resolve_device(settings.device)]
    for name, lr in settings.lrs.items():
        words += ["--lr", f"{name}={lr:g}"]
    return shlex.join(words)


def save_comparison(settings: Settings, runs: Sequence[Planned]) -> None:
    """Note which records of the folder belong to this comparison, for its report."""
    task = TASKS[settings.task]
    tuned = load_tuned(task, settings.tuned_file)
    used = {run.spec.method for run in runs if run.lr_source == "tuned"}
    content = {
        "task": task.name,
        "summary": task.summary,
        "command": command_line(settings),
        "hashes": [run.spec.hash for run in runs],
        "tuned": {
            name: {key: tuned[name][key] for key in ("lr", "at_edge", "epochs", "ranks", "seeds")}
            for name in sorted(used)
        },
    }
    write_text(settings.out / COMPARISON, json.dumps(content, indent=1) + "\n")


def load_comparison(out: Path) -> tuple[dict[str, Any], list[Record]]:
    """The note on a comparison and its records, in the order of the plan.

    Raises:
        ConfigError: the folder holds no comparison.
    """
    note = out / COMPARISON
    if not note.is_file() or not (out / RECORDS).is_file():
        raise ConfigError(
            f"no comparison in {out}: expected {COMPARISON} and {RECORDS} there; make one with "
            f"`sttp compare --out {shlex.quote(str(out))}`"
        )
    content: dict[str, Any] = json.loads(note.read_text(encoding="utf-8"))
    records = {record["hash"]: record for record in latest(read_records(out / RECORDS)[0])}
    return content, [records[key] for key in content["hashes"] if key in records]
