from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from sttp_manifold.experiments.reading.paired import paired

values = st.floats(-100, 100, allow_nan=False)


@given(st.lists(st.tuples(values, values), min_size=2, max_size=12))
def test_the_interval_is_that_of_scipy(pairs):
    a, b = ({seed: pair[k] for seed, pair in enumerate(pairs)} for k in (0, 1))
    found = paired(a, b)
    d = np.subtract(*np.array(pairs).T)
    assert found.mean == pytest.approx(d.mean(), abs=1e-9)
    if d.std() > 1e-9:
        expected = stats.ttest_rel(list(a.values()), list(b.values())).confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx(tuple(expected), rel=1e-6, abs=1e-9)
    other = paired(b, a)
    assert (-other.high, -other.low) == pytest.approx((found.low, found.high), abs=1e-9)


def test_only_seeds_that_both_have_count():
    found = paired({0: 1.0, 1: 2.0, 2: 99.0}, {1: 1.0, 0: 0.5, 3: -99.0})
    assert (found.mean, found.seeds) == (0.75, 2)
    assert not found.apart
    assert paired({0: 1.0}, {0: 2.0}) is None
    assert paired({0: 1.0, 1: 1.0}, {2: 1.0, 3: 2.0}) is None


def test_what_seeds_share_falls_out():
    # Seeds differ by more than methods do, in the same way for both.
    a = {0: 80.0, 1: 90.0, 2: 70.0, 3: 95.0}
    b = {seed: value - 1.0 + 0.1 * (-1) ** seed for seed, value in a.items()}
    assert paired(a, b).apart
    assert paired(a, b).mean == pytest.approx(1.0)


@pytest.mark.parametrize("count", [2, 3, 10])
def test_the_interval_holds_what_it_says(count):
    rng = np.random.default_rng(0)
    held = 0
    for draw in rng.standard_normal((1000, count)) + 3.0:
        found = paired(dict(enumerate(draw)), dict.fromkeys(range(count), 0.0))
        held += found.low <= 3.0 <= found.high
    assert held / 1000 == pytest.approx(0.95, abs=0.025)


@pytest.mark.parametrize("count", [2, 10])
def test_differences_that_are_all_equal_tell_no_less_than_one_example_apart(count):
    """Accuracies of 297 examples: equal differences are how coarse these are."""
    example = 100 / 297
    behind = {seed: 280 / 297 * 100 - seed * example for seed in range(count)}
    for ahead, apart in ((0, False), (1, False), (2, True)):
        front = {seed: (280 + ahead - seed) / 297 * 100 for seed in range(count)}
        for a, b in ((front, behind), (behind, front)):
            found = paired(a, b, example)
            assert (found.high - found.low) / 2 == pytest.approx(example)
            assert found.apart is apart
            assert not paired(a, b).apart
            # One seed of another difference gives a spread, and the interval is Student's again.
            other = {**a, 0: a[0] + 1.0}
            assert paired(other, b, example) == paired(other, b)
