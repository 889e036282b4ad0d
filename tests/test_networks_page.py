"""The table of networks on its page is that of its results."""

from __future__ import annotations

import json
from typing import Any


def test_results_are_those_of_the_page(script: Any) -> None:
    treated = script("treated")
    rows = json.loads(treated.RESULTS.read_text(encoding="utf-8"))
    page = (treated.RESULTS.parents[1] / "networks.md").read_text(encoding="utf-8")
    assert treated.table(rows) in page
    assert f"in {len(rows)} networks" in page
    assert not [row["name"] for row in rows if row["note"] or row["forward"] is None]
