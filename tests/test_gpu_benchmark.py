"""The benchmark for GPUs runs with the CPU in the place of one, and reports what fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark_scripts import BENCHMARKS, run_script

DOCS = BENCHMARKS.parents[1] / "docs"


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="make bench-gpu does it on the GPU")
def test_every_competitor_runs_on_the_stand_in(script: Any, tmp_path: Path) -> None:
    run_script("gpu.py", "--small", "--turns", "1", "--docs", str(tmp_path), seconds=480)
    (file,) = (tmp_path / "results").glob("gpu-*.json")
    run = json.loads(file.read_text("utf-8"))
    tables = script("gpu_cases").TABLES
    assert {record["table"] for record in run["records"]} == {*tables}
    for record in run["records"]:
        assert "note" not in record, record
        assert record["ms"] > 0, record
        assert record["kernels"] > 0, record
        assert record["peak_mb"] >= 0, record
    ways = {r["way"] for r in run["records"] if r["table"] == "training"}
    assert ways == {"eager", "captured", "compiled"}
    page = script("gpu_page")
    assert page.text([run]) == (tmp_path / "gpu.md").read_text("utf-8")
    assert "its numbers say nothing" in page.text([run])


def test_the_page_is_that_of_its_results(script: Any) -> None:
    if not DOCS.is_dir():
        pytest.skip("the documentation is not beside the tests")
    files = sorted((DOCS / "results").glob("gpu-*.json"))
    runs = [json.loads(file.read_text("utf-8")) for file in files]
    text = (DOCS / "gpu.md").read_text("utf-8")
    assert script("gpu_page").text(runs) == text
    own = any(run["about"]["of"] == "this package" for run in runs)
    assert own != ("No run of this package as it is now" in text)


def test_what_fails_and_what_comes_too_late_is_said(script: Any) -> None:
    gpu, cases, meter = script("gpu"), script("gpu_cases"), script("gpu_meter").StandIn()

    def failing() -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def good() -> Any:
        return lambda: torch.ones(3) + 1

    names = [("a", good), ("b", failing), ("c", good)]
    case = cases.Case("it", [cases.Competitor(name, "eager", make) for name, make in names])
    first, second = gpu.measured(meter, case, 1, float("inf"))
    assert first["ms"] > 0
    assert "illegal memory access" in second["note"]
    late = gpu.measured(meter, case, 1, 0.0)
    assert [record["note"] for record in late] == ["no time was left"] * 3


def test_all_tables_take_less_than_eight_minutes(script: Any) -> None:
    gpu = script("gpu")
    assert {*gpu.SECONDS} == {*script("gpu_cases").TABLES}
    assert sum(gpu.SECONDS.values()) < 8 * 60


@pytest.mark.skipif(torch.cuda.is_available(), reason="the script does it on the GPU")
@pytest.mark.parametrize("part", ["forward and backward", "charts", "optimizer", "whole step"])
def test_every_part_of_a_captured_step_runs_on_the_stand_in(script: Any, part: str) -> None:
    parts, meter = script("captured_parts"), script("gpu_meter").StandIn()
    cases = list(parts.cases([part], list(parts.METHODS)))
    assert cases == [*dict.fromkeys(cases)]
    assert len(cases) == (2 if part == "charts" else 9)
    for _, method, way in cases:
        if method in ("dense", "STTP chart", "STTP Riemannian"):
            work = parts.PARTS[part](meter, method, True, way == parts.WITH)
            work()
            work()


@pytest.mark.slow
def test_what_becomes_of_a_part_is_said(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = script("captured_parts")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    limits: dict[str, Any] = dict(small=True, replays=2, seconds=240.0)
    said = parts.outcome("optimizer", "STTP Riemannian", parts.WITHOUT, **limits)
    assert said == "2 replays went well"
    monkeypatch.setattr(parts, "__file__", str(BENCHMARKS / "no_such_script.py"))
    said = parts.outcome("optimizer", "STTP Riemannian", parts.WITH, **limits)
    assert said.startswith("FAILED before or at the first replay")
    limits["seconds"] = 0.01
    assert parts.outcome("optimizer", "dense", parts.WITH, **limits) == "stopped after 0.01 s"
