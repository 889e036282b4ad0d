"""Tables, bars and curves: what is drawn are the numbers, in well-formed and escaped markup."""

from __future__ import annotations

import pytest
import torch
from markup import SVG, drawn, texts

from sttp_manifold import nn
from sttp_manifold.display import bars_text, curves_svg, descent_svg, table_html


def test_a_curve_is_its_numbers() -> None:
    (curve,) = drawn(curves_svg([[4.0, 2.0, 0.0]], "values")).iter(f"{SVG}polyline")
    points = [p.split(",") for p in (curve.get("points") or "").split()]
    xs, ys = ([float(p[axis]) for p in points] for axis in (0, 1))
    assert xs[2] - xs[1] == pytest.approx(xs[1] - xs[0], abs=0.2)
    assert ys[1] - ys[0] == pytest.approx(ys[2] - ys[1], abs=0.2)
    assert ys[0] < ys[1] < ys[2]


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([8.0, 4.0, 0.0], "█▄▁  8 to 0"),
        ([1.5e308, 0.75e308], "█▄  1.5e+308 to 7.5e+307"),
        ([0.0, 0.0], "▁▁  0 to 0"),
        ([float("nan"), 1.0], "not finite"),
        ([1.0] * 40, "█" * 32 + "…  1 to 1"),
    ],
)
def test_blocks(values: list[float], text: str) -> None:
    assert bars_text(values) == text


def test_cells_are_escaped() -> None:
    html = table_html(["<th>"], [["<script>alert(1)</script>"], ["a & b"]], bold=(-1,))
    assert texts(drawn(html), "td") == ["<script>alert(1)</script>", "a & b"]
    assert "<script>" not in html


def test_the_summary_of_a_network_is_one_table() -> None:
    model = torch.nn.ModuleDict({"<i>": torch.nn.Linear(32, 64), "b": torch.nn.Linear(64, 10)})
    table = nn.summary(nn.compress(model, rank=4))
    html = drawn(table._repr_html_())
    cells = texts(html, "td")
    assert len(cells) == 9 * (len(table.rows) + 2)
    assert "<i>" in cells
    assert f"{table.total.stored:,}" in cells
    assert f"{table.Z:.3f}" in cells


def test_a_descent_over_the_whole_range_of_floats_is_drawn() -> None:
    (curve,) = drawn(descent_svg([1e308, 1.0, 1e-308], "cost")).iter(f"{SVG}polyline")
    ys = [float(p.split(",")[1]) for p in (curve.get("points") or "").split()]
    assert ys[2] - ys[1] == pytest.approx(ys[1] - ys[0], abs=0.2)
    assert ys[0] < ys[1]
