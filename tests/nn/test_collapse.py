"""Laws of the collapse alarm: it comes with a collapse, and never without one."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sttp_manifold.errors import SpectrumError
from sttp_manifold.nn import CollapseRule
from sttp_manifold.nn.collapse import Measures, measures_of

SEEDS = st.integers(0, 2**32 - 1)


def stream(ranks, ratios=None) -> list[Measures]:
    ratios = [0.5] * len(ranks) if ratios is None else ratios
    return [Measures(float(a), float(b), 1.0, float(b)) for a, b in zip(ranks, ratios, strict=True)]


def raised(rule: CollapseRule, history: list[Measures]) -> set[str]:
    """Every kind of alarm at any time of a history."""
    return {
        alarm.kind
        for k in range(1, len(history) + 1)
        for alarm in rule.judge("layer", k, history[:k])
    }


@given(SEEDS, st.integers(5, 60), st.floats(0.2, 0.8), st.floats(1.0, 100.0))
def test_no_alarm_while_stable_ranks_stay_in_a_band(seed, length, fall, level):
    """Whatever a stream does within the band that the rule names, it is healthy."""
    g = torch.Generator().manual_seed(seed)
    # From the highest of the band to the lowest is less than half the way down.
    width = (1 - fall) / (3 + fall) * 0.999
    kinds = (
        torch.rand(length, generator=g) * 2 - 1,
        torch.linspace(1, -1, length),  # falls all the way
        torch.randn(length, generator=g).cumsum(0).clamp(-1, 1),
        torch.randint(0, 2, (length,), generator=g) * 2.0 - 1,
    )
    ratios = 10 ** (-2.9 * torch.rand(length, generator=g))  # all above the least
    for kind in kinds:
        history = stream(level * (1 + width * kind), ratios)
        assert raised(CollapseRule(fall=fall), history) == set()


@given(SEEDS, st.integers(3, 30), st.integers(0, 40), st.floats(0.05, 0.45))
def test_an_alarm_after_patience_readings_below(seed, healthy, fallen, depth):
    """A stream that falls below half its reference and stays there raises it in time."""
    g = torch.Generator().manual_seed(seed)
    rule = CollapseRule()
    high = 10 * (1 + 0.05 * torch.rand(healthy, generator=g))
    low = 10 * depth * (1 + 0.05 * torch.rand(rule.patience + fallen, generator=g))
    history = stream([*high, *low])
    soon = history[: healthy + rule.patience]
    assert "stable rank" in {a.kind for a in rule.judge("", 0, soon)}
    before = history[: healthy + rule.patience - 1]
    assert "stable rank" not in {a.kind for a in rule.judge("", 0, before)}


@given(SEEDS, st.integers(0, 2))
def test_fewer_bad_readings_than_patience_are_none(seed, bad):
    rule = CollapseRule()
    place = seed % 20
    ranks = torch.full((30,), 8.0)
    ranks[5 + place : 5 + place + bad] = 1.0
    assert "stable rank" not in raised(rule, stream(ranks))


@given(SEEDS, st.floats(1e-12, 9e-4))
def test_smallest_over_largest_is_an_alarm_only_where_it_was_more(seed, low):
    g = torch.Generator().manual_seed(seed)
    rule = CollapseRule()
    noise = 1 + 0.1 * torch.rand(20, generator=g)
    fell = [0.4] * 5 + (low * 0.9 * noise[:15] / 1.1).tolist()
    assert "ratio" in raised(rule, stream([8.0] * 20, fell))
    # A weight that never had more, as one of low rank, does not collapse.
    never = (low * noise).tolist()
    assert raised(rule, stream([8.0] * 20, never)) == set()
    assert raised(rule, stream([8.0] * 20, [0.0] * 20)) == set()


@given(SEEDS)
def test_a_steady_fall_is_a_trend_before_it_is_a_collapse(seed):
    g = torch.Generator().manual_seed(seed)
    rule = CollapseRule()
    length = 40
    fall = torch.linspace(1, 0.6, length) * (1 + 0.005 * torch.randn(length, generator=g))
    assert raised(rule, stream(12 * fall)) == {"trend"}
    slight = torch.linspace(1, 0.8, length) * (1 + 0.005 * torch.randn(length, generator=g))
    assert raised(rule, stream(12 * slight)) == set()
    steep = torch.linspace(1, 0.55, 14) * (1 + 0.002 * torch.randn(14, generator=g))
    assert raised(rule, stream(12 * steep)) == {"trend"}


def test_chance_is_no_trend():
    """Of 20,000 histories of independent readings none is called a trend."""
    rule = CollapseRule()
    g = torch.Generator().manual_seed(0)
    values = torch.randn(20_000, rule.window, generator=g)
    signs = torch.zeros(len(values))
    for k in range(rule.window):
        for j in range(k + 1, rule.window):
            signs += (values[:, j] - values[:, k]).sign()
    n = rule.window
    z = (signs + 1) / math.sqrt(n * (n - 1) * (2 * n + 5) / 18)
    assert int((z <= -rule.z).sum()) <= 5  # 2e-4 by the normal law
    # Our statistic is that one.
    for row, value in zip(values[:20].tolist(), z[:20].tolist(), strict=True):
        assert CollapseRule(z=max(-value - 1e-6, 1e-9))._falls(row) == (value <= -1e-9)


@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=30))
def test_measures_are_what_they_are_called(values):
    s = torch.tensor(values, dtype=torch.float64)
    found = measures_of(s)
    assert found.largest == max(values)
    assert found.smallest == min(values)
    if max(values) > 1e-150:
        matrix = torch.diag(s)
        top = torch.linalg.matrix_norm(matrix, 2)
        rank = (torch.linalg.matrix_norm(matrix) / top).square()
        torch.testing.assert_close(found.stable_rank, float(rank))
        assert 1 <= found.stable_rank + 1e-9 <= len(values) + 2e-9
        assert found.ratio == min(values) / max(values)
    scaled = measures_of(2 * s)
    assert scaled.ratio == pytest.approx(found.ratio)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"fall": 1.0}, r"fall=1\.0: expected a part between 0 and 1"),
        ({"least_ratio": 0}, "least_ratio=0"),
        ({"patience": 0}, "patience=0: expected a whole number, 1 or more"),
        ({"reference": 1.5}, r"reference=1\.5"),
        ({"window": 9}, "window=9: expected a whole number, 10 or more"),
        ({"z": -1}, "z=-1: expected a positive number"),
    ],
)
def test_a_rule_that_is_none_is_refused(wrong, message):
    with pytest.raises(SpectrumError, match=message):
        CollapseRule(**wrong)
