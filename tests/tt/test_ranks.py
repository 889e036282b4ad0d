"""Ranks by integers alone: clipping and merging against chains of matrices with those ranks."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sttp_manifold.errors import RankError, ShapeError
from sttp_manifold.tt.ranks import check_ranks, clip_ranks, merge_square

chains = st.lists(st.integers(1, 5), min_size=2, max_size=5)


@given(modes=chains, wanted=st.data())
def test_clipped_ranks_are_the_largest_that_can_be_carried(modes, wanted) -> None:
    inner = [wanted.draw(st.integers(1, 30)) for _ in modes[1:]]
    ranks = clip_ranks(modes, (1, *inner, 1))
    check_ranks(modes, ranks)
    assert all(found <= asked for found, asked in zip(ranks[1:-1], inner, strict=True))
    # One more at any bond is over what was asked for, or over what the bond can carry.
    for bond in range(1, len(modes)):
        more = [*ranks[:bond], ranks[bond] + 1, *ranks[bond + 1 :]]
        if more[bond] <= inner[bond - 1]:
            with pytest.raises(RankError):
                check_ranks(modes, more)


@given(modes=chains, rank=st.integers(1, 30))
def test_merged_halves_keep_their_size_and_have_no_square_core(modes, rank) -> None:
    ranks = clip_ranks([*modes, 1000], (1, *[rank] * len(modes), 1))[:-1]
    merged, kept = merge_square(modes, ranks)
    assert math.prod(merged) == math.prod(modes)
    assert (kept[0], kept[-1]) == (1, ranks[-1])
    assert len(kept) == len(merged) + 1
    cores = zip(kept[:-1], merged, kept[1:], strict=True)
    assert not any(a * n == b for a, n, b in list(cores)[:-1])


def test_wrong_numbers_of_ranks() -> None:
    with pytest.raises(ShapeError, match=r"2 modes .* have 3 ranks"):
        check_ranks((2, 3), (1, 2))
    with pytest.raises(RankError, match="outer ranks are 1"):
        check_ranks((2, 3), (2, 2, 1))
