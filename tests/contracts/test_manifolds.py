"""Manifolds x laws: what solvers ask of a manifold, of ours and of all that geoopt has.

geoopt's are asked through :func:`~sttp_manifold.manifolds.geometry.geometry_of`, which mends what
some of them lack; ours as they are, too. A new manifold is a row of ``tests/manifold_table.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from manifold_table import OURS, TABLE, Row
from torch import Tensor

import sttp_manifold as sm
from sttp_manifold._geoopt import geoopt
from sttp_manifold.checks.ambient import Ambient
from sttp_manifold.errors import ManifoldError, ShapeError
from sttp_manifold.manifolds.cost import ManifoldCost
from sttp_manifold.manifolds.geometry import geometry_of, plain

D = torch.float64
# geoopt compiles some of SymmetricPositiveDefinite when it is first called.
pytestmark = pytest.mark.filterwarnings(r"ignore:`torch\.jit\.script`")
rows = pytest.mark.parametrize("row", TABLE.values(), ids=TABLE)
own = pytest.mark.parametrize("row", OURS.values(), ids=OURS)
hessians = pytest.mark.parametrize(
    "row", [r for r in TABLE.values() if r.hessian], ids=[k for k, r in TABLE.items() if r.hessian]
)


def normal(like: Tensor, seed: int) -> Tensor:
    # Not the stream of the points, which spheres draw by normalizing these very numbers.
    generator = torch.Generator().manual_seed(seed ^ 0x7A6E)
    return torch.randn(like.shape, dtype=D, generator=generator).to(like.dtype)


def tangent(M: Any, x: Tensor, seed: int, size: float = 0.1) -> Tensor:
    """A tangent vector at each point, short enough for retractions that are only local."""
    G = geometry_of(M)
    u = plain(G.proju(x, normal(x, seed)))
    return size * u / float(G.norm(x, u))


def place(M: Any, x: Tensor) -> Tensor:
    """Where a point lies: its weight, where points are coordinates of weights up to a gauge."""
    return Ambient(M).point(x)


def cost_on(M: Any, x: Tensor) -> Callable[[Any], Tensor]:
    """A cost that sees all of a point, or of its weight."""
    of_weights = hasattr(M, "unpack")
    Z = normal(M.unpack(x).to_matrix() if of_weights else x, 5)

    def cost(argument: Any) -> Tensor:
        y = argument.to_matrix() if of_weights else argument
        return (y * Z).sum() + (y * Z).square().sum() / 2

    return cost


@rows
def test_projection_is_one_and_its_rank_is_the_dimension(row: Row) -> None:
    M, x = row.points()
    G = geometry_of(M)
    e = normal(x, 1)
    u = G.proju(x, e)
    torch.testing.assert_close(G.proju(x, u), u, rtol=1e-8, atol=1e-8)
    eye = torch.eye(x.numel(), dtype=D)
    rank = torch.linalg.matrix_rank(
        torch.stack([G.proju(x, r.view(x.shape)).reshape(-1) for r in eye]), rtol=1e-6
    )
    assert int(rank) == row.dim
    metric = abs(float(G.inner(x, u, e)) - float(G.inner(x, u, G.proju(x, e))))
    if not isinstance(M, geoopt.Lorentz):  # whose ambient form is not positive
        assert metric <= 1e-8 * float(G.norm(x, u)) * max(1.0, float(e.norm()))


@rows
@pytest.mark.parametrize("batch", [(3,), (2, 3)])
def test_a_batch_is_treated_as_its_points(row: Row, batch: tuple[int, ...]) -> None:
    M, x = row.points(*batch)
    G = geometry_of(M)
    u, v = tangent(M, x, 1), tangent(M, x, 2)
    e = normal(x, 3)
    y = G.retr(x, u)
    together = {
        "gradient": G.gradient(x, e),
        "proju": G.proju(x, e),
        "retr": place(M, y),
        "transp": G.transp(x, y, v),
    }
    inner = 0.0
    for k in torch.cartesian_prod(*map(torch.arange, batch)).reshape(-1, len(batch)).tolist():
        k = tuple(k)
        inner += float(G.inner(x[k], u[k], v[k]))
        alone = {
            "gradient": G.gradient(x[k], e[k]),
            "proju": G.proju(x[k], e[k]),
            "retr": place(M, G.retr(x[k], u[k])),
            "transp": G.transp(x[k], y[k], v[k]),
        }
        for name, value in alone.items():
            torch.testing.assert_close(together[name][k], value, rtol=1e-7, atol=1e-9, msg=name)
    assert float(G.inner(x, u, v)) == pytest.approx(inner, rel=1e-9, abs=1e-15)
    stack = torch.stack([u, v, u + v])
    moved = G.transp(x, y, stack)
    for one, vector in zip(moved, stack, strict=True):
        torch.testing.assert_close(one, G.transp(x, y, vector), rtol=1e-9, atol=1e-12)


@rows
def test_inner_products_are_bilinear_at_any_scale(row: Row) -> None:
    M, x = row.points(2, dtype=torch.float32)
    G = geometry_of(M)
    u, v = tangent(M, x, 1, 1.0), tangent(M, x, 2, 1.0)
    usual = float(G.inner(x, u, u))
    for s in (1e-30, 1e30):
        assert float(G.inner(x, s * u, s * u)) == pytest.approx(s * s * usual, rel=1e-5)
        assert float(G.norm(x, s * u)) == pytest.approx(s * usual**0.5, rel=1e-5)
    assert float(G.inner(x, 0 * u, v)) == 0


@rows
def test_gradients_and_projections_are_linear_at_any_scale(row: Row) -> None:
    M, x = row.points(2)
    G = geometry_of(M)
    e = normal(x, 1)
    for s in (1e-100, 1e100):
        torch.testing.assert_close(G.gradient(x, s * e) / s, G.gradient(x, e), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(G.proju(x, s * e) / s, G.proju(x, e), rtol=1e-9, atol=1e-9)


@rows
def test_the_gradient_is_the_derivative_along_the_retraction(row: Row) -> None:
    """<grad f, u> = d/dt f(retr(x, t u)): gradient, metric and retraction speak of one vector."""
    M, x = row.points(2)
    f = ManifoldCost(M, cost_on(M, x))
    G = f.geometry
    _, gradient = f.gradient(x)
    torch.testing.assert_close(G.proju(x, gradient), gradient, rtol=1e-7, atol=1e-7)
    u, t = tangent(M, x, 4), 1e-4

    def along(step: float) -> float:
        return float(f.value(G.retr(x, step * u)))

    slope = (8 * (along(t) - along(-t)) - (along(2 * t) - along(-2 * t))) / (12 * t)
    size = float(G.norm(x, gradient) * G.norm(x, u))
    assert abs(slope - float(G.inner(x, gradient, u))) <= 1e-7 * max(size, abs(float(f.value(x))))


@rows
@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_many_steps_stay_on_the_manifold(row: Row, dtype: torch.dtype) -> None:
    M, x = row.points(2, dtype=dtype)
    G = geometry_of(M)
    for seed in range(40):
        u = tangent(M, x, seed, 0.1)
        x = G.retr(x, u)
        assert x.dtype == dtype
        v = G.transp(x, G.retr(x, u), u)
        assert v.shape == x.shape
    tolerance = 300 * torch.finfo(dtype).eps
    lies, why = M.check_point_on_manifold(x, explain=True, atol=tolerance, rtol=tolerance)
    assert lies, why


@rows
def test_transported_vectors_are_tangent(row: Row) -> None:
    M, x = row.points(2)
    G = geometry_of(M)
    u, v = tangent(M, x, 1), tangent(M, x, 2)
    y = G.retr(x, u)
    moved = G.transp(x, y, v)
    torch.testing.assert_close(G.proju(y, moved), moved, rtol=1e-7, atol=1e-9)
    near = G.retr(x, 1e-6 * u)
    velocity = Ambient(M).velocity
    moved = velocity(near, G.transp(x, near, v))
    torch.testing.assert_close(moved, velocity(x, v), rtol=0, atol=1e-5)


@rows
def test_arguments_are_left_as_they_are(row: Row) -> None:
    M, x = row.points(2)
    G = geometry_of(M)
    u, e = tangent(M, x, 1), normal(x, 2)
    before = [t.clone() for t in (x, u, e)]
    y = G.retr(x, u)
    G.gradient(x, e), G.proju(x, e), G.inner(x, u, u), G.transp(x, y, u)
    for now, then in zip((x, u, e), before, strict=True):
        assert torch.equal(now, then)


@hessians
def test_hessians_are_derivatives_of_the_gradient(row: Row) -> None:
    """Second derivative along the retraction of a critical point: no curve is singled out."""
    M, x = row.points(2)
    f = ManifoldCost(M, cost_on(M, x))
    G = f.geometry
    H = f.hessian(x)
    u, v = tangent(M, x, 1, 1.0), tangent(M, x, 2, 1.0)
    forward, back = float(G.inner(x, H(u), v)), float(G.inner(x, u, H(v)))
    assert forward == pytest.approx(back, rel=1e-7, abs=1e-8)
    torch.testing.assert_close(H(u + 2 * v), H(u) + 2 * H(v), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(G.proju(x, H(u)), H(u), rtol=1e-8, atol=1e-8)
    t = 1e-4

    def slope(step: float) -> float:
        y = G.retr(x, step * u)
        return float(G.inner(y, f.gradient(y)[1], G.transp(x, y, v)))

    if not row.gauge:  # transport by projection is parallel to first order
        assert (slope(t) - slope(-t)) / (2 * t) == pytest.approx(forward, rel=1e-5, abs=1e-5)


@rows
def test_trust_regions_run_or_say_what_does(row: Row) -> None:
    M, x = row.points(2)
    cost = cost_on(M, x)
    if row.hessian:
        assert sm.minimize(M, cost, x, max_iterations=2).nit >= 1
        return
    with pytest.raises(ManifoldError, match=r"Hessian.*method='conjugate_gradient'"):
        sm.minimize(M, cost, x)
    assert sm.minimize(M, cost, x, "conjugate_gradient", max_iterations=2).nit >= 1


@rows
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_pymanopt_sees_a_batch_as_a_product(row: Row, batch: tuple[int, ...]) -> None:
    M, x = row.points(*batch)
    count = max(1, int(torch.tensor(batch).prod()))
    theirs = sm.to_pymanopt(M, size=tuple(x.shape))
    assert theirs.dim == count * row.dim
    assert theirs.typical_dist == pytest.approx(theirs.dim**0.5)
    point = theirs.array(x)
    u = theirs.random_tangent_vector(point)
    assert theirs.norm(point, u) == pytest.approx(1.0)
    assert theirs.zero_vector(point).shape == x.shape
    assert theirs.norm(point, theirs.zero_vector(point)) == 0
    assert theirs.inner_product(point, u, 2 * u) == pytest.approx(2.0)
    if not isinstance(M, geoopt.Lorentz):
        assert theirs.random_point().shape == x.shape


# -- ours, as they are -----------------------------------------------------------------------------


@own
def test_ours_pass_their_own_check(row: Row) -> None:
    M, x = row.points(2)
    result = sm.check_manifold(M, x)
    assert result.passed, str(result)
    assert sm.check_gradient(M, cost_on(M, x), x).passed


@own
@pytest.mark.parametrize("batch", [(2,), (2, 3)])
def test_hessians_of_a_batch_pass_their_check(row: Row, batch: tuple[int, ...]) -> None:
    M, x = row.points(*batch)
    result = sm.check_hessian(M, cost_on(M, x), x)
    assert result.passed, str(result)


@own
def test_vectors_of_another_length_are_refused(row: Row) -> None:
    """A size of one broadcasts in torch, and a vector of one number would pass for a vector."""
    M, x = row.points(3)
    n = M.n_elements
    calls = (
        M.inner,
        lambda x, u: M.inner(x, x, u),
        M.norm,
        M.component_inner,
        M.proju,
        M.egrad2rgrad,
        M.retr,
        lambda x, u: M.transp(x, x, u),
        lambda x, u: M.retr_transp(x, u, u),
        lambda x, u: M.transp_follow_retr(x, u, u),
    )
    for call in calls:
        for point, vector in (
            (x, x[..., :1]),
            (x[..., :1], x),
            (x, x[..., : n - 1]),
            (x, torch.zeros((), dtype=D)),
            (x, torch.zeros(2, n, dtype=D)),
        ):
            with pytest.raises(ShapeError, match=r"points and tangent vectors|batch dimensions"):
                call(point, vector)
    with pytest.raises(ShapeError):
        M.transp(x[..., :1], x, x)
