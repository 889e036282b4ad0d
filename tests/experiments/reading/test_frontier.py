"""The frontier: ratios as in the paper, one method a set and rank, and what may be said of it."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from sttp_manifold.experiments.methods import METHODS
from sttp_manifold.experiments.paper import network_counts
from sttp_manifold.experiments.reading import frontier
from sttp_manifold.experiments.reading.comparison import load_comparison
from sttp_manifold.experiments.reading.conclusions import conclude
from sttp_manifold.experiments.reading.plots import draw
from sttp_manifold.experiments.reading.result_table import at_every_rank, metric_of
from sttp_manifold.experiments.records import validate

from ..test_records import a_record

DOCS = Path(__file__).parents[3] / "docs"


def made(method, rank, scores, dimension, val=None, dense=1000):
    entrant = METHODS[method]
    found = []
    for seed, score in enumerate(scores):
        record = a_record(
            seed,
            test_metric=score,
            val_metric=score if val is None else val,
            dimension=dimension,
            stored_parameters=dimension,
            dense_elements=dense,
            other_parameters=20,
            own={"running_statistics": 30},
        )
        record["spec"] |= {
            "method": method,
            "kind": entrant.kind,
            "parameterization": entrant.parameterization,
            "optimizer": entrant.optimizer,
            "rank": rank,
        }
        record["examples"] = {"train": 10, "val": 5, "test": 1000}
        found.append(record)
    return found


def compared(gain: float, noise: float = 0.5):
    """STTP at half the size of SVDP; at equal size better by ``gain`` in the mean."""
    rng = np.random.default_rng(0)
    records = made("dense-adam", 0, [95.0, 95.5, 95.2], 1000)
    for rank in (4, 8, 16):
        for kind, share in (("svdp", 1.0), ("sttp", 0.5)):
            size = int(25 * rank * share)
            base = 50 + 10 * math.log2(size) + (gain if kind == "sttp" else 0)
            scores = [base + seed + noise * rng.normal() for seed in range(3)]
            records += made(f"{kind}-chart-adam", rank, scores, size)
    return records


def test_the_ratio_is_that_of_the_papers_counts():
    count = next(
        c for c in network_counts("wrn-28-10", [64]) if (c.kind, c.spectrum) == ("sttp", "free")
    )
    statistics = 17_952
    record = a_record(
        dimension=count.dof,
        dense_elements=count.dense - count.rest,
        other_parameters=count.rest - statistics,
        own={"running_statistics": statistics},
    )
    validate(record)
    assert frontier.z_of(record) == pytest.approx(count.Z)
    assert frontier.z_of(a_record(dimension=None)) is None


def test_a_run_of_no_rank_is_read_at_every_rank():
    records = compared(0)
    expanded = at_every_rank(records)
    dense = [r["spec"]["rank"] for r in expanded if r["spec"]["kind"] == "dense"]
    assert sorted(dense) == [4, 4, 4, 8, 8, 8, 16, 16, 16]
    assert at_every_rank(records[:3]) == records[:3]


def test_the_method_of_a_set_is_chosen_by_validation():
    records = at_every_rank(compared(0))
    # Better on the test split, worse on the validation split: not to be chosen.
    records += made("sttp-chart-sgd", 8, [99.0] * 3, 100, val=0.0)
    found = frontier.frontiers(records)
    assert [p.row.method for p in found["sttp"]] == ["sttp-chart-adam"] * 3
    z = [p.z for p in found["svdp"]]
    assert z == pytest.approx([100 * (25 * r + 50) / 1050 for r in (4, 8, 16)])
    lines = frontier.frontier_cells(found, metric_of(records))
    assert [line[0] for line in lines] == ["SVDP"] * 3 + ["STTP"] * 3 + ["dense"]
    scores = [r["test_metric"] for r in records if r["spec"]["method"] == "svdp-chart-adam"][:3]
    low, high = stats.t.interval(0.95, 2, np.mean(scores), stats.sem(scores))
    assert lines[0][5] == f"± {(high - low) / 2:.2f}"


@pytest.mark.parametrize(
    ("gain", "noise", "words"),
    [
        (6.0, 0.3, "STTP leads SVDP in the strongly compressed regime here, as in the paper"),
        (-6.0, 0.3, "SVDP leads STTP in the strongly compressed regime here, unlike in the paper"),
        (0.0, 3.0, "no lead of either is told apart here"),
    ],
)
def test_the_sentence_says_what_the_numbers_allow(gain, noise, words):
    records = at_every_rank(compared(gain, noise))
    said = conclude(records)
    assert words in said[0]
    assert len(said) <= 3
    # SVDP begins at 100 + 50 numbers of 1050.
    assert "at Z = 14 %" in said[0]


def test_two_ranks_or_no_shared_ratio_are_no_comparison():
    few = [r for r in compared(3) if r["spec"]["rank"] in (0, 4, 8)]
    assert frontier.frontiers(at_every_rank(few)) == {}
    records = []
    for rank in (4, 8, 16):
        records += made("svdp-chart-adam", rank, [90.0, 91.0], 600 + rank)
        records += made("sttp-chart-adam", rank, [90.0, 91.0], 10 + rank)
    found = frontier.frontiers(records)
    (said,) = frontier.say_frontier(found, metric_of(records))
    assert "share no ratio" in said


def test_the_figure_is_the_first_of_a_frontier():
    names = [picture.name for picture in draw(at_every_rank(compared(3)))]
    assert names[0] == "frontier"


@pytest.mark.parametrize(
    ("name", "runs", "page", "sentence"),
    [
        (
            "digits",
            85,
            ("Z = 6.4 % by 20.2 ± 3.3 points", "at 12 % by 4.7 ± 1.8"),
            ("Z = 6.4 % ahead by 20.2 ± 3.3 points", "Z = 12 % ahead by 4.7 ± 1.8 points"),
        ),
        (
            "fashion-wrn",
            51,
            ("by 6.9 ± 3.2 points", "3.0 ± 2.4 points at Z = 11 %", "2.4 ± 1.3 points at Z = 15 %"),
            ("Z = 5.8 % ahead by 6.90 ± 3.16 points", "Z = 11 % ahead by 3.01 ± 2.36 points"),
        ),
    ],
)
def test_the_page_says_what_its_records_say(name, runs, page, sentence):
    comparison = load_comparison(DOCS / "results" / "frontier" / name)
    assert len(comparison.records) == len(comparison.note["hashes"]) == runs
    text = (DOCS / "frontier.md").read_text("utf-8")
    for line in comparison.frontier.lines:
        assert f"| {' | '.join(line)} |" in text
    flat = " ".join(text.split())
    assert all(words in flat for words in page)
    said = comparison.conclusions[0]
    assert all(f"at {words}" in said for words in sentence)
    assert said.count("at Z = ") == len(set(re.findall(r"at Z = \S+", said)))
