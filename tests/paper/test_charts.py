"""What docs/math/charts.md and docs/math/product-manifold.md state and prove, on numbers."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import normal, seeds

from sttp_manifold.frames import (
    full_frame,
    full_reflectors,
    full_size,
    haar_frame,
    reduced_frame,
    reduced_reflectors,
    reduced_size,
)
from sttp_manifold.frames.retractions import polar, project_tangent, qr


def frame(seed: int, d: int, r: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return haar_frame(d, r, dtype=torch.float64, generator=generator)


def preimages(Q: torch.Tensor) -> list[torch.Tensor]:
    """Of the subspace of ``Q`` under the reduced chart: one for each choice of signs."""
    r = Q.shape[-1]
    rotation = reduced_reflectors(Q)[1]
    found = []
    for signs in product((1.0, -1.0), repeat=r):
        turned = Q @ rotation * Q.new_tensor(signs)
        T = torch.eye(r, dtype=Q.dtype) - turned[:r].triu()
        B = torch.linalg.solve_triangular(T, -turned[r:], upper=True, left=False)
        found.append(B.flatten())
    return found


@given(seed=seeds, r=st.integers(1, 4), more=st.integers(1, 4))
def test_the_reduced_chart_is_two_to_the_r_to_one(seed, r, more) -> None:
    d = r + more
    Q = frame(seed, d, r)
    found = preimages(Q)
    for B in found:
        other = reduced_frame(B, d, r)
        torch.testing.assert_close(other @ other.mT, Q @ Q.mT, rtol=0, atol=1e-8)
    gaps = torch.pdist(torch.stack(found))
    assert len(found) == 2**r
    assert float(gaps.min()) > 1e-6


@given(seed=seeds, r=st.integers(1, 4), more=st.integers(0, 4))
def test_the_reduced_chart_reaches_subspaces_without_a_top_block(seed, r, more) -> None:
    """Also where the top block is zero, or the subspace that of the first coordinates."""
    d = 2 * r + more
    eye = torch.eye(d, dtype=torch.float64)
    hidden = torch.cat([torch.zeros(r, r, dtype=torch.float64), frame(seed, d - r, r)])
    for Q in (hidden, eye[:, :r], eye[:, -r:]):
        B, rotation = reduced_reflectors(Q)
        torch.testing.assert_close(reduced_frame(B, d, r), Q @ rotation, rtol=0, atol=1e-12)


def rank_of_the_reduced_chart(B: torch.Tensor, d: int, r: int) -> int:
    def projector(b: torch.Tensor) -> torch.Tensor:
        Q = reduced_frame(b, d, r)
        return (Q @ Q.mT).flatten()

    J = torch.autograd.functional.jacobian(projector, B)
    return int(torch.linalg.matrix_rank(J, rtol=1e-9))


@given(seed=seeds, r=st.integers(2, 3), more=st.integers(1, 3))
def test_the_reduced_chart_is_regular_but_for_the_last_diagonal_entries(seed, r, more) -> None:
    """A zero in the first diagonal entry of the top block costs nothing, in a later one a rank."""
    d = 2 * r + more
    generic = frame(seed, d, r)
    dims = reduced_size(d, r)
    assert rank_of_the_reduced_chart(reduced_reflectors(generic)[0], d, r) == dims
    for place, lost in ((0, 0), (1, 1)):
        top = 0.1 * normal(seed, r, r).triu()
        top = top - torch.diag(top.diagonal()) - 0.5 * torch.eye(r, dtype=top.dtype)
        top[place, place] = 0.0
        # Any rows below whose Gram matrix is what the top block lacks.
        gram = torch.eye(r, dtype=top.dtype) - top.mT @ top
        bottom = frame(seed + 1, d - r, r) @ torch.linalg.cholesky(gram).mT
        B = torch.linalg.solve_triangular(
            torch.eye(r, dtype=top.dtype) - top, -bottom, upper=True, left=False
        )
        torch.testing.assert_close(reduced_frame(B.flatten(), d, r)[:r], top)
        assert rank_of_the_reduced_chart(B.flatten(), d, r) == dims - lost


@given(seed=seeds, r=st.integers(1, 4), more=st.integers(0, 4))
def test_the_full_chart_is_one_to_one(seed, r, more) -> None:
    """Read off by LU without pivoting; the signs of the inverse put back what they changed."""
    d = r + more
    p = normal(seed, full_size(d, r))
    Q = full_frame(p, d, r)
    gap = torch.eye(d, r, dtype=Q.dtype) - Q
    Y = gap @ torch.linalg.inv(_upper(gap[:r]))
    rows, columns = torch.tril_indices(r, r, -1)
    torch.testing.assert_close(
        torch.cat([Y[:r][rows, columns], Y[r:].flatten()]), p, rtol=1e-6, atol=1e-6
    )
    _, signs = full_reflectors(Q)
    assert bool((signs.abs() == 1).all())


def _upper(A: torch.Tensor) -> torch.Tensor:
    """Upper factor of an LU factorization without pivoting."""
    U = A.clone()
    for k in range(len(U)):
        U[k + 1 :] = U[k + 1 :] - U[k + 1 :, k : k + 1] / U[k, k] * U[k]
    return U.triu()


@pytest.mark.parametrize(("retraction", "slope"), [(qr, 2.0), (polar, 3.0)])
@given(seed=seeds, r=st.integers(2, 5), more=st.integers(1, 5))
def test_orders_of_the_retractions(retraction, slope, seed, r, more) -> None:
    """The tangential error: the Q factor is of first order only, the polar factor of second."""
    X = frame(seed, r + more, r)
    u = project_tangent(X, normal(seed + 1, r + more, r))
    u = u / u.norm()
    steps = (4e-3, 4e-4)  # short, for leading terms that happen to be small
    errors = [project_tangent(X, retraction(X, t * u) - X - t * u).norm() for t in steps]
    assert float(torch.log10(errors[0] / errors[1])) > slope - 0.2
    if slope == 2:
        assert float(errors[1]) > 1e-4 * steps[1] ** 2
