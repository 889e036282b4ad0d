"""One run: from a specification to a record."""

from __future__ import annotations

import time
from datetime import datetime, timezone
from pathlib import Path

import torch

from sttp_manifold.errors import FrameOverflowError
from sttp_manifold.experiments.checkpoint import Checkpoint
from sttp_manifold.experiments.method import Method
from sttp_manifold.experiments.records import SCHEMA_VERSION, Record, rounded
from sttp_manifold.experiments.runs.device import DTYPES, device_in_words, one_thread, versions
from sttp_manifold.experiments.runs.kinds import RUNS
from sttp_manifold.experiments.runs.trace import DivergedError
from sttp_manifold.experiments.specs import RunSpec
from sttp_manifold.experiments.task import Task

__all__ = ["execute"]


def execute(
    spec: RunSpec,
    task: Task,
    method: Method,
    lr_source: str | None,
    data_dir: Path | None = None,
    checkpoint: Checkpoint | None = None,
) -> Record:
    """Do one run. It always gives a record, whose status says how the run went.

    Args:
        spec: what is to be done.
        task: what on.
        method: by what.
        lr_source: where the learning rate came from.
        data_dir: folder of the task's files.
        checkpoint: where its state is kept from time to time, and taken up again.

    Raises:
        ConfigError: the task's data is not there.
    """
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    begin = time.perf_counter()
    status, reason, end = "ok", None, {}
    run = RUNS[method.run].of(spec, task, method, data_dir)
    with one_thread():
        try:
            run.begin(torch.device(spec.device), DTYPES[spec.dtype])
            if checkpoint:
                checkpoint.resume(run)
            more = True
            while more:
                more = run.advance()
                if checkpoint and more:
                    checkpoint.look(run)
            end = run.end()
        except (DivergedError, FrameOverflowError) as error:
            status, reason = "diverged", str(error)
        except torch.linalg.LinAlgError as error:
            # A factorization of numbers that are no longer numbers, or nearly so.
            status, reason = "diverged", f"linear algebra: {error}"
        except Exception as error:
            status, reason = "failed", f"{type(error).__name__}: {error}"
    end = rounded(end)
    if status == "ok" and None in end.values():
        names = ", ".join(name for name, value in end.items() if value is None)
        status, reason = "diverged", f"at the end not finite: {names}"
    facts = dict.fromkeys(
        (
            "stored_parameters",
            "dimension",
            "dense_elements",
            "other_parameters",
            "w0_digest",
            "w0_gap",
        )
    )
    ends = dict.fromkeys(("val_metric", "test_loss", "test_metric"))
    metric = task.metric
    record: Record = {
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
        "metric": {
            "name": metric.name,
            "unit": metric.unit,
            "higher": metric.higher,
            "log": metric.log,
            "spec": metric.spec,
        },
        "examples": run.examples,
        **facts,
        **rounded(run.trace.facts),
        "curves": rounded(run.trace.curves),
        "spectra": rounded(run.trace.spectra, digits=5),
        "effort": None if run.trace.effort is None else rounded(run.trace.effort.to_dict()),
        **ends,
        **end,
    }
    return record
