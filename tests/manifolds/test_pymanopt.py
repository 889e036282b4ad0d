"""Our manifolds in pymanopt's hands: its own manifolds, solvers and backend are the judges."""

from __future__ import annotations

import sys

import numpy as np
import pymanopt
import pytest
import torch
from hypothesis import given, settings
from problems import Counted, brockett, completion
from pymanopt.optimizers import ConjugateGradient, SteepestDescent, TrustRegions
from strategies import normal, seeds, shapes, spectra

import sttp_manifold as sm
from sttp_manifold._geoopt import Euclidean, EuclideanStiefel, geoopt
from sttp_manifold.errors import ManifoldError
from sttp_manifold.manifolds.cost import ManifoldCost
from sttp_manifold.manifolds.pymanopt import _adapter


@settings(max_examples=15)
@given(plan=shapes(max_numel=200), spectrum=spectra, seed=seeds)
def test_laws_of_the_adapter(plan, spectrum, seed) -> None:
    ours = sm.SpectralTTManifold(plan, spectrum)
    M = sm.to_pymanopt(ours)
    torch.manual_seed(seed)
    x = M.random_point()
    assert x.dtype == np.float64
    assert x.shape == (ours.n_elements,)
    assert M.dim == ours.total_dim
    assert ours.check_point_on_manifold(torch.as_tensor(x))
    u = M.random_tangent_vector(x) if M.dim else M.zero_vector(x)
    if M.dim:
        assert M.norm(x, u) == pytest.approx(1)
    np.testing.assert_allclose(M.projection(x, u), u, atol=1e-12)
    np.testing.assert_allclose(M.to_tangent_space(x, u), u, atol=1e-12)
    y = M.retraction(x, 0.1 * u)
    assert ours.check_point_on_manifold(torch.as_tensor(y))
    np.testing.assert_allclose(M.retraction(x, M.zero_vector(x)), x, atol=1e-12)
    moved = M.transport(x, y, u)
    np.testing.assert_allclose(M.projection(y, moved), moved, atol=1e-12)
    v = M.random_tangent_vector(x) if M.dim else u
    assert M.inner_product(x, u, v) == pytest.approx(float(u @ v), abs=1e-12)
    # First order: the retraction leaves along u.
    small = M.retraction(x, 1e-6 * u)
    np.testing.assert_allclose((small - x) / 1e-6, u, atol=1e-5)
    with pytest.raises(NotImplementedError):
        M.dist(x, y)


def test_stiefel_is_pymanopts_stiefel() -> None:
    theirs = pymanopt.manifolds.Stiefel(7, 3, retraction="qr")
    M = sm.to_pymanopt(EuclideanStiefel(), size=(7, 3))
    assert M.dim == theirs.dim
    x = M.random_point()
    e, h = normal(1, 7, 3).numpy(), normal(2, 7, 3).numpy()
    u, v = M.random_tangent_vector(x), M.random_tangent_vector(x)
    y = M.retraction(x, u)
    pairs = {
        "inner": (M.inner_product(x, u, v), theirs.inner_product(x, u, v)),
        "norm": (M.norm(x, 3 * u), theirs.norm(x, 3 * u)),
        "projection": (M.projection(x, e), theirs.projection(x, e)),
        "retraction": (y, theirs.retraction(x, u)),
        "transport": (M.transport(x, y, v), theirs.transport(x, y, v)),
        "exp": (M.exp(x, u), theirs.exp(x, u)),
        "gradient": (
            M.euclidean_to_riemannian_gradient(x, e),
            theirs.euclidean_to_riemannian_gradient(x, e),
        ),
        "hessian": (
            M.euclidean_to_riemannian_hessian(x, e, h, u),
            theirs.euclidean_to_riemannian_hessian(x, e, h, u),
        ),
    }
    for name, (ours, expected) in pairs.items():
        np.testing.assert_allclose(ours, expected, atol=1e-12, err_msg=name)


def test_sphere_and_euclidean_have_distances_and_dimensions() -> None:
    S = sm.to_pymanopt(geoopt.Sphere(), size=(6,))
    theirs = pymanopt.manifolds.Sphere(6)
    x, y = S.random_point(), S.random_point()
    assert S.dim == theirs.dim
    assert S.dist(x, y) == pytest.approx(theirs.dist(x, y))
    np.testing.assert_allclose(S.log(x, y), theirs.log(x, y), atol=1e-12)
    E = sm.to_pymanopt(Euclidean(ndim=2), size=(3, 2))
    a, b = E.random_point(), E.random_point()
    assert E.dim == 6
    assert E.dist(a, b) == pytest.approx(np.linalg.norm(a - b))


@pytest.mark.parametrize(
    ("solver", "ours"),
    [(ConjugateGradient, "conjugate_gradient"), (TrustRegions, "trust_regions")],
)
def test_pymanopts_solvers_reach_our_cost(solver, ours) -> None:
    plan = sm.TTShape((3, 4), (2, 5), rank=3)
    M = sm.SpectralTTManifold(plan, "full")
    target = normal(3, plan.d_out, plan.d_in)
    cost = Counted(lambda tt: (tt.to_matrix() - target).square().sum() / 2)
    counts = ManifoldCost(M, cost)
    problem = sm.pymanopt_problem(M, counts)
    torch.manual_seed(4)
    x0 = problem.manifold.random_point()
    arguments = {"verbosity": 0, "min_gradient_norm": 1e-5, "max_iterations": 3000}
    theirs = solver(**arguments).run(problem, initial_point=x0)
    assert counts.evaluations == cost.calls > 0
    result = sm.minimize(M, cost, torch.as_tensor(x0), ours, gradient_tolerance=1e-8)
    assert result.success
    assert theirs.cost == pytest.approx(result.fun, rel=1e-9)
    driven = sm.minimize(
        M, cost, torch.as_tensor(x0), f"pymanopt:{ours}", gradient_tolerance=1e-5,
        max_iterations=3000,
    )  # fmt: skip
    assert driven.success
    np.testing.assert_allclose(driven.x.numpy(), theirs.point, atol=1e-12)
    assert driven.nit == len(driven.history["step"]) - 1


def test_completion_by_pymanopt() -> None:
    M, cost, x0 = completion(8)
    problem = sm.pymanopt_problem(M, cost)
    result = TrustRegions(verbosity=0, min_gradient_norm=1e-7, max_iterations=200).run(
        problem, initial_point=x0.as_subclass(torch.Tensor).numpy()
    )
    assert result.cost < 1e-10


def test_steepest_descent_driven_from_here() -> None:
    A, weights, cost, x0 = brockett(5)
    result = sm.minimize(
        EuclideanStiefel(), cost, x0, "pymanopt:steepest_descent", gradient_tolerance=1e-4
    )
    top = torch.linalg.eigvalsh(A).flip(0)[:3]
    assert result.success
    assert result.fun == pytest.approx(-float((weights * top).sum()) / 2, rel=1e-6)
    problem = sm.pymanopt_problem(EuclideanStiefel(), cost, size=(12, 3))
    theirs = SteepestDescent(verbosity=0, min_gradient_norm=1e-4).run(
        problem, initial_point=x0.numpy()
    )
    assert theirs.cost == pytest.approx(result.fun, rel=1e-6)


@pytest.mark.parametrize("spectrum", sm.tt.SPECTRA)
def test_gradient_and_hessian_are_those_of_pymanopts_backend(spectrum) -> None:
    """Pymanopt differentiates the flat point by itself, and turns that by our manifold."""
    plan = sm.TTShape((2, 3), (3, 2), rank=2)
    ours = sm.SpectralTTManifold(plan, spectrum)
    target = normal(6, plan.d_out, plan.d_in)

    def cost(tt):
        return (tt.to_matrix() - target).square().sum() / 2

    problem = sm.pymanopt_problem(ours, cost)
    M = problem.manifold

    @pymanopt.function.pytorch(M)
    def flat(x):
        return cost(ours.unpack(x))

    theirs = pymanopt.Problem(M, flat)
    x = M.random_point()
    u = M.random_tangent_vector(x)
    assert problem.cost(x) == pytest.approx(float(theirs.cost(x)))
    gradient, hessian = problem.riemannian_gradient(x), problem.riemannian_hessian(x, u)
    np.testing.assert_allclose(gradient, theirs.riemannian_gradient(x), atol=1e-10)
    np.testing.assert_allclose(hessian, theirs.riemannian_hessian(x, u), atol=1e-10)


def test_a_point_is_evaluated_once() -> None:
    M, cost, x0 = completion(1, shape=sm.TTShape.svd(6, 5, rank=2))
    counted = Counted(cost)
    problem = sm.pymanopt_problem(M, counted)
    x = x0.as_subclass(torch.Tensor).numpy()
    problem.cost(x)
    problem.riemannian_gradient(x)
    problem.riemannian_gradient(x.copy())
    assert counted.calls == 1
    u = problem.manifold.random_tangent_vector(x)
    problem.riemannian_hessian(x, u)
    problem.riemannian_hessian(x, 2 * u)
    assert counted.calls == 2
    x[:] = problem.manifold.retraction(x, u)
    problem.cost(x)
    assert counted.calls == 3


def test_single_precision_stays_single() -> None:
    M = sm.to_pymanopt(sm.SpectralTTManifold(sm.TTShape.svd(6, 5, rank=2)), dtype=torch.float32)
    x = M.random_point()
    assert x.dtype == M.retraction(x, np.float64(0.1) * M.random_tangent_vector(x)).dtype
    assert x.dtype == np.float32


def test_the_preconditioner_is_used() -> None:
    curvatures = torch.logspace(-2, 2, 10, dtype=torch.float64)
    arguments = {"verbosity": 0, "min_gradient_norm": 1e-8, "max_iterations": 1000}
    iterations = []
    for preconditioner in (None, lambda x, u: u / curvatures):
        problem = sm.pymanopt_problem(
            Euclidean(ndim=1), lambda x: (curvatures * x * x).sum() / 2, size=(10,),
            preconditioner=preconditioner,
        )  # fmt: skip
        result = ConjugateGradient(**arguments).run(problem, initial_point=np.ones(10))
        iterations.append(result.iterations)
    assert iterations[1] < iterations[0] / 2


def test_errors_say_what_to_call(monkeypatch) -> None:
    with pytest.raises(ManifoldError, match=r"size=\(5, 3\)"):
        sm.to_pymanopt(EuclideanStiefel())
    canonical = sm.to_pymanopt(geoopt.CanonicalStiefel(), size=(4, 2))
    x = canonical.random_point()
    with pytest.raises(NotImplementedError, match="pymanopt_problem"):
        canonical.euclidean_to_riemannian_hessian(x, x, x, x)
    _adapter.cache_clear()
    monkeypatch.setitem(sys.modules, "pymanopt", None)
    with pytest.raises(ImportError, match=r"pip install 'sttp-manifold\[pymanopt\]'"):
        sm.to_pymanopt(sm.SpectralTTManifold(sm.TTShape.svd(6, 5, rank=2)))
    _adapter.cache_clear()


@pytest.mark.parametrize("size", [(3,), (5, 7), (), (0, 24), 24, ("a",), None])
def test_sizes_that_no_point_has_are_refused(size) -> None:
    M = sm.SpectralTTManifold(sm.TTShape.svd(6, 5, rank=2))
    if size is None:
        with pytest.raises(ManifoldError, match="does not know the shape"):
            sm.to_pymanopt(geoopt.Sphere())
        return
    with pytest.raises(ManifoldError, match="is the shape of no point of SpectralTTManifold"):
        sm.to_pymanopt(M, size=size)


def test_manifolds_without_random_points_say_so() -> None:
    scaled = geoopt.Scaled(geoopt.Lorentz(), 2.0)
    for M, size, dim in (
        (geoopt.Lorentz(), (3, 4), 9),
        (scaled, (4,), 3),
        (geoopt.ProductManifold((scaled, 4), (geoopt.Sphere(), 3)), (2, 7), 10),
    ):
        theirs = sm.to_pymanopt(M, size=size)
        assert theirs.dim == dim
        with pytest.raises(ManifoldError, match="draws no random points"):
            theirs.random_point()
