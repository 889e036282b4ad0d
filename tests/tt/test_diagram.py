"""Displays of plans and values: what is drawn is what they say, in well-formed markup."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from markup import SVG, drawn, texts
from strategies import batches, seeds, shapes, spectra, weight

from sttp_manifold import SpectralTT, TTShape, nn, tt_svd


@given(shape=shapes(max_modes=4))
def test_the_text_diagram_says_modes_and_ranks_in_their_places(shape) -> None:
    above, legs_above, chain, legs_below, below = shape.diagram().split("\n")
    assert tuple(map(int, above.split())) == shape.out_modes
    assert tuple(map(int, below.split())) == shape.in_modes
    assert tuple(map(int, re.findall(r"\d+", chain))) == (
        *shape.ranks[1 : len(shape.out_modes) + 1],
        *shape.ranks[len(shape.out_modes) : -1],
    )
    cores = [m.start() for m in re.finditer("[▶▷◀◁]", chain)]
    legs = [m.start() for line in (legs_above, legs_below) for m in re.finditer("│", line)]
    numbers = [m.start() for line in (above, below) for m in re.finditer(r"\d+", line)]
    assert cores == legs == numbers


@given(shape=shapes(max_modes=4))
def test_hollow_cores_are_those_that_merge(shape) -> None:
    merged = shape.merged
    count = len(shape.core_shapes) - len(merged.core_shapes)
    assert len(re.findall("[▷◁]", shape.diagram())) == count
    assert not re.findall("[▷◁]", merged.diagram())
    paths = [p.get("fill") for p in drawn(shape._repr_html_()).iter(f"{SVG}path")]
    assert paths.count("none") == count


def test_a_long_chain_keeps_both_ends_of_either_side() -> None:
    shape = TTShape(tuple(range(2, 14)), tuple(range(2, 14)), rank=5)
    above, _, chain, _, below = shape.diagram().split("\n")
    assert above.split() == ["2", "3", "4", "10", "11", "12", "13"]
    assert below.split() == ["2", "3", "4", "5", "11", "12", "13"]
    assert chain.count("⋯") == 2
    assert len(chain) < 80


@given(shape=shapes(), spectrum=spectra, seed=seeds, batch=batches)
def test_html_of_any_weight_is_well_formed_and_holds_its_numbers(
    shape, spectrum, seed, batch
) -> None:
    tt = weight(shape, spectrum, seed, batch)
    html = drawn(tt._repr_html_())
    modes = texts(html, f"{SVG}text")
    for mode in (*shape.merged.out_modes, *shape.merged.in_modes):
        assert str(mode) in modes
    assert f"{shape.numel:,}" in "".join(html.itertext())
    curves = list(html.iter(f"{SVG}polyline"))
    assert len(curves) == max(1, torch.Size(batch).numel())
    assert all(len((c.get("points") or "").split()) == shape.rank for c in curves)
    top = float(tt.singular_values().max())
    assert any(text == f"{top:.3g}" for text in modes)
    assert str(tt).splitlines()[0].startswith("SpectralTT: ")
    assert ("singular values" in str(tt)) == (not batch)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("number", [0.0, float("nan"), float("inf")])
def test_weights_that_have_gone_wrong_still_print(full: bool, number: float) -> None:
    tt = tt_svd(torch.randn(12, 10), TTShape.for_matrix(12, 10, rank=3))
    bond = torch.full((3, 3) if full else (3,), number)
    tt = SpectralTT(tt.left, bond, tt.right, tt.shape)
    drawn(tt._repr_html_())
    assert ("not finite" in str(tt)) == (number != 0)


def test_weights_without_numbers_print() -> None:
    tt = tt_svd(torch.randn(12, 10), TTShape.for_matrix(12, 10, rank=3)).to("meta")
    assert "meta device" in str(tt)
    drawn(tt._repr_html_())
    empty = tt_svd(torch.randn(0, 12, 10), TTShape.for_matrix(12, 10, rank=3))
    assert "batch (0,)" in str(empty)
    drawn(empty._repr_html_())


def test_a_display_leaves_the_graph_alone() -> None:
    value = nn.HouseholderWeight(TTShape.for_matrix(12, 10, rank=3)).tt()
    str(value)
    value._repr_html_()
    value.to_matrix().sum().backward()
