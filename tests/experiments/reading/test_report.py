from __future__ import annotations

import csv
import itertools
import re
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from sttp_manifold.errors import ConfigError
from sttp_manifold.experiments import compare
from sttp_manifold.experiments.compare import Settings
from sttp_manifold.experiments.methods import METHODS
from sttp_manifold.experiments.reading import (
    conclusions,
    pair_table,
    plots,
    report,
    result_table,
)

from ..conftest import TRAINING
from ..test_records import a_record


def made(settings: Settings) -> list[dict]:
    runs = compare.plan(settings)
    compare.save_comparison(settings, runs)
    return compare.run_plan(runs, settings)


@pytest.fixture
def settings(tiny, tmp_path) -> Settings:
    return Settings(
        out=tmp_path / "out",
        task="tiny",
        ranks=[1, 2],
        seeds=[0, 1],
        jobs=1,
        device="cpu",
        epochs=1,
    )


def test_every_output_is_made_from_files_and_stands_alone(settings):
    made(settings)
    written = report.write_outputs(settings.out)
    names = {path.relative_to(settings.out).as_posix() for path in written}
    spectra = [f"spectrum-{optimizer}" for optimizer in ("adam", "adam-elementwise", "sgd", "muon")]
    figures = {f"figures/{name}.png" for name in ("metric", "loss", "trade-off", *spectra, "drift")}
    assert names == {"summary.csv", "summary.md", "report.html", *figures}
    page = (settings.out / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!data:)", page)
    assert not re.search(r"https?://|@import|url\(", page)
    assert page.count("data:image/png;base64,") == len(figures)
    for method in TRAINING:
        assert (method.name in page) != getattr(method, "extra", False)
    assert "sttp compare --task tiny" in page
    assert "The digests of these weights agree" in page
    with (settings.out / "summary.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [(line["rank"], line["method"]) for line in lines] == [
        (str(rank), method.name)
        for rank in (1, 2)
        for method in TRAINING
        if not getattr(method, "extra", False)
    ]
    assert all(line["ok"] == "2" and float(line["test_mean"]) > 0 for line in lines)
    assert not list(settings.out.rglob(".*"))


def test_a_comparison_stopped_half_way_has_a_report_that_says_so(settings):
    settings = replace(settings, methods=["dense-adam", "sttp-chart-adam"])
    made(settings)
    path = settings.out / "records.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]))
    report.write_outputs(settings.out)
    assert "5 of the 8 runs of this comparison are not done" in (
        settings.out / "summary.md"
    ).read_text(encoding="utf-8")
    path.write_bytes(b"")
    assert report.write_outputs(settings.out) == []


def test_runs_that_diverged_have_a_table_of_their_own(settings):
    settings = replace(settings, methods=["dense-sgd", "sttp-chart-sgd"], lrs={"dense-sgd": 1e38})
    made(settings)
    report.write_outputs(settings.out)
    page = (settings.out / "report.html").read_text(encoding="utf-8")
    assert "Runs that did not finish" in page
    assert "Some runs diverged: dense-sgd at rank 1 (2 of 2), dense-sgd at rank 2 (2 of 2)" in page


def test_when_nothing_finished_there_is_a_report_still(settings):
    settings = replace(settings, methods=["dense-sgd"], lrs={"all": 1e38})
    made(settings)
    assert report.write_outputs(settings.out)


def test_a_folder_without_a_comparison_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no comparison in"):
        report.write_outputs(tmp_path)


def records_of(**scores: list[float]) -> list[dict]:
    """Records of methods with the given test accuracies by seed."""
    records = []
    for name, values in scores.items():
        method = METHODS[name.replace("_", "-")]
        for seed, value in enumerate(values):
            record = a_record(seed, test_metric=value, val_metric=value)
            record["examples"] = {**record["examples"], "test": 300}
            record["spec"] |= {
                "method": method.name,
                "kind": method.kind,
                "parameterization": method.parameterization,
                "optimizer": method.optimizer,
            }
            records.append(record)
    return records


def said(records: list[dict], **note: object) -> str:
    base = {"hashes": [record["hash"] for record in records], "tuned": {}}
    reserved = conclusions.reservations(records, {**base, **note})
    return "\n".join([*conclusions.conclude(records), *reserved])


def test_conclusions_claim_no_more_than_the_spread_allows():
    records = records_of(
        sttp_chart_adam=[90.0, 91.0, 92.0],
        sttp_riemannian_adam=[93.0, 91.0, 92.0],
        dense_adam=[80.0, 81.0, 82.0],
    )
    assert len(conclusions.conclude(records)) == 3
    text = said(records)
    assert (
        "Highest mean test accuracy: at rank 4 sttp-riemannian-adam, 92.00 ± 1.00 %, not told "
        "apart from sttp-chart-adam." in text
    )
    assert "on both: the one pair is not told apart." in text
    assert "STTP (sttp-riemannian-adam, " in text
    assert "of the dimension) ahead by 11.0 ± 4.3 points." in text


def test_conclusions_say_who_is_ahead_when_the_spread_allows():
    scores = {"svdp_chart_sgd": [90.0, 91.0], "svdp_riemannian_sgd": [70.0, 70.8]}
    text = said(records_of(**scores))
    assert "of 1 pair, the chart is ahead in 1 (SVDP by SGD at rank 4 by 20.1 ± 1.3 points)" in text
    assert ", apart from all others." in text
    scores["sttp_chart_sgd"], scores["sttp_riemannian_sgd"] = [50.0, 60.0], [60.0, 50.0]
    scores["sttp_chart_adam"], scores["sttp_riemannian_adam"] = [50.0, 60.0], [56.0, 66.4]
    text = said(records_of(**scores))
    assert (
        "of 3 pairs, the manifold is ahead in 1 (STTP by Adam at rank 4 by 6.2 ± 2.5 points), the "
        "chart is ahead in 1 (SVDP by SGD at rank 4 by 20.1 ± 1.3 points), 1 is not told apart."
        in text
    )


def test_conclusions_of_many_methods_and_ranks_stay_three_sentences():
    names = [name.name.replace("-", "_") for name in TRAINING]
    records = []
    for rank in range(1, 9):
        for record in records_of(**{name: [90.0, 91.0 + k % 3] for k, name in enumerate(names)}):
            record["spec"]["rank"] = rank
            records.append(record)
    sentences = conclusions.conclude(records)
    assert len(sentences) == 3
    for rank in (1, 5, 8):
        assert f"at rank {rank} " in sentences[0]
    assert "at rank 2 " not in " ".join(sentences)
    assert " others" in sentences[0]


def test_conclusions_of_one_seed_tell_nothing_apart():
    records = records_of(svdp_chart_sgd=[90.0], svdp_riemannian_sgd=[70.0])
    text = said(records)
    assert "One seed shows no spread" in text
    assert "svdp-chart-sgd, 90.00 %, on one seed." in text
    assert "ahead" not in text
    assert pair_table.pair_tables(result_table.rows(records), result_table.metric_of(records)) == []


def test_conclusions_name_their_reservations():
    records = records_of(dense_adam=[90.0, 91.0], dense_sgd=[80.0, 81.0])
    for record in records:
        record["lr_source"] = "untuned" if record["spec"]["optimizer"] == "sgd" else "given"
    text = said(records, tuned={"dense-adam": {"lr": 1.0, "at_edge": True, "epochs": 3}})
    assert "Learning rates were not tuned for dense-sgd" in text
    assert "given by hand, not tuned, for dense-adam" in text
    assert "at the edge of the grid for dense-adam" in text
    assert "tuned for 3 epochs and used for 20" in text


def errors_of(**errors: list[float]) -> list[dict]:
    metric = {"name": "error", "unit": "", "higher": False, "log": True, "spec": ".1e"}
    return [{**record, "metric": metric} for record in records_of(**errors)]


def test_errors_are_compared_by_their_logarithms():
    records = errors_of(svdp_chart_sgd=[0.4, 0.2, 0.9], svdp_riemannian_sgd=[1e-10, 1e-12, 1e-11])
    text = said(records)
    assert "Lowest mean test error: at rank 4 svdp-riemannian-sgd, 1.0e-11 ×÷" in text
    assert "the manifold is ahead in 1 (SVDP by SGD at rank 4 by ×4.2e+10 ×÷ " in text
    zero = said([{**record, "test_metric": 0.0} for record in records])
    assert "the one pair is not told apart" in zero


def pairs(records: list[dict]) -> pair_table.PairTable:
    table = result_table.rows(records)
    (found,) = pair_table.pair_tables(table, result_table.metric_of(records))
    return found


def test_row_beats_column_by_the_paired_difference_and_its_interval():
    scores = {
        "dense_sgd": [90.0, 92.0, 93.0],
        "sttp_chart_adam": [91.0, 93.5, 94.0],
        "svdp_chart_adam": [40.0, 60.0, 80.0],
    }
    found = pairs(records_of(**scores))
    assert found.methods == ["sttp-chart-adam", "dense-sgd", "svdp-chart-adam"]
    names = [name.replace("-", "_") for name in found.methods]
    for k, name in enumerate(names):
        for one, other in zip(found.leads[k], names[k + 1 :], strict=True):
            test = stats.ttest_rel(scores[name], scores[other])
            low, high = test.confidence_interval(0.95)
            difference = np.mean(scores[name]) - np.mean(scores[other])
            assert one.mean == f"+{difference:.1f}"
            assert one.reach == f"± {(high - low) / 2:.1f}"
            assert one.apart == (test.pvalue < 0.05)
    assert found.lines("**{}**") == [
        ["1", "sttp-chart-adam", "92.83 ± 1.61", "**+1.2 ± 0.7**", "+32.8 ± 46.0"],
        ["2", "dense-sgd", "91.67 ± 1.53", "", "+31.7 ± 46.0"],
        ["3", "svdp-chart-adam", "60.00 ± 20.00", "", ""],
    ]
    note = pair_table.pair_note([found], result_table.rows(records_of(**scores)))
    assert "about 0 of these 3 pairs" in note


def test_factors_of_errors_stand_in_the_table_of_pairs():
    found = pairs(errors_of(dense_sgd=[0.4, 0.2], sttp_chart_adam=[0.2, 0.1 + 1e-6]))
    assert found.methods == ["sttp-chart-adam", "dense-sgd"]
    ((one,), _) = found.leads
    assert (one.mean, one.reach, one.apart) == ("×2", "×÷ 1", True)
    far = pairs(errors_of(dense_sgd=[1.0, 1e-290], sttp_chart_adam=[0.2, 1.0]))
    assert "×÷ 1e+" in far.lines()[0][3]


@pytest.mark.parametrize("unit", ["%", ""])
@pytest.mark.parametrize("log", [False, True])
def test_absurd_scores_and_sizes_have_a_table_and_sentences(unit, log):
    metric = {"name": "m", "unit": unit, "higher": not log, "log": log, "spec": ".2e"}
    values = (0.0, 5e-324, 1e-100, 1.0, 1e100) + (() if log else (-1e100,))
    for first, second in itertools.product(values, repeat=2):
        for size in (0, 1, 10**100):
            records = records_of(dense_sgd=[first, second], svdp_chart_adam=[second, first])
            for record in records:
                record["metric"] = metric
                record["examples"] = {**record["examples"], "test": size}
            assert said(records)
            (table,) = pair_table.pair_tables(
                result_table.rows(records), result_table.metric_of(records)
            )
            assert all(len(line) == len(table.titles) for line in table.lines())
            assert table.to_html()


def test_methods_that_share_no_seeds_have_a_dash():
    records = records_of(dense_sgd=[90.0, 92.0], sttp_chart_adam=[91.0, 93.5], dense_adam=[9.0, 8])
    for record in records[-2:]:
        record["spec"]["seed"] += 7
    assert [line[4] for line in pairs(records).lines()] == ["-", "-", ""]
    assert "not told apart" in said(records)


def test_a_table_without_a_finished_run_has_dashes():
    (row,) = result_table.rows([a_record(0, status="diverged", reason="x", test_metric=None)])
    cells = result_table.cells(row, result_table.metric_of([a_record()]))
    assert cells[2:4] == ["-", "-"]
    assert "1 diverged" in cells[-1]


def test_methods_nobody_has_a_colour_for_are_drawn_too():
    records = [a_record()]
    records[0]["spec"] |= {"kind": "new", "parameterization": "odd", "optimizer": "other"}
    names = [picture.name for picture in plots.draw(records)]
    assert names == ["metric", "loss", "trade-off", "spectrum-other", "drift"]
    assert plots.draw([{**records[0], "curves": {"epoch": []}}]) == []


def test_equal_errors_have_bars_of_no_length():
    """A geometric mean of equal values may be off them by a rounding, and no bar is negative."""
    values = 10.0 ** np.random.default_rng(0).uniform(-12, 0, 40)
    for value in values:
        records = errors_of(dense_sgd=[value] * 3, sttp_chart_adam=[value] * 3)
        plots._trade(records, result_table.metric_of(records))


def test_solvers_have_a_table_a_figure_and_sentences_of_their_own(puzzle, tmp_path):
    settings = Settings(
        out=tmp_path / "out",
        task="puzzle",
        methods=["fixed-rank-cg", "product-cg", "factor-adam"],
        seeds=[0, 1],
        lrs={"factor-adam": 1e-4},
        max_evaluations=600,
        device="cpu",
        jobs=1,
    )
    records = made(settings)
    names = {path.name for path in report.write_outputs(settings.out)}
    assert names == {"summary.csv", "summary.md", "report.html", "convergence.png"}
    page = (settings.out / "report.html").read_text(encoding="utf-8")
    text = (settings.out / "summary.md").read_text(encoding="utf-8")
    for words in ("reached 1e-10", "Hessian products", "0 of 2", "2 of 2"):
        assert words in page
        assert words in text
    assert "--max-evaluations 600" in text
    assert "--epochs" not in text
    assert "was not reached within the budget by " in text
    assert "factor-adam at rank 2 (2 of 2 runs; residuals end at" in text
    assert "which draw the weight to find, the places that are seen and the start" in text
    by_seed = {
        name: [r["effort"]["iterations"] for r in records if r["spec"]["method"] == name]
        for name in ("fixed-rank-cg", "product-cg")
    }
    ratios = [a / b for a, b in zip(*by_seed.values(), strict=True)]
    if all(r["effort"]["iterations_to_target"] for r in records if "cg" in r["spec"]["method"]):
        low, high = f"{min(ratios):.2g}", f"{max(ratios):.2g}"
        assert f"({low} to {high}) of the iterations" in text
    with (settings.out / "summary.csv").open(encoding="utf-8") as file:
        lines = {line["method"]: line for line in csv.DictReader(file)}
    assert lines["factor-adam"]["reached_target"] == "0"
    assert lines["factor-adam"]["evaluations_to_target_median"] == ""
    assert float(lines["fixed-rank-cg"]["evaluations_to_target_median"]) > 0
