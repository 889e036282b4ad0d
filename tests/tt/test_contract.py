"""Cores on other modes: the same product, whichever way its index is cut."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import batches, normal, seeds

from sttp_manifold.tt.contract import environments, left_matrix, regroup_cores


def merged(modes: list[int], cuts: list[bool]) -> list[int]:
    """Neighbouring modes multiplied where there is no cut between them."""
    grouped = [modes[0]]
    for mode, cut in zip(modes[1:], cuts, strict=False):
        if cut:
            grouped.append(mode)
        else:
            grouped[-1] *= mode
    return grouped


@st.composite
def chains(draw):
    modes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=5))
    cuts = st.lists(st.booleans(), min_size=len(modes), max_size=len(modes))
    return merged(modes, draw(cuts)), merged(modes, draw(cuts))


def draw_cores(modes, seed, batch=(), first=1):
    ranks = [first, *(2 + k % 2 for k in range(len(modes)))]
    return tuple(
        normal(seed + k, *batch, ranks[k], mode, ranks[k + 1]) for k, mode in enumerate(modes)
    )


@given(pair=chains(), seed=seeds, batch=batches, first=st.integers(1, 2))
def test_regrouping_keeps_the_product(pair, seed, batch, first) -> None:
    source, target = pair
    cores = draw_cores(source, seed, batch, first)
    grouped = regroup_cores(cores, target)
    assert [core.shape[-2] for core in grouped] == target
    assert grouped[0].shape[-3] == first
    assert grouped[-1].shape[-1] == cores[-1].shape[-1]

    def product(chain):
        full = chain[0]
        for core in chain[1:]:
            full = (full.flatten(-3, -2) @ core.flatten(-2)).reshape(
                *full.shape[:-3], first, -1, core.shape[-1]
            )
        return full

    torch.testing.assert_close(product(grouped), product(cores))


@given(modes=st.lists(st.integers(1, 4), min_size=1, max_size=4), seed=seeds, batch=batches)
def test_environments_are_products_of_the_parts(modes, seed, batch) -> None:
    a, b = draw_cores(modes, seed, batch), draw_cores(modes, seed + 50)
    swept = environments(a, b)
    assert len(swept) == len(modes) + 1
    for k in range(1, len(modes) + 1):
        expected = left_matrix(a[:k]).mT @ left_matrix(b[:k])
        torch.testing.assert_close(swept[k], expected)
