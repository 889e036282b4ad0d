"""The table of networks on its page is that of its results."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent / "benchmarks" / "coverage.py"


def test_results_are_those_of_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    # By its path: a tool for tests has the name that the script has.
    spec = importlib.util.spec_from_file_location("table_of_networks", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, script)
    spec.loader.exec_module(script)
    rows = json.loads(script.RESULTS.read_text(encoding="utf-8"))
    page = (script.RESULTS.parents[1] / "networks.md").read_text(encoding="utf-8")
    assert script.table(rows) in page
    assert f"in {len(rows)} networks" in page
    assert not [row["name"] for row in rows if row["note"] or row["forward"] is None]
