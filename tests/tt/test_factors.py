"""Prime factors, against sympy, which torch brings along."""

from __future__ import annotations

import math
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sympy import factorint, isprime, prevprime

from sttp_manifold import TTShape
from sttp_manifold.errors import ShapeError
from sttp_manifold.tt import prime_factors


def by_sympy(n: int) -> tuple[int, ...]:
    return tuple(p for p, times in sorted(factorint(n).items()) for _ in range(times)) or (1,)


@pytest.mark.parametrize(
    ("n", "factors"), [(1, (1,)), (2, (2,)), (64, (2,) * 6), (72, (2, 2, 2, 3, 3)), (97, (97,))]
)
def test_prime_factors(n: int, factors: tuple[int, ...]) -> None:
    assert prime_factors(n) == factors


@given(n=st.one_of(st.integers(1, 5_000_000), st.integers(1, 2**63 - 1)))
def test_factors_are_those_of_sympy(n: int) -> None:
    assert prime_factors(n) == by_sympy(n)


@given(a=st.integers(2_001, 2**32), b=st.integers(2_001, 2**32))
def test_products_of_two_primes(a: int, b: int) -> None:
    p, q = (prevprime(n) for n in (a, b))
    assert prime_factors(p * q) == tuple(sorted((p, q)))
    assert prime_factors(p * p) == (p, p)


@pytest.mark.parametrize(
    "n",
    [
        2**61 - 1,
        2**63 - 1,
        2**63 - 25,  # the largest prime below
        (2**31 - 1) ** 2,
        4_294_967_291 * 4_294_967_279,  # the two largest primes of 32 bits
        3_215_031_751,  # passes Miller-Rabin tests to bases 2, 3, 5 and 7
        3_825_123_056_546_413_051,  # passes those to the first nine primes
        2003 * 2011 * 2017 * 2027 * 2029,
        2003**5,
        2**100 * 3**20,
    ],
)
def test_numbers_that_are_hard_for_trial_division(n: int) -> None:
    start = time.process_time()
    factors = prime_factors(n)
    assert time.process_time() - start < 5  # seconds; trial division takes hours
    assert math.prod(factors) == n
    assert all(map(isprime, factors))


def test_a_plan_of_a_matrix_with_a_huge_prime_side() -> None:
    shape = TTShape.for_matrix(2**61 - 1, 3, 3)
    assert (shape.out_modes, shape.in_modes, shape.rank) == ((2**61 - 1,), (3,), 3)


def test_what_cannot_be_factored_is_said() -> None:
    with pytest.raises(ShapeError, match=r"too large to be factored.*TTShape\(out_modes="):
        prime_factors((2**61 - 1) * (2**89 - 1) * 12)


@pytest.mark.parametrize(
    "n", [0, -4, 2.0, True, "12", None, [3], torch.tensor([2, 3]), torch.tensor(2.0)]
)
def test_what_is_no_positive_integer_is_refused(n: object) -> None:
    with pytest.raises(ShapeError, match="a size to be factored must be a positive integer"):
        prime_factors(n)
