"""What is to run: settings, and the runs that they stand for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from sttp_manifold.errors import ConfigError
from sttp_manifold.experiments.json_values import LARGEST
from sttp_manifold.experiments.methods import METHODS, methods_for
from sttp_manifold.experiments.runs.device import DTYPES, resolve_device
from sttp_manifold.experiments.runs.kinds import RUNS
from sttp_manifold.experiments.shards import Shard
from sttp_manifold.experiments.specs import RunSpec
from sttp_manifold.experiments.task import Task
from sttp_manifold.experiments.tasks import TASKS
from sttp_manifold.experiments.tune import EXTENSIONS, TUNING_SEEDS, load_tuned

__all__ = ["Planned", "Settings", "plan", "tuning_plan"]

# Far beyond what anyone runs, and well within what a plan can hold.
_MOST = 10**9
_MOST_RUNS = 10**6


@dataclass(frozen=True)
class Settings:
    """What to compare, and where. None stands for the task's default.

    Attributes:
        task: name of the task.
        methods: names, wildcards, or ``all``: those that apply to the task.
        ranks: ranks of the common initial weight and of the compressed ones.
        seeds: of initial weights and order of data.
        epochs: epochs to train, for methods that train.
        max_iterations: of solvers.
        max_evaluations: calls of the cost function, of solvers.
        max_seconds: of solvers.
        lrs: learning rates that were given, by method or wildcard.
        device: ``auto``, ``cpu`` or ``cuda``.
        dtype: ``float32`` or ``float64``.
        jobs: runs at a time; None is one for each core, or one on a GPU.
        out: folder to write to.
        data_dir: folder of the task's files.
        tuned_file: file of learning rates in place of the task's own.
        options: settings of one kind of runs, by name.
        shard: which part of the plan is done here; None for all of it.
        dask: address of a scheduler, on whose workers runs are done.
        tensorboard: whether each run writes a log of its curves.
        tuning_seeds: seeds on which learning rates are chosen, none of them reported.
        extensions: rates that a grid is extended by, at most, where the best lies at its edge.
    """

    out: Path
    task: str = "digits"
    methods: Sequence[str] = ("all",)
    ranks: Sequence[int] | None = None
    seeds: Sequence[int] | None = None
    epochs: int | None = None
    max_iterations: int | None = None
    max_evaluations: int | None = None
    max_seconds: float | None = None
    lrs: Mapping[str, float] = field(default_factory=dict)
    device: str = "auto"
    dtype: str | None = None
    jobs: int | None = None
    data_dir: Path | None = None
    tuned_file: Path | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    shard: Shard | None = None
    dask: str | None = None
    tensorboard: bool = False
    tuning_seeds: Sequence[int] = TUNING_SEEDS
    extensions: int = EXTENSIONS

    def seeds_of(self, task: Task) -> Sequence[int]:
        """The seeds that were given, or the task's."""
        return task.seeds if self.seeds is None else self.seeds

    @property
    def given(self) -> dict[str, Any]:
        """Settings of kinds of runs that are not the task's default, by name."""
        names = ("epochs", "max_iterations", "max_evaluations", "max_seconds")
        values = {name: getattr(self, name) for name in names}
        return {**{k: v for k, v in values.items() if v is not None}, **self.options}


@dataclass(frozen=True)
class Planned:
    """A run to do, and where its learning rate came from; None where there is none."""

    spec: RunSpec
    lr_source: str | None


def _checked(settings: Settings) -> Task:
    """The task, after a look at everything else.

    Raises:
        ConfigError: says what came and what was expected.
    """
    task = TASKS[settings.task]
    names = methods_for(task, settings.methods)
    if not names:
        raise ConfigError("no method given; see `sttp methods`, or take --methods all")
    numbers: tuple[tuple[str, Sequence[float], float], ...] = (
        ("rank", task.ranks if settings.ranks is None else settings.ranks, 1),
        ("seed", settings.seeds_of(task), 0),
        ("epoch count", _given(settings.epochs), 1),
        ("job count", _given(settings.jobs), 1),
        ("iteration limit", _given(settings.max_iterations), 1),
        ("evaluation limit", _given(settings.max_evaluations), 1),
        ("time limit", _given(settings.max_seconds), 0),
        ("extension count", (settings.extensions,), 0),
        ("example count", _given(settings.options.get("train_examples")), 1),
    )
    for noun, values, least in numbers:
        if not values and noun in ("rank", "seed"):
            raise ConfigError(f"no {noun} given")
        for value in values:
            if not value >= least:
                raise ConfigError(f"{noun} {value}: expected {least} or more")
            if value > _MOST:
                raise ConfigError(f"{noun} {value}: expected {_MOST:,} or less")
    ranks, seeds = set(settings.ranks or task.ranks), set(settings.seeds_of(task))
    count = len(names) * len(ranks) * len(seeds)
    if count > _MOST_RUNS:
        raise ConfigError(
            f"{len(names)} methods x {len(ranks)} ranks x {len(seeds)} seeds "
            f"are {count:,} runs; expected {_MOST_RUNS:,} or less. Choose fewer with --methods, "
            "--ranks, --seeds"
        )
    if settings.dask is not None and settings.jobs is not None:
        raise ConfigError(
            f"--jobs {settings.jobs}: on a cluster the number of workers decides; leave it out, or "
            "--dask"
        )
    dtype = settings.dtype or task.dtype
    if dtype not in DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}. The dtypes are: {', '.join(DTYPES)}")
    _check_options(settings, task, names)
    return task


def _given(value: float | None) -> Sequence[float]:
    return () if value is None else (value,)


def _check_options(settings: Settings, task: Task, names: Sequence[str]) -> None:
    """Refuse options that none of the methods would heed.

    Raises:
        ConfigError: such an option, or a learning rate that is none.
    """
    methods = [METHODS[name] for name in names]
    heeded = {name: flag for m in methods for name, flag in RUNS[m.run].options.items()}
    known = {name: flag for run in RUNS.values() for name, flag in run.options.items()}
    for name, value in settings.given.items():
        if name not in heeded:
            raise ConfigError(
                f"{known.get(name, name)} {value}: none of the methods chosen heeds it; they take "
                f"{', '.join(heeded.values())}"
            )
    for name, lr in settings.lrs.items():
        if all(METHODS[hit].untuned_lr is None for hit in METHODS.select([name])):
            raise ConfigError(f"--lr {name}={lr:g}: {name} has no learning rate")
        if not 0 < lr <= LARGEST:
            raise ConfigError(f"learning rate {lr}: expected a positive number")
    device = resolve_device(settings.device)
    cpu_only = [method.name for method in methods if method.cpu_only]
    if device != "cpu" and cpu_only:
        raise ConfigError(
            f"{', '.join(cpu_only)} on {device}: computes on the CPU only; take --device cpu, or "
            "leave it out of --methods"
        )


def _spec(
    settings: Settings,
    task: Task,
    method_name: str,
    rank: int,
    seed: int,
    lr: float | None,
    purpose: str,
) -> RunSpec:
    method = METHODS[method_name]
    run = RUNS[method.run]
    common: dict[str, Any] = {
        "task": task.name,
        "data": task.data,
        "method": method.name,
        "parameterization": method.parameterization,
        "optimizer": method.optimizer,
        "momentum": method.momentum,
        "rank": run.rank_of(method, rank, settings.given),
        "seed": seed,
        "lr": None if lr is None else float(lr),
        "dtype": settings.dtype or task.dtype,
        "device": resolve_device(settings.device),
        "purpose": purpose,
    }
    own = run.spec_fields(task, method, lr, settings.given)
    names = {field.name for field in fields(RunSpec)}
    absent = dict.fromkeys(("spectrum", "epochs", "batch_size", "repeats", "schedule"))
    known = {name: value for name, value in own.items() if name in names}
    # What only other kinds of runs know.
    options = {name: value for name, value in own.items() if name not in names}
    return RunSpec(**{**absent, **common, **known, "options": options})


def plan(settings: Settings) -> list[Planned]:
    """The runs of a comparison. All methods of one seed come before the next seed.

    Raises:
        ConfigError: an unknown name or an impossible number.
    """
    task = _checked(settings)
    names = methods_for(task, settings.methods)
    tuned = load_tuned(task, settings.tuned_file)
    rates: dict[str, tuple[float | None, str | None]] = {}
    for name in names:
        given = [lr for pattern, lr in settings.lrs.items() if name in METHODS.select([pattern])]
        if METHODS[name].untuned_lr is None:
            rates[name] = (None, None)
        elif given:
            # The last one that fits wins, so that `all` can be followed by exceptions.
            rates[name] = (given[-1], "given")
        elif name in tuned:
            # Found for another network, it is a better guess than the method's, and no more.
            same = tuned[name].get("model") == settings.given.get("model")
            rates[name] = (tuned[name]["lr"], "tuned" if same else "untuned")
        else:
            rates[name] = (METHODS[name].untuned_lr, "untuned")
    return _once(
        Planned(_spec(settings, task, name, rank, seed, rates[name][0], "compare"), rates[name][1])
        for seed in dict.fromkeys(settings.seeds_of(task))
        for rank in dict.fromkeys(settings.ranks or task.ranks)
        for name in names
    )


def _once(runs: Iterable[Planned]) -> list[Planned]:
    """Each run once: those that no rank changes are planned at every rank."""
    return list({run.spec.hash: run for run in runs}.values())


def _grid(task: Task, name: str) -> Sequence[float]:
    return RUNS[METHODS[name].run].rates(task, METHODS[name])


def tuning_plan(
    settings: Settings, rates: Mapping[str, Sequence[float]] | None = None
) -> list[Planned]:
    """The runs that choose learning rates: the task's grid on the tuning seeds.

    Methods without a learning rate are left alone.

    Args:
        settings: what to compare, and where.
        rates: learning rates by method, in place of the grid; methods that are not among them have
            no runs then.

    Raises:
        ConfigError: as :func:`plan`, or a tuning seed is among the seeds to report.
    """
    task = _checked(settings)
    both = sorted(set(settings.seeds_of(task)) & set(settings.tuning_seeds))
    if both:
        raise ConfigError(
            f"seeds {both} are kept for tuning; learning rates chosen on the seeds that are "
            "reported would flatter them. Choose others with --seeds"
        )
    names = [
        name for name in methods_for(task, settings.methods) if METHODS[name].untuned_lr is not None
    ]
    if not names:
        raise ConfigError("--tune: none of the methods chosen has a learning rate")
    return _once(
        Planned(_spec(settings, task, name, rank, seed, lr, "tune"), "given")
        for seed in settings.tuning_seeds
        for rank in dict.fromkeys(settings.ranks or task.ranks)
        for name in names
        for lr in (_grid(task, name) if rates is None else rates.get(name, ()))
        if lr <= METHODS[name].largest_lr
    )
