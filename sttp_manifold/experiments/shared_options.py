"""The options that ``sttp compare`` and ``sttp gan`` have in common, each said once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from sttp_manifold.errors import ConfigError
from sttp_manifold.experiments.options import numbers
from sttp_manifold.experiments.records import Record

__all__ = [
    "RATES",
    "RUNS",
    "Dask",
    "DataDir",
    "Device",
    "Dtype",
    "Extensions",
    "Jobs",
    "Out",
    "Quiet",
    "Rates",
    "ShardOf",
    "TensorBoard",
    "Tune",
    "TunedFile",
    "TuningSeeds",
    "leave",
    "tuning",
]

RATES, RUNS = "Learning rates", "Runs"
"""Groups of options in the help of both commands."""

Rates = Annotated[
    list[str] | None,
    typer.Option(
        help="Learning rate of all methods, or METHOD=RATE. \\[the tuned ones]",
        rich_help_panel=RATES,
    ),
]
Device = Annotated[
    str, typer.Option(help="auto (a CUDA GPU if there is one), cpu or cuda.", rich_help_panel=RUNS)
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="float32 or float64. \\[the task's]", show_default=False, rich_help_panel=RUNS
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        help="Folder to write to. \\[runs/TASK]", show_default=False, rich_help_panel=RUNS
    ),
]
Jobs = Annotated[
    int | None,
    typer.Option(
        help="Runs at a time, one thread each; numbers do not depend on it. "
        "\\[one a core; one on a GPU]",
        show_default=False,
        rich_help_panel=RUNS,
    ),
]
ShardOf = Annotated[
    str | None,
    typer.Option(
        help="Do the third of sixteen parts, as in 3/16: one job of a batch system each, all "
        "with one --out. \\[all of it]",
        show_default=False,
        rich_help_panel=RUNS,
    ),
]
Dask = Annotated[
    str | None,
    typer.Option(
        help="Address of a Dask scheduler, on whose workers runs are done. \\[here]",
        show_default=False,
        rich_help_panel=RUNS,
    ),
]
TensorBoard = Annotated[
    bool,
    typer.Option(
        "--tensorboard",
        help="Log each run's curves to OUT/tensorboard as well.",
        rich_help_panel=RUNS,
    ),
]
Tune = Annotated[
    bool,
    typer.Option(
        "--tune",
        help="First choose each method's learning rate from the task's grid, on the "
        "validation split and seeds of its own, and keep it with the task.",
        rich_help_panel=RATES,
    ),
]
TuningSeeds = Annotated[
    list[str] | None,
    typer.Option(
        help="Seeds to choose rates on, none of them reported. \\[1000,1001]", rich_help_panel=RATES
    ),
]
Extensions = Annotated[
    int | None,
    typer.Option(
        help="With --tune: where the best rate is the first or last of a grid, go on beyond it by "
        "the grid's factor, a rate at a time, so many times at most. \\[2]",
        show_default=False,
        rich_help_panel=RATES,
    ),
]
TunedFile = Annotated[
    Path | None,
    typer.Option(
        help="Read (with --tune: write) learning rates here instead of with the task.",
        show_default=False,
        rich_help_panel=RATES,
    ),
]
DataDir = Annotated[
    Path | None,
    typer.Option(help="Folder of the task's data files.", show_default=False, rich_help_panel=RUNS),
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress, no table.", rich_help_panel=RUNS)
]


def leave(records: Sequence[Record]) -> None:
    """End the command with an exit code that says whether a run failed, or all diverged.

    A shard may have no run, and processes beside the first of torchrun keep no records.
    """
    statuses = [record["status"] for record in records]
    if "failed" in statuses or (statuses and "ok" not in statuses):
        raise typer.Exit(1)


def tuning(tune: bool, seeds: Sequence[str] | None, extensions: int | None) -> dict[str, Any]:
    """The settings of tuning, of the options that were given.

    Args:
        tune: whether learning rates are chosen.
        seeds: as they were typed.
        extensions: of the grid; None stands for the default, like the seeds.

    Raises:
        ConfigError: an option that nothing would heed.
    """
    given = {"--tuning-seeds": seeds, "--extensions": extensions}
    idle = [flag for flag, value in given.items() if value is not None]
    if idle and not tune:
        raise ConfigError(
            f"{' and '.join(idle)}: only tuning heeds that; add --tune, or leave it out"
        )
    chosen = {"tuning_seeds": numbers(seeds, "--tuning-seeds"), "extensions": extensions}
    return {name: value for name, value in chosen.items() if value is not None}
