from __future__ import annotations

import json
import math
import re
from dataclasses import fields
from pathlib import Path

import pytest

from sttp_manifold.errors import ConfigError
from sttp_manifold.experiments import files, records
from sttp_manifold.experiments.specs import RunSpec

from .test_specs import SPEC

PAGE = Path(__file__).parents[2] / "docs" / "records.md"


def a_record(seed: int = 0, **changes: object) -> records.Record:
    spec = RunSpec.from_dict({**SPEC.to_dict(), "seed": seed})
    record: records.Record = {
        "schema": 2,
        "hash": spec.hash,
        "status": "ok",
        "reason": None,
        "spec": spec.to_dict(),
        "lr_source": "tuned",
        "versions": {"python": "3.12"},
        "device": "cpu",
        "started": "2024-01-01T00:00:00+00:00",
        "seconds": 1.5,
        "metric": {"name": "accuracy", "unit": "%", "higher": True, "log": False, "spec": ".2f"},
        "examples": {"train": 10, "val": 5, "test": 5},
        "stored_parameters": 10,
        "dimension": 8,
        "dense_elements": 20,
        "other_parameters": 3,
        "w0_digest": "0",
        "w0_gap": 0.0,
        "curves": {name: [0, 1] for name in records.CURVES},
        "spectra": {"0": [[1.0, 0.5], [2.0, 0.5]]},
        "effort": None,
        "val_metric": 90.0,
        "test_loss": 0.3,
        "test_metric": 91.0,
    }
    return {**record, **changes}


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "deep" / "records.jsonl"
    written = [a_record(seed) for seed in range(3)]
    with records.RecordFile(path) as file:
        for record in written:
            file.append(record)
    assert records.read_records(path) == (written, 0)
    assert records.read_records(tmp_path / "nothing") == ([], 0)


@pytest.mark.parametrize("cut", [1, 10, 400])
def test_a_torn_last_line_is_dropped_and_its_place_reused(tmp_path, cut):
    path = tmp_path / "records.jsonl"
    with records.RecordFile(path) as file:
        for seed in range(2):
            file.append(a_record(seed))
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    with records.RecordFile(path) as file:
        assert file.records == [a_record(0)]
        assert file.torn_bytes == len(whole) - cut - whole.index(b"\n") - 1
        file.append(a_record(1))
    assert path.read_bytes() == whole


def test_a_last_line_of_zeros_counts_as_torn(tmp_path):
    # What some file systems leave after the power went.
    path = tmp_path / "records.jsonl"
    with records.RecordFile(path) as file:
        file.append(a_record(0))
    path.write_bytes(path.read_bytes() + b"\x00" * 30 + b"\n")
    assert records.read_records(path) == ([a_record(0)], 31)


def test_a_broken_line_in_the_middle_is_an_error(tmp_path):
    path = tmp_path / "records.jsonl"
    line = json.dumps(a_record())
    path.write_text(f"{line}\nrubbish\n{line}\n")
    with pytest.raises(ConfigError, match=r"line 2 is no record.*--out"):
        records.RecordFile(path)


def test_two_processes_do_not_write_one_file(tmp_path):
    pytest.importorskip("fcntl", reason="this system has no such locks")
    path = tmp_path / "records.jsonl"
    with (
        records.RecordFile(path),
        pytest.raises(ConfigError, match="another process writes"),
    ):
        records.RecordFile(path)
    records.RecordFile(path).close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hash": "0" * 16}, "does not carry the hash"),
        ({"status": "fine"}, "'fine'"),
        ({"status": "failed"}, "has a reason exactly when"),
        ({"reason": "why not"}, "has a reason exactly when"),
        ({"seconds": "long"}, "'seconds' holds 'long'; expected int or float"),
        ({"seconds": True}, "'seconds' holds True"),
        ({"schema": 99}, "schema 99"),
        ({"more": 1}, "unknown fields: more"),
        ({"curves": {"epoch": [0]}}, "record curves are"),
        ({"effort": {"target": 1.0}}, "record effort has"),
        ({"spectra": {"0": [[1.0]]}}, "different lengths"),
        ({"spec": {"task": "digits"}}, "specification with missing"),
    ],
)
def test_the_schema_is_kept(tmp_path, changes, message):
    with (
        records.RecordFile(tmp_path / "records.jsonl") as file,
        pytest.raises(ConfigError, match=message),
    ):
        file.append(a_record(**changes))
    assert records.read_records(tmp_path / "records.jsonl") == ([], 0)


def test_the_last_record_of_a_hash_counts():
    failed = a_record(0, status="failed", reason="the machine caught fire")
    assert records.latest([failed, a_record(1), a_record(0)]) == [a_record(0), a_record(1)]


def test_rounding_keeps_structure_and_drops_what_is_not_finite():
    value = {"a": [1.23456789012, math.nan], "b": (math.inf, 3, "x", None, True)}
    assert records.rounded(value) == {"a": [1.234568, None], "b": [None, 3, "x", None, True]}


def test_every_field_is_documented():
    if not PAGE.is_file():
        pytest.skip("the documentation is not beside the tests")
    names = set(re.findall(r"`(\w+)`", PAGE.read_text(encoding="utf-8")))
    spec = {field.name for field in fields(RunSpec)}
    assert {*records.SCHEMA, *records.CURVES, *records.EFFORT, *spec, *records.STATUSES} <= names


def test_records_of_the_first_schema_are_read(tmp_path):
    record = a_record(0)
    curves = {k: v for k, v in record["curves"].items() if k not in ("iteration", "evaluations")}
    old = {**record, "schema": 1, "curves": curves}
    del old["effort"]
    path = tmp_path / "records.jsonl"
    path.write_text(json.dumps(old) + "\n")
    unknown = {name: [None, None] for name in ("iteration", "evaluations")}
    expected = {**record, "curves": {**curves, **unknown}}
    assert records.read_records(path) == ([expected], 0)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file.txt"
    files.write_text(path, "old")
    with pytest.raises(RuntimeError), files.replacing(path) as temporary:  # noqa: PT012
        temporary.write_text("half of the n")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    files.write_text(path, "new")
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o400
