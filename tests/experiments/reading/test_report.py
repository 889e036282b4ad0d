from __future__ import annotations

import csv
import re
from dataclasses import replace

import pytest

from sttp_manifold.errors import ConfigError
from sttp_manifold.experiments import compare
from sttp_manifold.experiments.compare import Settings
from sttp_manifold.experiments.methods import METHODS
from sttp_manifold.experiments.reading import conclusions, plots, report, result_table

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
    spectra = [f"spectrum-{optimizer}" for optimizer in ("adam", "sgd", "muon")]
    figures = {f"figures/{name}.png" for name in ("metric", "loss", "trade-off", *spectra, "drift")}
    assert names == {"summary.csv", "summary.md", "report.html", *figures}
    page = (settings.out / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!data:)", page)
    assert not re.search(r"https?://|@import|url\(", page)
    assert page.count("data:image/png;base64,") == len(figures)
    for method in TRAINING:
        assert method.name in page
    assert "sttp compare --task tiny" in page
    assert "The digests of these weights agree" in page
    with (settings.out / "summary.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [(line["rank"], line["method"]) for line in lines] == [
        (str(rank), method.name) for rank in (1, 2) for method in TRAINING
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
    return "\n".join(conclusions.conclude(records, {**base, **note}))


def test_conclusions_claim_no_more_than_the_spread_allows():
    text = said(
        records_of(
            sttp_chart_adam=[90.0, 91.0, 92.0],
            sttp_riemannian_adam=[93.0, 91.0, 92.0],
            dense_adam=[80.0, 81.0, 82.0],
        )
    )
    assert "sttp-riemannian-adam has the highest mean test accuracy, 92.00 ± 1.00 %" in text
    assert "These seeds do not tell it apart from sttp-chart-adam." in text
    assert "Riemannian 92.00 ± 1.00 %; these seeds do not tell them apart" in text
    assert (
        "its best method (sttp-riemannian-adam) is better than dense-adam by 11.00 points (6.70 to"
        in text
    )


def test_conclusions_say_who_is_ahead_when_the_spread_allows():
    text = said(records_of(svdp_chart_sgd=[90.0, 91.0], svdp_riemannian_sgd=[70.0, 70.9]))
    assert "the chart is ahead by 20.05 points (19.41 to 20.69), on 2 of 2 seeds" in text
    assert ", apart from all others." in text


def test_conclusions_of_one_seed_tell_nothing_apart():
    text = said(records_of(svdp_chart_sgd=[90.0], svdp_riemannian_sgd=[70.0]))
    assert "One seed shows no spread" in text
    assert "ahead" not in text


def test_conclusions_name_their_reservations():
    records = records_of(dense_adam=[90.0, 91.0], dense_sgd=[80.0, 81.0])
    for record in records:
        record["lr_source"] = "untuned" if record["spec"]["optimizer"] == "sgd" else "given"
    text = said(records, tuned={"dense-adam": {"lr": 1.0, "at_edge": True, "epochs": 3}})
    assert "Learning rates were not tuned for dense-sgd" in text
    assert "given by hand, not tuned, for dense-adam" in text
    assert "at the edge of the grid for dense-adam" in text
    assert "tuned for 3 epochs and used for 20" in text


def test_errors_are_compared_by_their_logarithms():
    errors = {"svdp_chart_sgd": [0.4, 0.2, 0.9], "svdp_riemannian_sgd": [1e-10, 1e-12, 1e-11]}
    records = records_of(**errors)
    metric = {"name": "error", "unit": "", "higher": False, "log": True, "spec": ".1e"}
    records = [{**record, "metric": metric} for record in records]
    text = said(records)
    assert "svdp-riemannian-sgd has the lowest mean test error, 1.0e-11 ×÷" in text
    assert "the Riemannian one is ahead by a factor of 4.2e+10 (" in text
    assert ", on 3 of 3 seeds." in text
    zero = said([{**record, "test_metric": 0.0} for record in records])
    assert "these seeds do not tell them apart" in zero


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
