from __future__ import annotations

import json
import math
import os
import re
from dataclasses import fields
from pathlib import Path

import pytest

from sttp_manifold.errors import ConfigError
from sttp_manifold.experiments import records
from sttp_manifold.experiments.specs import RunSpec

from .test_specs import SPEC

PAGE = Path(__file__).parents[2] / "docs" / "records.md"


def a_record(seed: int = 0, **changes: object) -> records.Record:
    spec = RunSpec.from_dict({**SPEC.to_dict(), "seed": seed})
    record: records.Record = {
        "schema": 4,
        "hash": spec.hash,
        "run": "train",
        "reads": ["score", "curves"],
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
        "own": {},
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
    torn = whole[whole.index(b"\n") + 1 : -cut]
    assert file.aside.read_bytes() == torn + b"\n"


@pytest.mark.parametrize("line", [b"a note to myself\n", b"{}\n", b"[1]\n", b"\xff\xfe\n", b"\n"])
def test_a_last_line_that_nobody_here_wrote_is_kept_beside(tmp_path, line):
    path = tmp_path / "records.jsonl"
    with records.RecordFile(path) as file:
        file.append(a_record(0))
    whole = path.read_bytes()
    for times in (1, 2):
        path.write_bytes(whole + line)
        assert records.read_records(path) == ([a_record(0)], len(line))
        assert path.read_bytes() == whole + line
        with records.RecordFile(path) as file:
            assert (file.records, file.torn_bytes) == ([a_record(0)], len(line))
        assert path.read_bytes() == whole
        assert (tmp_path / "records.jsonl.not-records").read_bytes() == line * times


def test_a_last_line_of_another_schema_is_no_rubbish(tmp_path):
    path = tmp_path / "records.jsonl"
    content = json.dumps(a_record(schema=99)).encode() + b"\n"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"line 1 is no record .*schema 99"):
        records.RecordFile(path)
    assert path.read_bytes() == content


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no such limits")
def test_a_disk_that_is_full_leaves_whole_lines_and_a_message(tmp_path):
    resource = pytest.importorskip("resource")
    path = tmp_path / "records.jsonl"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with records.RecordFile(path) as file:
        file.append(a_record(0))
        whole = path.read_bytes()
        # A limit on the size of files takes a part of a line and no more, as a full disk does.
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 100, hard))
        try:
            with pytest.raises(ConfigError, match=r"records\.jsonl: File too large; make room"):
                file.append(a_record(1))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert path.read_bytes() == whole
        file.append(a_record(1))
    assert records.read_records(path) == ([a_record(0), a_record(1)], 0)


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
        ({"seconds": math.nan}, "'seconds' holds nan; expected a finite number"),
        ({"seconds": 1e308}, "'seconds' holds 1e\\+308"),
        ({"dense_elements": 10**5000}, "holds an integer of more than 30 digits"),
        ({"val_metric": None}, "ok without val_metric"),
        ({"test_metric": None}, "ok without test_metric"),
        ({"device": "a\nb"}, "record device holds 'a.*expected a text of one line"),
        ({"versions": {"python": 3}}, "record versions holds 3"),
        ({"examples": {"train": 1}}, "record examples has"),
        ({"metric": {"name": "x"}}, "record metric has"),
        (
            {"metric": {"name": "x", "unit": "", "higher": 1, "log": False, "spec": ".2f"}},
            "record metric 'higher' holds 1; expected bool",
        ),
        (
            {"metric": {"name": "x", "unit": "", "higher": True, "log": False, "spec": "9999d"}},
            "record metric 'spec' holds '9999d'",
        ),
        ({"curves": {name: 3 for name in records.CURVES}}, "expected a list"),
        ({"curves": {name: ["x", 1] for name in records.CURVES}}, "holds 'x'; expected a finite"),
        ({"curves": {name: [] for name in records.CURVES}, "spectra": {}}, "ok without curves"),
        ({"spectra": {"0": [[1.0], [1.0, 2.0]]}}, "expected lists of one length"),
        ({"effort": dict.fromkeys(records.EFFORT)}, "record effort .* holds None"),
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
    for name in ("effort", "run", "reads"):
        del old[name]
    path = tmp_path / "records.jsonl"
    path.write_text(json.dumps(old) + "\n")
    unknown = {name: [None, None] for name in ("iteration", "evaluations")}
    expected = {**record, "curves": {**curves, **unknown}}
    assert records.read_records(path) == ([expected], 0)


OLD = Path(__file__).with_name("old_records")


@pytest.mark.parametrize(("folder", "count"), [("mixed", 10), ("digits", 4)])
def test_records_of_the_second_schema_are_read(folder, count):
    # Written by an earlier version of this package, committed as they were.
    found, torn = records.read_records(OLD / folder / "records.jsonl")
    assert (len(found), torn) == (count, 0)
    for record in found:
        records.validate(record)
        solves = "cg" in record["spec"]["method"] or record["spec"]["method"] == "factor-adam"
        assert record["run"] == ("solve" if solves else "train")
        assert records.read_for(record, "effort") == solves
        assert records.read_for(record, "score") != solves


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", "1e200"])
def test_numbers_that_are_none_are_read_as_null(tmp_path, value):
    path = tmp_path / "records.jsonl"
    text = json.dumps(a_record(w0_gap=12345)).replace("12345", value)
    path.write_text(f"{text}\n")
    assert records.read_records(path) == ([a_record(w0_gap=None)], 0)
