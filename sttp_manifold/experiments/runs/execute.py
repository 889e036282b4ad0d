"""One run: from a specification to a record."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

import torch

from sttp_manifold.errors import FrameOverflowError, OffManifoldError
from sttp_manifold.experiments.checkpoint import Checkpoint
from sttp_manifold.experiments.distributed import is_first, processes
from sttp_manifold.experiments.method import Method
from sttp_manifold.experiments.records import SCHEMA_VERSION, Record, rounded
from sttp_manifold.experiments.runs.board import Board
from sttp_manifold.experiments.runs.contract import Run
from sttp_manifold.experiments.runs.device import DTYPES, device_in_words, one_thread, versions
from sttp_manifold.experiments.runs.kinds import RUNS
from sttp_manifold.experiments.runs.pulse import Pulse
from sttp_manifold.experiments.runs.trace import DivergedError
from sttp_manifold.experiments.specs import RunSpec
from sttp_manifold.experiments.task import Task

__all__ = ["execute"]

# What a run may not live to tell.
_FACTS = (
    *("stored_parameters", "dimension", "dense_elements", "other_parameters"),
    *("w0_digest", "w0_gap"),
)
_ENDS = ("val_metric", "test_loss", "test_metric")


def execute(
    spec: RunSpec,
    task: Task,
    method: Method,
    lr_source: str | None,
    data_dir: Path | None = None,
    checkpoint: Checkpoint | None = None,
    pulse: Pulse | None = None,
    board: Board | None = None,
) -> Record:
    """Do one run. It always gives a record, whose status says how the run went.

    Args:
        spec: what is to be done.
        task: what on.
        method: by what.
        lr_source: where the learning rate came from.
        data_dir: folder of the task's files.
        checkpoint: where its state is kept from time to time, and taken up again.
        pulse: where it is said how far it is.
        board: where its curves are logged.

    Raises:
        ConfigError: the task's data is not there.
    """
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    begin = time.perf_counter()
    run = RUNS[method.run].of(spec, task, method, data_dir)
    with one_thread(), _own_noise(spec.device):
        status, reason, end = _outcome(run, checkpoint, pulse, board)
        if status == "ok" and checkpoint and is_first():
            checkpoint.leave(run.products())
    effort = run.trace.effort
    return {
        "schema": SCHEMA_VERSION,
        "hash": spec.hash,
        "run": run.kind,
        "reads": list(run.reads),
        "status": status,
        "reason": reason,
        "spec": spec.to_dict(),
        "lr_source": lr_source,
        "versions": versions(),
        "device": device_in_words(spec.device),
        "started": started,
        "seconds": rounded(time.perf_counter() - begin),
        "metric": asdict(task.metric),
        "examples": run.examples,
        **dict.fromkeys(_FACTS),
        "own": {},
        **rounded(run.trace.facts),
        "curves": rounded(run.trace.curves),
        "spectra": rounded(run.trace.spectra, digits=5),
        "effort": None if effort is None else rounded(effort.to_dict()),
        **dict.fromkeys(_ENDS),
        **end,
    }


def _own_noise(device: str) -> AbstractContextManager[None]:
    """What a run draws is its own: the caller's generators are as they were when it ends."""
    return torch.random.fork_rng([torch.cuda.current_device()] if device == "cuda" else [])


def _outcome(
    run: Run, checkpoint: Checkpoint | None, pulse: Pulse | None, board: Board | None
) -> tuple[str, str | None, dict[str, float | None]]:
    """Status, reason and the numbers of the end; every error of a run is its record's reason."""
    try:
        run.begin(torch.device(run.spec.device), DTYPES[run.spec.dtype])
        if checkpoint and checkpoint.resume(run) and board:
            board.goes_on(run.trace)
        more = True
        while more:
            if board:
                board.look(run.trace)
            more = run.advance()
            if more and checkpoint:
                checkpoint.look(run)
            if more and pulse:
                pulse.look(run.progress)
        end: dict[str, float | None] = rounded(run.end())
        if board:
            board.look(run.trace)
    except (DivergedError, FrameOverflowError, OffManifoldError) as error:
        return "diverged", str(error), {}
    except torch.linalg.LinAlgError as error:
        # A factorization of numbers that are no longer numbers, or nearly so.
        return "diverged", f"linear algebra: {error}", {}
    except Exception as error:
        if processes() > 1:
            # The others would wait for this one; torchrun ends them all.
            raise
        return "failed", f"{type(error).__name__}: {error}", {}
    finally:
        if board:
            board.close()
        if pulse:
            pulse.remove()
    lost = [name for name, value in end.items() if value is None]
    if lost:
        return "diverged", f"not finite at the end: {', '.join(lost)}", end
    return "ok", None, end
