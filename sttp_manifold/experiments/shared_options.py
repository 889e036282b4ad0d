"""The options that ``sttp compare`` and ``sttp gan`` have in common, each said once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from sttp_manifold.experiments.records import Record

__all__ = [
    "Dask",
    "DataDir",
    "Device",
    "Dtype",
    "Jobs",
    "Out",
    "Quiet",
    "Rates",
    "ShardOf",
    "TensorBoard",
    "TunedFile",
    "TuningSeeds",
    "leave",
]

Rates = Annotated[
    list[str] | None,
    typer.Option(help="Learning rate of all methods, or METHOD=RATE. \\[the tuned ones]"),
]
Device = Annotated[str, typer.Option(help="auto (a CUDA GPU if there is one), cpu or cuda.")]
Dtype = Annotated[
    str | None, typer.Option(help="float32 or float64. \\[the task's]", show_default=False)
]
Out = Annotated[
    Path | None, typer.Option(help="Folder to write to. \\[runs/TASK]", show_default=False)
]
Jobs = Annotated[
    int | None,
    typer.Option(
        help="Runs at a time, one thread each; numbers do not depend on it. "
        "\\[one a core; one on a GPU]",
        show_default=False,
    ),
]
ShardOf = Annotated[
    str | None,
    typer.Option(
        help="Do the third of sixteen parts, as in 3/16: one job of a batch system each, all "
        "with one --out. \\[all of it]",
        show_default=False,
    ),
]
Dask = Annotated[
    str | None,
    typer.Option(
        help="Address of a Dask scheduler, on whose workers runs are done. \\[here]",
        show_default=False,
    ),
]
TensorBoard = Annotated[
    bool,
    typer.Option("--tensorboard", help="Log each run's curves to OUT/tensorboard as well."),
]
TuningSeeds = Annotated[
    list[str] | None,
    typer.Option(help="Seeds to choose rates on, none of them reported. \\[1000,1001]"),
]
TunedFile = Annotated[
    Path | None,
    typer.Option(
        help="Read (with --tune: write) learning rates here instead of with the task.",
        show_default=False,
    ),
]
DataDir = Annotated[
    Path | None, typer.Option(help="Folder of the task's data files.", show_default=False)
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no table.")]


def leave(records: Sequence[Record]) -> None:
    """End the command with an exit code that says whether a run failed, or all diverged.

    A shard may have no run, and processes beside the first of torchrun keep no records.
    """
    statuses = [record["status"] for record in records]
    if "failed" in statuses or (statuses and "ok" not in statuses):
        raise typer.Exit(1)
