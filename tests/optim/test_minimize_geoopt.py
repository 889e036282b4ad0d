"""Every manifold x every method: batches converge as their points do, and stay on the manifold."""

from __future__ import annotations

import pytest
import torch
from manifold_table import TABLE, THEIRS, Row

import sttp_manifold as sm
from sttp_manifold._geoopt import geoopt
from sttp_manifold.errors import ManifoldError
from sttp_manifold.manifolds.geometry import geometry_of, plain
from sttp_manifold.optim.minimize import METHODS

D = torch.float64
# geoopt compiles some of SymmetricPositiveDefinite when it is first called.
pytestmark = pytest.mark.filterwarnings(r"ignore:`torch\.jit\.script`")


def problem(row: Row, batch: tuple[int, ...], dtype: torch.dtype = D):
    """A manifold, a start, and the squared distance to points nearby, which can be reached."""
    M, x = row.points(*batch, dtype=dtype)
    G = geometry_of(M)
    generator = torch.Generator().manual_seed(7)
    u = plain(G.proju(x, torch.randn(x.shape, dtype=D, generator=generator).to(dtype)))
    target = G.retr(x, 0.2 * u / float(G.norm(x, u)))
    if not hasattr(M, "unpack"):
        return M, x, lambda y: (y - target).square().sum() / 2
    W = M.unpack(target).to_matrix()
    return M, x, lambda tt: (tt.to_matrix() - W).square().sum() / 2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("row", TABLE.values(), ids=TABLE)
def test_batches_converge_on_every_manifold(row: Row, method: str) -> None:
    M, x, cost = problem(row, (3,))
    if method.endswith("trust_regions") and not row.hessian:
        with pytest.raises(ManifoldError, match="Hessian"):
            sm.minimize(M, cost, x, method)
        return
    tolerance = 1e-3 if "steepest" in method else 1e-6
    result = sm.minimize(M, cost, x, method, gradient_tolerance=tolerance, max_iterations=400)
    assert result.success, result.message
    assert result.fun < (1e-3 if "steepest" in method else 1e-9)
    assert result.x.shape == x.shape
    tolerance = 300 * torch.finfo(D).eps
    lies, why = M.check_point_on_manifold(result.x, explain=True, atol=tolerance, rtol=tolerance)
    assert lies, why


@pytest.mark.parametrize("method", ["trust_regions", "conjugate_gradient", "lbfgs"])
@pytest.mark.parametrize("row", THEIRS.values(), ids=THEIRS)
def test_single_precision_and_two_batch_dimensions(row: Row, method: str) -> None:
    M, x, cost = problem(row, (2, 2), torch.float32)
    if method == "trust_regions" and not row.hessian:
        return
    result = sm.minimize(M, cost, x, method, gradient_tolerance=3e-4, max_iterations=400)
    assert result.success, result.message
    assert result.x.dtype == torch.float32
    assert M.check_point_on_manifold(result.x, atol=1e-5, rtol=1e-5)


def test_a_batch_on_the_ball_converges_as_its_points_do_alone() -> None:
    """Geoopt's inner gives all pairs of a batch there."""
    M = geoopt.PoincareBall(c=torch.tensor(1.0, dtype=D))
    torch.manual_seed(0)
    x, t = (M.random(3, 4, dtype=D).detach().as_subclass(torch.Tensor) for _ in range(2))
    together = sm.minimize(M, lambda y: (y - t).square().sum(), x, "conjugate_gradient")
    assert together.success
    for k in range(3):
        alone = sm.minimize(M, lambda y, k=k: (y - t[k]).square().sum(), x[k], "lbfgs")
        assert alone.success
        torch.testing.assert_close(together.x[k], alone.x, rtol=0, atol=1e-5)


def test_long_runs_stay_on_a_manifold_whose_own_steps_drift() -> None:
    M = geoopt.EuclideanStiefelExact()
    A = torch.diag(torch.logspace(0, 5, 30, dtype=torch.float32))
    x = M.random(30, 4, dtype=torch.float32).detach().as_subclass(torch.Tensor)
    result = sm.minimize(
        M, lambda x: (x * (A @ x)).sum(), x, "steepest_descent", max_iterations=300
    )
    assert result.nit > 50
    torch.testing.assert_close(result.x.mT @ result.x, torch.eye(4), rtol=0, atol=2e-6)


class Straight(geoopt.Euclidean):
    """A manifold that somebody forgot to finish."""

    def transp(self, x, y, v):
        raise NotImplementedError


def test_what_a_manifold_lacks_is_named() -> None:
    x = torch.ones(3, dtype=D)
    with pytest.raises(ManifoldError, match=r"Straight\.transp\(x, y, v\) is not implemented"):
        sm.minimize(Straight(ndim=1), lambda y: (y - 2).square().sum(), x, "conjugate_gradient")
    with pytest.raises(ManifoldError, match=r"a manifold has geoopt's inner, .*int came"):
        sm.minimize(3, lambda y: y.sum(), x)
    M = geoopt.UpperHalf()
    with pytest.raises(ManifoldError, match="points of UpperHalf are complex"):
        sm.minimize(M, lambda y: y.abs().sum(), torch.eye(2, dtype=torch.complex128) * 1j, "lbfgs")


def test_a_solution_of_an_assignment_lies_at_a_vertex() -> None:
    """Where balancing rows and columns in turn is slow."""
    M = geoopt.BirkhoffPolytope()
    C = torch.tensor([[4.0, 1, 3], [2, 0, 5], [3, 2, 2]], dtype=D)
    x = torch.full((3, 3), 1 / 3, dtype=D)
    result = sm.minimize(M, lambda x: (x * C).sum(), x, "lbfgs", max_iterations=60)
    assert result.fun == pytest.approx(5.0, abs=1e-3)
    sums = torch.cat((result.x.sum(-1), result.x.sum(-2)))
    torch.testing.assert_close(sums, torch.ones(6, dtype=D), rtol=0, atol=1e-12)
