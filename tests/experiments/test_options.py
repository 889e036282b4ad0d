from __future__ import annotations

import pytest

from sttp_manifold.errors import ConfigError
from sttp_manifold.experiments.options import numbers, rates, words


def test_numbers_are_listed_once_and_in_order():
    assert numbers(["0-2,1", "7"], "--seeds") == [0, 1, 2, 7]
    assert numbers(["4 8", "8"], "--ranks") == [4, 8]
    assert numbers(None, "--ranks") is None
    assert words([" a, b", "c"]) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("0-99999999999", "100,000,000,000 numbers; expected 100,000 or fewer"),
        ("5-2", "the range ends before it starts; expected 2-5"),
        ("-1", "expected whole numbers"),
        ("1--2", "expected whole numbers"),
        ("0-2-4", "expected whole numbers"),
        ("1.5", "expected whole numbers"),
        ("9" * 5000, "expected whole numbers"),
        ("²", "expected whole numbers"),
        (",", "is empty"),
    ],
)
def test_what_is_no_range_is_refused(word, message):
    with pytest.raises(ConfigError, match=message):
        numbers([word], "--seeds")


def test_rates_are_for_all_or_for_one():
    assert rates(["0.1", "dense-adam=1e-3"]) == {"all": 0.1, "dense-adam": 1e-3}
    with pytest.raises(ConfigError, match=r"--lr 'x=fast': expected a number"):
        rates(["x=fast"])
    with pytest.raises(ConfigError, match=r"'=0\.1'"):
        rates(["=0.1"])
