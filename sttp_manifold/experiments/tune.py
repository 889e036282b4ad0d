"""Learning rates: one grid for all methods, judged on the validation split, kept with the task.

Equal learning rates would be unfair: a step of one length in a chart, on a manifold and in the
dense weight are three different steps, and Riemannian Adam scales a whole frame by one number.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import tempfile
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from sttp_manifold.errors import ConfigError
from sttp_manifold.experiments.files import file_name, locked, named_errors, unlinking, write_text
from sttp_manifold.experiments.json_values import LARGEST, check_numbers, check_words, loads
from sttp_manifold.experiments.reading.result_table import average
from sttp_manifold.experiments.records import Record, read_for
from sttp_manifold.experiments.task import Task

__all__ = [
    "EXTENSIONS",
    "TUNING_SEEDS",
    "best_rate",
    "check_writable",
    "load_tuned",
    "rate_beyond",
    "save_tuned",
    "tuned_path",
]

# Far from the seeds that anyone reports.
TUNING_SEEDS = (1000, 1001)

# How often a grid grows towards a best rate at its edge.
EXTENSIONS = 2

_FOLDER = Path(__file__).with_name("tuned")
_SCHEMA = 1
_SMALLEST = 1 / LARGEST
_NAME_ANOTHER = "cannot keep rates there; name another file with --tuned-file"


def tuned_path(task: str, given: Path | None = None) -> Path:
    """Where a task's learning rates are kept: with the package, unless a file is given."""
    return given or _FOLDER / f"{file_name(task)}.json"


def load_tuned(task: Task, given: Path | None = None) -> dict[str, dict[str, Any]]:
    """What was found for each method of a task; nothing for data that has changed since.

    Raises:
        ConfigError: the file that was given is not there, or is no such file.
    """
    path = tuned_path(task.name, given)
    with named_errors(path, "name another file with --tuned-file"):
        if not path.exists():
            if given is not None:
                raise ConfigError(f"no tuned rates in {path}; make them with `sttp compare --tune`")
            return {}
        text = path.read_bytes()
    try:
        content = loads(text)
        if content["schema"] != _SCHEMA:
            raise ValueError(f"schema {content['schema']}, expected {_SCHEMA}")
        if content["task"] != task.name:
            raise ValueError(f"rates of the task {content['task']!r}, expected {task.name!r}")
        methods: dict[str, dict[str, Any]] = content["methods"]
        for name, found in methods.items():
            check_words("method", [name])
            check_numbers(f"learning rate of {name}", [found["lr"]], least=_SMALLEST)
            if not isinstance(found["at_edge"], bool):
                raise ValueError(f"at_edge of {name} is no truth value")
            check_words(f"model of {name}", [found.get("model") or ""])
            for key in ("epochs", "max_evaluations", "steps"):
                check_numbers(f"{key} of {name}", [found.get(key)], null=True, least=0)
            for key in ("ranks", "seeds"):
                check_numbers(f"{key} of {name}", found.get(key, []), whole=True, least=0)
        same = content["data"] == task.data
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"no field {error}" if isinstance(error, KeyError) else str(error)
        raise ConfigError(
            f"{path} is no file of tuned rates: {why}; make one with `sttp compare --tune "
            "--tuned-file` and a new name"
        ) from error
    return methods if same else {}


def check_writable(task: Task, given: Path | None = None) -> None:
    """Find out before hours of tuning whether what they find can be kept.

    Raises:
        ConfigError: the file cannot be written, or what is there is no file of tuned rates.
    """
    path = tuned_path(task.name, given)
    with named_errors(path, _NAME_ANOTHER), locked(path):
        if path.exists():
            load_tuned(task, path)
            path.open("ab").close()
        descriptor, name = tempfile.mkstemp(prefix=f".{path.stem}-", dir=path.parent)
        with os.fdopen(descriptor, "wb") as file, unlinking(Path(name)):
            # A folder may take names, and its disk no content.
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())


def save_tuned(task: Task, found: dict[str, dict[str, Any]], given: Path | None = None) -> Path:
    """Keep what was found; methods that were not tuned this time keep what they had.

    One process at a time reads, adds to and replaces the file.

    Raises:
        ConfigError: the file cannot be written.
    """
    path = tuned_path(task.name, given)
    with named_errors(path, _NAME_ANOTHER), locked(path):
        before = load_tuned(task, given) if path.exists() else {}
        content = {
            "schema": _SCHEMA,
            "task": task.name,
            "data": task.data,
            "methods": {**before, **found},
        }
        write_text(path, json.dumps(content, indent=1) + "\n")
    return path


def best_rate(task: Task, records: Iterable[Record]) -> dict[str, Any] | None:
    """The best learning rate in the tuning records of one method, and how it was found.

    Of a solver, the rate that reaches the target in every run with the fewest evaluations; where
    none does, and of methods that train:

    Best is the best metric on the validation split after the last epoch, averaged over ranks and
    tuning seeds (geometrically where the metric is logarithmic); the lower validation loss breaks
    a tie. A rate at which a run did not finish is out; None when that is all of them.
    """
    by_lr: dict[float, list[Record]] = {}
    for record in records:
        by_lr.setdefault(record["spec"]["lr"], []).append(record)
    grid: list[dict[str, Any]] = []
    for lr in sorted(by_lr):
        group = by_lr[lr]
        ok = [record for record in group if record["status"] == "ok"]
        entry: dict[str, Any] = {"lr": lr, "runs": len(group), "unfinished": len(group) - len(ok)}
        if ok:
            values = [record["val_metric"] for record in ok]
            losses = [record["curves"]["val_loss"][-1] for record in ok]
            entry["val_metric"] = float(f"{average(values, log=task.metric.log):.7g}")
            entry["val_loss"] = float(f"{statistics.fmean(losses):.7g}")
            spent = [
                record["effort"]["evaluations_to_target"]
                for record in ok
                if read_for(record, "effort")
            ]
            if spent and None not in spent:
                entry["evaluations_to_target"] = statistics.fmean(spent)
        grid.append(entry)
    whole = [entry for entry in grid if not entry["unfinished"]]
    if not whole:
        return None
    first = next(iter(by_lr.values()))[0]
    sign = -1.0 if task.metric.higher else 1.0

    def worth(entry: dict[str, Any]) -> tuple[float, float, float]:
        # Solvers stop at their target: among rates that got there, the soonest is the best.
        soon = entry.get("evaluations_to_target", math.inf)
        value = sign * entry["val_metric"] if math.isinf(soon) else 0.0
        return (soon, value, entry["val_loss"])

    best = min(whole, key=worth)
    everything = [record for group in by_lr.values() for record in group]
    return {
        "lr": best["lr"],
        # The optimum may lie beyond: a reader should know.
        "at_edge": best["lr"] in (grid[0]["lr"], grid[-1]["lr"]),
        "chosen_by": f"{task.metric.name} on the validation split after the last epoch",
        "grid": grid,
        "ranks": sorted({record["spec"]["rank"] for record in everything}),
        "seeds": sorted({record["spec"]["seed"] for record in everything}),
        "model": first["spec"].get("options", {}).get("model"),
        "epochs": first["spec"]["epochs"],
        "max_evaluations": first["spec"].get("max_evaluations"),
        "steps": first["spec"].get("options", {}).get("steps"),
        "batch_size": first["spec"]["batch_size"],
        "schedule": first["spec"]["schedule"],
        "dtype": first["spec"]["dtype"],
        "device": first["device"],
        "versions": first["versions"],
        "when": datetime.now(timezone.utc).date().isoformat(),
    }


def rate_beyond(found: Mapping[str, Any]) -> float | None:
    """The rate to try next where the best lies at an edge of its grid; None where it does not.

    It is as far from the edge as the edge from its neighbour, by factor. A grid of one rate has no
    factor, and no edge to go beyond.

    Args:
        found: what :func:`best_rate` gave.

    >>> rate_beyond({"lr": 0.3, "at_edge": True, "grid": [{"lr": 0.03}, {"lr": 0.1}, {"lr": 0.3}]})
    0.9
    """
    tried = [point["lr"] for point in found["grid"]]
    if not found["at_edge"] or len(tried) < 2:
        return None
    edge, inner = tried[:2] if found["lr"] == tried[0] else tried[:-3:-1]
    beyond = float(f"{edge * edge / inner:.3g}")
    return beyond if _SMALLEST <= beyond <= LARGEST else None
