"""Pull-backs of contractions, written out, against those that torch finds."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import normal, seeds

from sttp_manifold.tt.contract import left_matrix, right_matrix, times_bond
from sttp_manifold.tt.vjp import left_matrix_vjp, right_matrix_vjp, times_bond_vjp

modes = st.lists(st.integers(1, 4), min_size=1, max_size=4)
ranks = st.lists(st.integers(1, 3), min_size=4, max_size=4)
counts = st.integers(1, 3)


def agrees(ours, theirs, arguments, seed):
    """Value, and pull-back of two cotangents of different layout in memory."""
    value, pull = ours(*arguments)
    wanted, vjp = torch.func.vjp(theirs, *arguments)
    torch.testing.assert_close(value, wanted)
    for G in (normal(seed, *value.shape), normal(seed + 1, *value.mT.shape).mT):
        for mine, other in zip(pull(G), vjp(G), strict=True):
            torch.testing.assert_close(mine, other)


@given(modes=modes, ranks=ranks, count=counts, seed=seeds)
def test_products_of_left_cores(modes, ranks, count, seed):
    bonds = [1, *ranks]
    cores = [normal(seed + k, count, bonds[k], n, bonds[k + 1]) for k, n in enumerate(modes)]
    agrees(lambda *c: left_matrix_vjp(c), lambda *c: left_matrix(c), cores, seed + 9)


@given(modes=modes, ranks=ranks, count=counts, seed=seeds)
def test_products_of_right_cores(modes, ranks, count, seed):
    bonds = [*ranks[: len(modes)], 1]
    cores = [normal(seed + k, count, bonds[k], n, bonds[k + 1]) for k, n in enumerate(modes)]
    agrees(lambda *c: right_matrix_vjp(c), lambda *c: right_matrix(c), cores, seed + 9)


@given(rows=st.integers(1, 5), rank=st.integers(1, 4), count=counts, full=st.booleans(), seed=seeds)
def test_times_a_bond(rows, rank, count, full, seed):
    bond = normal(seed, count, *([rank, rank] if full else [rank]))
    arguments = [normal(seed + 1, count, rows, rank), bond]
    agrees(times_bond_vjp, lambda m, s: times_bond(m, s, 1), arguments, seed + 2)
