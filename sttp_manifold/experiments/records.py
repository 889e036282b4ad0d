"""Records: one JSON line a run, appended, and their schema.

The schema lives in :data:`SCHEMA` and is written out for readers in ``docs/records.md``.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from sttp_manifold.errors import ConfigError
from sttp_manifold.experiments.specs import RunSpec

__all__ = [
    "CURVES",
    "DONE",
    "EFFORT",
    "SCHEMA",
    "SCHEMA_VERSION",
    "STATUSES",
    "Field",
    "Record",
    "RecordFile",
    "latest",
    "read_records",
    "rounded",
    "validate",
]

Record = dict[str, Any]

SCHEMA_VERSION = 2
STATUSES = ("ok", "diverged", "failed")

# A diverged run would diverge again, so it is a result; a failed one (an error in the machinery,
# a machine without memory) is worth another try.
DONE = ("ok", "diverged")


@dataclass(frozen=True)
class Field:
    """One field of a record.

    Attributes:
        types: the Python types that ``json.loads`` may give for it.
        meaning: one line for people.
        nullable: whether it may be null.
    """

    types: tuple[type, ...]
    meaning: str
    nullable: bool = False


_NUMBER = (int, float)

SCHEMA: dict[str, Field] = {
    "schema": Field((int,), "version of this schema"),
    "hash": Field((str,), "sixteen hexadecimal digits of the specification's SHA-256"),
    "status": Field((str,), "ok, diverged or failed"),
    "reason": Field((str,), "why a run is not ok", nullable=True),
    "spec": Field((dict,), "full specification: everything that decides the numbers"),
    "lr_source": Field(
        (str,), "where the learning rate came from: tuned, given or untuned", nullable=True
    ),
    "versions": Field((dict,), "python, torch, geoopt, numpy and the package"),
    "device": Field((str,), "the device in words"),
    "started": Field((str,), "UTC time at which the run started, ISO 8601"),
    "seconds": Field(_NUMBER, "wall time of the whole run, evaluation included"),
    "metric": Field((dict,), "name, unit, direction, axis and number format of the metric"),
    "examples": Field((dict,), "sizes of the train, val and test splits"),
    "stored_parameters": Field((int,), "numbers trained in the compressed weights", nullable=True),
    "dimension": Field((int,), "dimension of the set of weights", nullable=True),
    "dense_elements": Field((int,), "elements of the same weights when dense", nullable=True),
    "other_parameters": Field((int,), "numbers trained besides: biases", nullable=True),
    "w0_digest": Field((str,), "SHA-256 of the common initial weights", nullable=True),
    "w0_gap": Field(_NUMBER, "largest entry of |W - W0| at the start", nullable=True),
    "curves": Field((dict,), "lists over epochs or iterates, the initial state first"),
    "spectra": Field((dict,), "for each layer, singular values at each entry of the curves"),
    "effort": Field((dict,), "what the run spent, and when it reached its target", nullable=True),
    "val_metric": Field(_NUMBER, "metric on the validation split at the end", nullable=True),
    "test_loss": Field(_NUMBER, "loss on the test split, once, at the end", nullable=True),
    "test_metric": Field(_NUMBER, "metric on the test split, once, at the end", nullable=True),
}

CURVES: dict[str, str] = {
    "epoch": "0 for the initial state, then 1, 2, …; null for solvers",
    "iteration": "steps or iterations so far",
    "evaluations": "calls of the cost or loss function so far",
    "seconds": "training time so far, evaluation left out",
    "train_loss": "mean over the epoch's steps; at epoch 0, and for solvers, over the whole split",
    "val_loss": "mean over the validation split",
    "val_metric": "metric on the validation split",
    "drift": "largest |Q^T Q - I| over all frames, in float64; null for dense weights",
    "lr": "learning rate of the epoch's last step; at epoch 0, of the first; null for solvers",
}

EFFORT: dict[str, str] = {
    "target": "relative residual on the observed entries that was to be reached",
    "residual": "the one at the end",
    "iterations": "iterations, or steps",
    "evaluations": "calls of the cost or loss function that moved the run on",
    "gradients": "gradients computed",
    "hessian_products": "products of the Hessian and a vector computed",
    "iterations_to_target": "iterations at the first iterate that met the target; null for none",
    "evaluations_to_target": "evaluations at that iterate",
    "seconds_to_target": "seconds at that iterate, evaluation left out",
    "stopped": "why the run ended, in words",
}


def validate(record: Mapping[str, Any]) -> None:
    """Check a record against the schema.

    Raises:
        ConfigError: says which field is wrong, and how.
    """
    odd = set(SCHEMA).symmetric_difference(record)
    if odd:
        raise ConfigError(f"a record with missing or unknown fields: {', '.join(sorted(odd))}")
    for name, field in SCHEMA.items():
        value = record[name]
        if value is None and field.nullable:
            continue
        if not isinstance(value, field.types) or isinstance(value, bool):
            wanted = " or ".join(t.__name__ for t in field.types)
            raise ConfigError(f"record field {name!r} holds {value!r}; expected {wanted}")
    if record["schema"] != SCHEMA_VERSION:
        raise ConfigError(
            f"a record of schema {record['schema']}; this version reads schema {SCHEMA_VERSION}"
        )
    if record["status"] not in STATUSES:
        raise ConfigError(f"record status {record['status']!r}; expected one of {STATUSES}")
    if (record["reason"] is None) != (record["status"] == "ok"):
        raise ConfigError("a record has a reason exactly when its status is not ok")
    if RunSpec.from_dict(record["spec"]).hash != record["hash"]:
        raise ConfigError(f"record {record['hash']} does not carry the hash of its specification")
    effort = record["effort"]
    if effort is not None and set(effort) != set(EFFORT):
        raise ConfigError(f"record effort has {sorted(effort)}; expected {sorted(EFFORT)}")
    curves = record["curves"]
    if set(curves) != set(CURVES):
        raise ConfigError(f"record curves are {sorted(curves)}; expected {sorted(CURVES)}")
    lengths = {len(values) for values in (*curves.values(), *record["spectra"].values())}
    if len(lengths) > 1:
        raise ConfigError(f"record curves and spectra have different lengths: {sorted(lengths)}")


def upgraded(record: Any) -> Any:
    """A record of schema 1 as one of this schema, where it says nothing of effort."""
    if not isinstance(record, dict) or record.get("schema") != 1:
        return record
    curves = record["curves"]
    unknown = [None] * len(curves["epoch"])
    curves = {"iteration": unknown, "evaluations": unknown, **curves}
    return {**record, "schema": SCHEMA_VERSION, "effort": None, "curves": curves}


def rounded(value: Any, digits: int = 7) -> Any:
    """Floats to a number of significant digits, non-finite ones to None, through lists and dicts.

    Seven digits are all that float32 has, and keep a record a quarter of its size.
    """
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item, digits) for item in value]
    return value


def latest(records: Iterable[Record]) -> list[Record]:
    """One record a hash, the last one written, in the order of first appearance."""
    found: dict[str, Record] = {}
    for record in records:
        found[record["hash"]] = record
    return list(found.values())


def read_records(path: Path) -> tuple[list[Record], int]:
    """Records of a file, and how many bytes at its end are a torn line.

    A process that is killed while it writes leaves at most one torn line, the last one.

    Raises:
        ConfigError: a line that is not the last one is no record.
    """
    if not path.exists():
        return [], 0
    content = path.read_bytes()
    records: list[Record] = []
    start = 0
    while start < len(content):
        end = content.find(b"\n", start)
        if end < 0:
            return records, len(content) - start
        line = content[start:end]
        try:
            record = upgraded(json.loads(line))
            validate(record)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if end + 1 == len(content) and not isinstance(error, ConfigError):
                return records, len(content) - start
            number = content.count(b"\n", 0, start) + 1
            raise ConfigError(
                f"{path}, line {number} is no record ({error}); move the file away, or name "
                "another folder with --out"
            ) from error
        records.append(record)
        start = end + 1
    return records, 0


class RecordFile:
    """A file of records, open for appending by one process at a time.

    Opening reads what is there and cuts off a torn last line. Every record reaches the disk
    before :meth:`append` returns.

    Args:
        path: the file; it and its folder are made when they are not there.

    Attributes:
        records: every record of the file.
        torn_bytes: length of the torn line that was cut off, 0 for none.

    Raises:
        ConfigError: another process has it open, or a line is no record.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO = path.open("ab")
        try:
            _lock(self._file, path)
            self.records, self.torn_bytes = read_records(path)
            if self.torn_bytes:
                self._file.truncate(path.stat().st_size - self.torn_bytes)
        except BaseException:
            self._file.close()
            raise

    def append(self, record: Record) -> None:
        """Check a record and add it as one line.

        Raises:
            ConfigError: the record does not follow the schema.
        """
        validate(record)
        line = json.dumps(record, separators=(",", ":"), allow_nan=False) + "\n"
        self._file.write(line.encode("utf-8"))
        self._file.flush()
        os.fsync(self._file.fileno())
        self.records.append(record)

    def close(self) -> None:
        """Let the file go."""
        self._file.close()

    def __enter__(self) -> RecordFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _lock(file: BinaryIO, path: Path) -> None:
    """Take the file for this process, where the system has such locks."""
    try:
        import fcntl
    except ImportError:  # pragma: no cover - not a POSIX system
        return
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise ConfigError(
            f"another process writes {path}; wait for it, or name another folder with --out"
        ) from error
