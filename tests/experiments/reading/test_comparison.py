"""A comparison as a value: what it shows is what its records say, in every form."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET

import pytest
from markdown_it import MarkdownIt

from sttp_manifold.errors import ConfigError
from sttp_manifold.experiments.compare import Settings, plan, run_plan, save_comparison
from sttp_manifold.experiments.reading.comparison import Comparison, load_comparison


def made(settings: Settings) -> Comparison:
    runs = plan(settings)
    save_comparison(settings, runs)
    run_plan(runs, settings)
    return load_comparison(settings.out)


@pytest.fixture
def solved(puzzle, tmp_path) -> Comparison:
    methods = ["fixed-rank-cg", "product-cg"]
    return made(Settings(tmp_path / "out", "puzzle", methods, seeds=[0, 1], device="cpu", jobs=1))


@pytest.fixture
def trained(tiny, tmp_path) -> Comparison:
    methods = ["dense-adam", "sttp-chart-adam"]
    return made(
        Settings(tmp_path / "out", "tiny", methods, seeds=[0], epochs=1, device="cpu", jobs=1)
    )


def cells(table: ET.Element) -> list[list[str]]:
    return [[cell.text or "" for cell in row] for row in table.iter("tr")]


def shown(comparison: Comparison) -> ET.Element:
    return ET.fromstring(comparison._repr_html_())


def test_every_form_has_the_same_tables_and_sentences(solved):
    effort, results = solved.tables
    assert [line[1] for line in effort.lines] == ["fixed-rank-cg", "product-cg"]
    assert [line[1] for line in results.lines] == ["fixed-rank-cg", "product-cg"]
    html = shown(solved)
    for table, drawn in zip(solved.tables, html.iter("table"), strict=True):
        assert cells(drawn) == [list(table.titles), *map(list, table.lines)]
    said = [*solved.conclusions, *solved.reservations]
    assert [item.text for item in html.iter("li")] == said
    for text in (str(solved), solved.to_markdown()):
        for sentence in said:
            assert f"- {sentence}" in text
        for table in solved.tables:
            assert table.note in text
            for line in table.lines:
                assert any(
                    [cell.strip() for cell in row.strip("|").split(" | ")] == list(line)
                    for row in text.splitlines()
                )
    assert "4 of 4 runs done" in str(solved)


def test_every_form_has_the_table_of_pairs(tiny, tmp_path):
    methods = ["dense-adam", "sttp-chart-adam", "svdp-riemannian-muon"]
    settings = Settings(
        tmp_path / "out", "tiny", methods, ranks=[1, 2], seeds=[0, 1, 2], device="cpu", jobs=1
    )
    comparison = made(settings)
    first, second = comparison.pairs
    assert (first.rank, second.rank) == (1, 2)
    means = {(row.rank, row.method): row.mean for row in comparison.rows}
    drawn = list(shown(comparison).iter("table"))[1:]
    for pair, table in zip(comparison.pairs, drawn, strict=True):
        scores = [means[pair.rank, name] for name in pair.methods]
        assert scores == sorted(scores, reverse=True)
        assert table.find("caption").text == pair.name
        assert len(pair.leads[-1]) == 0
        for k, (row, name) in enumerate(zip(table.find("tbody"), pair.methods, strict=True)):
            places = ["".join(cell.itertext()) for cell in row]
            assert len(places) == len(pair.titles) == 3 + len(methods) - 1
            assert places[1] == name
            assert places[3 + k :] == [f"{found.mean}{found.reach}" for found in pair.leads[k]]
            bold = [cell.find("b") is not None for cell in row][3 + k :]
            assert bold == [found.apart for found in pair.leads[k]]
        for text, form in ((str(comparison), "{} *"), (comparison.to_markdown(), "**{}**")):
            for line in pair.lines(form):
                assert any(
                    [cell.strip() for cell in row[1:-1].split(" | ")] == line
                    for row in text.splitlines()
                )
    for text in (str(comparison), comparison.to_markdown(), "".join(shown(comparison).itertext())):
        assert comparison.pair_note in text
    page = MarkdownIt("commonmark").enable("table").render(comparison.to_markdown())
    assert page.count("<table>") == len(comparison.tables) + len(comparison.pairs)
    apart = [found.apart for pair in comparison.pairs for line in pair.leads for found in line]
    assert page.count("<strong>") == sum(apart)


def test_numbers_are_to_the_right_and_names_to_the_left(trained):
    (table,) = shown(trained).iter("table")
    for row in table.iter("tr"):
        sides = ["text-align:right" in cell.get("style", "") for cell in row]
        assert sides == [title not in ("method", "notes") for title in trained.tables[0].titles]


def test_figures_are_drawn_on_demand_and_by_name(solved, trained):
    assert solved.plot().name == "convergence"
    assert trained.plot().name == "metric"
    assert trained.plot("loss") is trained.pictures["loss"]
    assert trained.plot("loss")._repr_png_().startswith(b"\x89PNG")
    assert "png" not in repr(trained.plot("loss"))
    with pytest.raises(ConfigError, match=r"no figure 'lost'.*metric, loss"):
        trained.plot("lost")


def test_what_is_not_done_is_said_and_shows_all_the_same(solved, tmp_path):
    path = tmp_path / "out" / "records.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0])
    one = load_comparison(str(tmp_path / "out"))
    assert "1 of 4 runs done" in str(one)
    assert "1 of 4 runs done" in "".join(shown(one).itertext())
    path.write_bytes(b"")
    none = load_comparison(tmp_path / "out")
    assert "0 of 4 runs done" in str(none)
    assert none.tables == none.conclusions == none.reservations == none.pairs == []
    shown(none)
    with pytest.raises(ConfigError, match="no run of this comparison is done"):
        none.plot()
    path.unlink()
    with pytest.raises(ConfigError, match="no comparison in"):
        load_comparison(tmp_path / "out")


def test_words_of_a_user_are_escaped(trained, tmp_path):
    path = tmp_path / "out" / "comparison.json"
    note = json.loads(path.read_text(encoding="utf-8"))
    note["summary"] = "<script>alert(1)</script>"
    path.write_text(json.dumps(note), encoding="utf-8")
    again = load_comparison(tmp_path / "out")
    assert "<script>" not in again._repr_html_()
    assert note["summary"] in "".join(shown(again).itertext())


def test_the_metric_of_a_record_is_escaped(trained):
    for record in trained.records:
        record["metric"]["unit"] = "<script>"
    assert "&lt;script>" in trained.to_markdown()
    assert "<script>" not in trained.to_markdown()
