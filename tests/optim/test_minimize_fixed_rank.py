"""`minimize` and pymanopt's solvers on the manifold of fixed TT rank."""

from __future__ import annotations

import warnings
from itertools import pairwise

import numpy as np
import pymanopt
import pytest
import torch
from pymanopt.manifolds import FixedRankEmbedded
from strategies import normal, weight

import sttp_manifold as sm
from sttp_manifold.optim.minimize import METHODS

SHAPE = sm.TTShape((3, 4, 2), (2, 5, 3), ranks=(1, 3, 4, 4, 4, 3, 1))


def completion(seed: int, observed: int = 400, dtype: torch.dtype = torch.float64):
    """A weight of the manifold, half seen; a start; the cost of what is seen."""
    F = sm.FixedTTRankManifold(SHAPE)
    generator = torch.Generator().manual_seed(seed)
    truth, x0 = (F.random(dtype=torch.float64, generator=generator) for _ in range(2))
    places = torch.randperm(SHAPE.numel, generator=generator)[:observed]
    i, j = places // SHAPE.d_in, places % SHAPE.d_in
    truth = F.unpack(truth.as_subclass(torch.Tensor))
    values = truth.entries(i, j).to(dtype)

    def cost(tt: sm.SpectralTT) -> torch.Tensor:
        return (tt.entries(i, j) - values).square().sum() / 2

    return truth, x0.as_subclass(torch.Tensor).to(dtype), cost


@pytest.mark.parametrize("method", [m for m in METHODS if "steepest" not in m])
def test_every_method_recovers_the_weight(method) -> None:
    truth, x0, cost = completion(0)
    F = sm.FixedTTRankManifold(SHAPE)
    result = sm.minimize(F, cost, x0, method, gradient_tolerance=1e-10, max_iterations=200)
    assert result.success, result.message
    assert F.check_point_on_manifold(result.x, atol=1e-10, rtol=1e-10)
    assert float(F.unpack(result.x).distance(truth) / truth.norm()) < 1e-9
    costs = result.history["cost"]
    assert all(b <= a + 1e-12 for a, b in pairwise(costs)) or "pym" in method


@pytest.mark.parametrize("retraction", ["svd", "qr"])
def test_both_retractions_serve(retraction) -> None:
    truth, x0, cost = completion(0)
    F = sm.FixedTTRankManifold(SHAPE, retraction=retraction)
    for method in ("conjugate_gradient", "trust_regions"):
        result = sm.minimize(F, cost, x0, method, gradient_tolerance=1e-9, max_iterations=200)
        assert result.success, result.message
        assert float(F.unpack(result.x).distance(truth) / truth.norm()) < 1e-8


def test_trust_regions_start_at_the_scale_of_the_weight() -> None:
    """The first step is no longer than an eighth of it; from there 400 entries are enough.

    With a radius from the number of coordinates, the first of these starts runs off to weights
    thirty times as large.
    """
    for seed in range(3):
        truth, x0, cost = completion(seed)
        F = sm.FixedTTRankManifold(SHAPE)
        result = sm.minimize(F, cost, x0, gradient_tolerance=1e-9, max_iterations=60)
        assert result.success, (seed, result.message)
        assert result.history["step"][1] <= float(F.typical_dist(x0)) / 8 * (1 + 1e-9)
        assert float(F.unpack(result.x).distance(truth) / truth.norm()) < 1e-8


def test_fewer_iterations_than_on_the_product() -> None:
    """What the gauge and the metric cost: half of the iterations at the least, on each seed."""
    F, M = sm.FixedTTRankManifold(SHAPE), sm.SpectralTTManifold(SHAPE, "full")
    for seed in range(3):
        _, x0, cost = completion(seed)
        counts = [
            sm.minimize(
                manifold,
                cost,
                x0,
                "conjugate_gradient",
                gradient_tolerance=0.0,
                cost_tolerance=1e-16,
                max_iterations=400,
            ).nit
            for manifold in (F, M)
        ]
        assert 2 * counts[0] <= counts[1], seed


def test_trust_regions_end_quadratically() -> None:
    _, x0, cost = completion(1)
    result = sm.minimize(
        sm.FixedTTRankManifold(SHAPE),
        cost,
        x0,
        gradient_tolerance=1e-11,
        options={"theta": 1.0},
    )
    norms = [g for g in result.history["grad_norm"] if g > 1e-11]  # above rounding
    last = np.log(norms[-3:])
    assert result.success
    assert (last[2] - last[1]) / (last[1] - last[0]) > 1.5


def test_counts_are_true() -> None:
    _, x0, cost = completion(2)
    calls = []

    def counted(tt):
        calls.append(1)
        return cost(tt)

    F = sm.FixedTTRankManifold(SHAPE)
    for method in METHODS:
        calls.clear()
        result = sm.minimize(F, counted, x0, method, max_iterations=5)
        assert result.nfev == len(calls), method


@pytest.mark.parametrize("kind", ["identity", (3.0, 2.0, 2.0, 1.0)])
@pytest.mark.parametrize("method", ["conjugate_gradient", "trust_regions", "lbfgs"])
def test_submanifolds_of_unit_and_given_singular_values(kind, method) -> None:
    """The nearest such weight to one nearby: itself."""
    F = sm.FixedTTRankManifold(SHAPE, kind)
    goal = F.pack(weight(SHAPE, "full", 0), project=True)
    W = F.to_matrix(goal)
    start = F.retr(goal, F.project_matrix(goal, 0.1 * normal(1, 24, 30)))

    def cost(tt: sm.SpectralTT) -> torch.Tensor:
        return (tt.to_matrix() - W).square().sum() / 2

    result = sm.minimize(F, cost, start, method, gradient_tolerance=1e-9)
    assert result.success, result.message
    assert float(F.weight_dist(result.x, goal)) < 1e-8
    s = F.unpack(result.x).singular_values()
    torch.testing.assert_close(s, F.unpack(goal).singular_values())


def test_single_precision() -> None:
    truth, x0, cost = completion(0, dtype=torch.float32)
    F = sm.FixedTTRankManifold(SHAPE)
    for method in ("conjugate_gradient", "trust_regions", "lbfgs"):
        result = sm.minimize(F, cost, x0, method, gradient_tolerance=1e-4, max_iterations=200)
        assert result.x.dtype == torch.float32
        assert result.success, (method, result.message)
        found = F.unpack(result.x.double())
        assert float(found.distance(truth) / truth.norm()) < 1e-2


def test_one_mode_a_side_ends_where_pymanopts_own_manifold_does() -> None:
    """Matrix completion by pymanopt's FixedRankEmbedded and its ConjugateGradient."""
    m, n, r = 20, 18, 2
    F = sm.FixedTTRankManifold(sm.TTShape.svd(m, n, r))
    generator = torch.Generator().manual_seed(0)
    truth, x0 = (
        F.random(dtype=torch.float64, generator=generator).as_subclass(torch.Tensor)
        for _ in range(2)
    )
    noise = 0.1 * normal(3, m, n)
    target = F.to_matrix(truth) + noise
    mask = torch.rand(m, n, generator=generator) < 0.7

    def cost(tt: sm.SpectralTT) -> torch.Tensor:
        return (mask * (tt.to_matrix() - target)).square().sum() / 2

    ours = sm.minimize(F, cost, x0, "conjugate_gradient", gradient_tolerance=1e-8)
    manifold = FixedRankEmbedded(m, n, r)
    A, seen = target.numpy(), mask.numpy()

    @pymanopt.function.numpy(manifold)
    def theirs(u, s, vt):
        return float(np.square(seen * (u @ np.diag(s) @ vt - A)).sum() / 2)

    @pymanopt.function.numpy(manifold)
    def slope(u, s, vt):
        return manifold.projection((u, s, vt), seen * (u @ np.diag(s) @ vt - A))

    problem = pymanopt.Problem(manifold, theirs, riemannian_gradient=slope)
    tt = F.unpack(x0)
    a, s, bt = np.linalg.svd(tt.spectrum.numpy())
    U, V = (frame.numpy() for frame in tt.frames())
    solver = pymanopt.optimizers.ConjugateGradient(verbosity=0, min_gradient_norm=1e-8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = solver.run(problem, initial_point=(U @ a, s, bt @ V.T))
    assert ours.success, ours.message
    assert ours.fun == pytest.approx(found.cost, rel=1e-9)


def test_conjugate_gradients_restart_instead_of_crawling() -> None:
    """A 300 x 300 matrix of rank 5 from three times its dimension: without restarts over 800."""
    shape = sm.TTShape.svd(300, 300, 5)
    F = sm.FixedTTRankManifold(shape)
    generator = torch.Generator().manual_seed(1)
    truth = F.unpack(F.random(dtype=torch.float64, generator=generator).as_subclass(torch.Tensor))
    places = torch.randperm(shape.numel, generator=generator)[: 3 * F.dim]
    i, j = places // 300, places % 300
    values = truth.entries(i, j)
    x0 = F.random(dtype=torch.float64, generator=generator).as_subclass(torch.Tensor)
    result = sm.minimize(
        F,
        lambda tt: (tt.entries(i, j) - values).square().sum() / values.square().sum(),
        x0,
        "conjugate_gradient",
        gradient_tolerance=0.0,
        cost_tolerance=1e-20,
        max_iterations=250,
    )
    assert result.success, result.message
    assert float(F.unpack(result.x).distance(truth) / truth.norm()) < 1e-9
