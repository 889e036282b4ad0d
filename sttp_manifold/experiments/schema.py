"""The schema of records, and what is checked of one.

It is written out for readers in ``docs/records.md``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sttp_manifold.errors import ConfigError
from sttp_manifold.experiments.json_values import check_numbers, check_words, short
from sttp_manifold.experiments.specs import RunSpec

__all__ = [
    "CURVES",
    "EFFORT",
    "SCHEMA",
    "SCHEMA_VERSION",
    "STATUSES",
    "Field",
    "upgraded",
    "validate",
]

SCHEMA_VERSION = 4
STATUSES = ("ok", "diverged", "failed")


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
    "run": Field((str,), "kind of run: train, solve, gan, or one of somebody's own"),
    "reads": Field((list,), "what it is read for: score, curves, effort, gan"),
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
    "own": Field((dict,), "numbers, texts and lists of them that only this kind of run has"),
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

_METRIC: dict[str, type] = {"name": str, "unit": str, "higher": bool, "log": bool, "spec": str}
_SPLITS = ("train", "val", "test")
# Numbers that are never null where there is an entry at all.
_ALWAYS = {"seconds", "target", "iterations", "evaluations", "gradients", "hessian_products"}
_FORMAT = re.compile(r",?(\.\d{1,2})?[defg]")


def validate(record: Mapping[str, Any]) -> None:
    """Check a record against the schema: fields, their types, and that its numbers are numbers.

    Raises:
        ConfigError: says which field is wrong, and how.
    """
    _check_fields(record)
    if record["status"] not in STATUSES:
        raise ConfigError(f"record status {record['status']!r}; expected one of {STATUSES}")
    if (record["reason"] is None) != (record["status"] == "ok"):
        raise ConfigError("a record has a reason exactly when its status is not ok")
    spec = RunSpec.from_dict(record["spec"])
    if spec.hash != record["hash"]:
        raise ConfigError(f"record {record['hash']} does not carry the hash of its specification")
    check_words("record device", [record["device"]])
    check_words("record run", [record["run"]])
    check_words("record reads", record["reads"])
    if "effort" in record["reads"] and record["status"] == "ok" and record["effort"] is None:
        raise ConfigError("a record that is read for its effort without one")
    check_words("record versions", [*record["versions"], *record["versions"].values()])
    _check_metric(record["metric"])
    _check_keys("examples", record["examples"], _SPLITS)
    check_numbers("record examples", record["examples"].values(), least=0)
    _check_own(record["own"])
    effort = record["effort"]
    if effort is not None:
        _check_keys("effort", effort, EFFORT)
        for name in set(EFFORT) - {"stopped"}:
            values = [effort[name]]
            check_numbers(f"record effort {name}", values, null=name not in _ALWAYS, least=0)
    _check_curves(record["curves"], record["spectra"])
    _check_end(record, spec)


def _check_fields(record: Mapping[str, Any]) -> None:
    odd = set(SCHEMA).symmetric_difference(record)
    if odd:
        raise ConfigError(f"a record with missing or unknown fields: {', '.join(sorted(odd))}")
    for name, field in SCHEMA.items():
        value = record[name]
        if value is None and field.nullable:
            continue
        if not isinstance(value, field.types) or isinstance(value, bool):
            wanted = " or ".join(t.__name__ for t in field.types)
            raise ConfigError(f"record field {name!r} holds {short(value)}; expected {wanted}")
        if field.types in (_NUMBER, (int,)):
            check_numbers(f"record field {name!r}", [value])
    if record["schema"] != SCHEMA_VERSION:
        raise ConfigError(
            f"a record of schema {record['schema']}; this version reads schema {SCHEMA_VERSION}"
        )


def _check_keys(noun: str, found: Mapping[str, Any], wanted: Iterable[str]) -> None:
    if set(found) != set(wanted):
        raise ConfigError(f"record {noun} has {sorted(found)}; expected {sorted(wanted)}")


def _check_metric(metric: Mapping[str, Any]) -> None:
    _check_keys("metric", metric, _METRIC)
    for name, kind in _METRIC.items():
        if not isinstance(metric[name], kind):
            raise ConfigError(
                f"record metric {name!r} holds {short(metric[name])}; expected {kind.__name__}"
            )
    check_words("record metric", [metric["name"], metric["unit"]])
    if not _FORMAT.fullmatch(metric["spec"]):
        raise ConfigError(f"record metric 'spec' holds {short(metric['spec'])}; expected as .2f")


def _check_own(own: Mapping[str, Any]) -> None:
    check_words("record own", list(own))
    for name, value in own.items():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, str):
                check_words(f"record own {name!r}", [item])
            else:
                check_numbers(f"record own {name!r}", [item], null=True)


def _check_curves(curves: Mapping[str, Any], spectra: Mapping[str, Any]) -> None:
    # A kind of run may have more than those that all have.
    if not set(CURVES) <= set(curves):
        raise ConfigError(f"record curves are {sorted(curves)}; expected {sorted(CURVES)}")
    check_words("record curves", list(curves))
    for name, values in (*curves.items(), *spectra.items()):
        if not isinstance(values, list):
            raise ConfigError(f"record curve {name!r} holds {short(values)}; expected a list")
    lengths = {len(values) for values in (*curves.values(), *spectra.values())}
    if len(lengths) > 1:
        raise ConfigError(f"record curves and spectra have different lengths: {sorted(lengths)}")
    for name, values in curves.items():
        check_numbers(f"record curve {name!r}", values, null=name not in _ALWAYS - {"evaluations"})
    check_words("record spectra", list(spectra))
    for name, lists in spectra.items():
        sizes = {len(values) if isinstance(values, list) else 0 for values in lists}
        if len(sizes) > 1 or 0 in sizes:
            raise ConfigError(f"record spectrum {name!r}: expected lists of one length")
        for values in lists:
            check_numbers(f"record spectrum {name!r}", values, null=True)


def _check_end(record: Mapping[str, Any], spec: RunSpec) -> None:
    """A run that is ok has come to its end, and what it ended with is there."""
    if record["status"] != "ok":
        return
    ends = ["val_metric"] if spec.purpose == "tune" else ["val_metric", "test_metric", "test_loss"]
    absent = [name for name in ends if record[name] is None]
    if not record["curves"]["seconds"]:
        absent.append("curves")
    elif record["curves"]["val_loss"][-1] is None:
        absent.append("curves val_loss")
    if absent:
        raise ConfigError(f"a record that is ok without {', '.join(absent)}")


def upgraded(record: Any) -> Any:
    """A record of an older schema as one of this schema."""
    if not isinstance(record, dict):
        return record
    if record.get("schema") == 1:
        curves = record["curves"]
        unknown = [None] * len(curves["epoch"])
        curves = {"iteration": unknown, "evaluations": unknown, **curves}
        record = {**record, "schema": 2, "effort": None, "curves": curves}
    if record.get("schema") == 2:
        # There were two kinds of runs, told apart by this field.
        solves = record["spec"]["epochs"] is None
        reads = ["effort"] if solves else ["score", "curves"]
        run = "solve" if solves else "train"
        record = {**record, "schema": 3, "run": run, "reads": reads}
    if record.get("schema") == 3:
        record = {**record, "schema": SCHEMA_VERSION, "own": {}}
    return record
