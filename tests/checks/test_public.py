"""The checks: they pass what is right, and find what is wrong, by name."""

from __future__ import annotations

import dataclasses
import math
import re
import xml.etree.ElementTree as ET

import matplotlib.pyplot as plt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import normal, seeds, shapes, spectra
from torch import Tensor

import sttp_manifold as sm
from sttp_manifold._geoopt import Euclidean, EuclideanStiefel, ProductManifold, geoopt
from sttp_manifold.checks.slopes import fit_slope
from sttp_manifold.errors import CheckError, ManifoldError, SttpError
from sttp_manifold.manifolds.cost import ManifoldCost
from sttp_manifold.tt import SPECTRA

# geoopt's SymmetricPositiveDefinite compiles its matrix functions when they are called.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is")

DTYPES = [torch.float64, torch.float32]
A = normal(3, 6, 6)
A = A @ A.mT
SPD = geoopt.SymmetricPositiveDefinite
RETRACTION = "|R(tu) - x - tu|"
SECOND = "|P(R(tu) - x - tu)|"
GRADIENT = "|f(R(tu)) - f(x) - t<grad, u>|"
HESSIAN = "|f(c(t)) - f(x) - t<grad, u> - t^2/2 <Hess[u], u>|"
FIELD = "|P(grad f(R(tu)) - grad f(x)) - t Hess[u]|"
PLAN = sm.TTShape((3, 2), (2, 4), rank=3)
GIVEN = [2.0, 2.0, 1.0][: PLAN.rank]


class PolarStiefel(EuclideanStiefel):
    """Polar retraction: of second order."""

    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        return self.projx(x + u)


def quadratic(x: Tensor) -> Tensor:
    return (x * (A[: len(x), : len(x)].to(x) @ x)).sum()


def bent(x: Tensor) -> Tensor:
    return quadratic(x) + (3 * x).sin().sum()


def failures(result: sm.CheckResult) -> list[str]:
    return [part.name for part in result.failures]


def fixed_rank(m: int, n: int, r: int, retraction: str | None = None) -> sm.FixedTTRankManifold:
    return sm.FixedTTRankManifold(sm.TTShape.svd(m, n, r), retraction=retraction)


# -- what is right passes -----------------------------------------------------------------------

SOUND = [
    (Euclidean(ndim=0), (4,)),
    (Euclidean(ndim=1), (5,)),
    (Euclidean(ndim=2), (3, 4)),
    (geoopt.Sphere(), (5,)),
    (geoopt.SphereExact(), (5,)),
    (EuclideanStiefel(), (6, 3)),
    (EuclideanStiefel(), (3, 3)),
    (PolarStiefel(), (6, 3)),
    (SPD(), (4, 4)),
    (ProductManifold((EuclideanStiefel(), (4, 2)), (geoopt.Sphere(), 3)), None),
    (sm.FixedTTRankManifold(PLAN, retraction="qr"), None),
    *((sm.FixedTTRankManifold(PLAN, kind), None) for kind in ("full", "identity", GIVEN)),
    *((sm.SpectralTTManifold(PLAN, spectrum), None) for spectrum in SPECTRA),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "size"), SOUND, ids=lambda case: str(case)[:60])
def test_sound_manifolds_pass(M, size, dtype) -> None:
    for seed in range(2):
        of = {"size": size, "dtype": dtype, "seed": seed}
        sm.check_manifold(M, **of).raise_if_failed()
        sm.check_retraction(M, **of).raise_if_failed()
        sm.check_vector_transport(M, **of).raise_if_failed()


@given(shape=shapes(), spectrum=spectra, seed=seeds)
@settings(max_examples=8)
def test_the_product_manifold_passes_for_every_plan(shape, spectrum, seed) -> None:
    M = sm.SpectralTTManifold(shape, spectrum)
    W = normal(seed % 1000, shape.d_out, shape.d_in)
    sm.check_manifold(M, seed=seed).raise_if_failed()
    sm.check_vector_transport(M, seed=seed, order=2).raise_if_failed()

    def cost(tt: sm.SpectralTT) -> Tensor:
        return (tt.to_matrix() - W).square().sum()

    sm.check_gradient(M, cost, seed=seed).raise_if_failed()


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_rank_of_the_projection_is_the_total_dimension(spectrum) -> None:
    law = sm.check_manifold(sm.SpectralTTManifold(PLAN, spectrum))["rank of proju is the dimension"]
    total = PLAN.merged.total_dim(spectrum)
    assert law.passed
    assert law.detail == f"{total} of {total}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_points_with_batch_dimensions(dtype) -> None:
    sphere = geoopt.Sphere()
    M = sm.SpectralTTManifold(PLAN)
    for manifold, x in (
        (sphere, sphere.random(2, 3, 4, dtype=dtype)),
        (EuclideanStiefel(), EuclideanStiefel().random(3, 5, 2, dtype=dtype)),
        (M, M.random(2, M.n_elements, dtype=dtype)),
    ):
        assert sm.check_manifold(manifold, x)
        assert sm.check_retraction(manifold, x)
        assert sm.check_vector_transport(manifold, x, order=2)
    x = sphere.random(2, 3, 4, dtype=dtype)
    assert sm.check_gradient(sphere, lambda y: (y**3).sum(), x)
    assert sm.check_hessian(sphere, lambda y: (y**3).sum(), x)


# -- geoopt's own defects, as of the pinned version ---------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_defects_of_the_canonical_stiefel_manifold(dtype) -> None:
    for seed in range(3):
        of = {"size": (6, 3), "dtype": dtype, "seed": seed}
        result = sm.check_manifold(geoopt.Stiefel(), **of)
        assert failures(result) == ["proju is idempotent", RETRACTION]
        assert result.slope == pytest.approx(1, abs=0.05)
        assert not sm.check_retraction(geoopt.Stiefel(), **of)
        # Its exponential map is the same wrong curve: only the first order gives it away.
        assert failures(sm.check_retraction(geoopt.Stiefel(), order=2, **of)) == [RETRACTION]
        assert sm.check_manifold(EuclideanStiefel(), **of)


def test_other_defects_that_the_checks_found() -> None:
    ball = geoopt.PoincareBall(c=torch.tensor(1.0, dtype=torch.float64))
    assert failures(sm.check_manifold(ball, size=(4,))) == ["inner takes batches"]
    exact = sm.check_manifold(geoopt.EuclideanStiefelExact(), size=(4, 2))
    assert failures(exact) == ["retr takes batches", "transport takes batches"]
    hyperboloid = geoopt.Lorentz(k=torch.tensor(1.0, dtype=torch.float64))
    x = hyperboloid.projx(normal(0, 5))
    names = failures(sm.check_manifold(hyperboloid, x))
    assert "norm is the root of inner" in names  # norm(u), without the point
    assert "arguments are left as they are" in names  # egrad2rgrad writes into the gradient


# -- planted bugs -------------------------------------------------------------------------------


class Stays(geoopt.Sphere):
    def retr(self, x, u):
        return x.expand_as(x + u)


class HalfStep(geoopt.Sphere):
    def retr(self, x, u):
        return self.projx(x + u / 2)


class NearlyRight(geoopt.Sphere):
    def retr(self, x, u):
        return self.projx(x + (1 + 1e-4) * u)


class LeavesTheSphere(geoopt.Sphere):
    def retr(self, x, u):
        return x + u


class StartsElsewhere(geoopt.Sphere):
    def retr(self, x, u):
        return self.projx(x + u + 1e-3 * x.roll(1, -1))


class ScaledGradient(geoopt.Sphere):
    def egrad2rgrad(self, x, u):
        return 1.01 * self.proju(x, u)


class ForgetsToProjectTheGradient(geoopt.Sphere):
    def egrad2rgrad(self, x, u):
        return u.expand_as(x + u)


class LazyTransport(geoopt.Sphere):
    def transp(self, x, y, v):
        return v.expand_as(y + v)


class BentTransport(geoopt.Sphere):
    def transp(self, x, y, v):
        v = self.proju(y, v)
        return v * (1 + 0.1 * v.norm(dim=-1, keepdim=True))


class ShrinkingTransport(geoopt.Sphere):
    def transp(self, x, y, v):
        return 0.9 * self.proju(y, v)


class TwoTransports(geoopt.Sphere):
    def retr_transp(self, x, u, v):
        y = self.retr(x, u)
        return y, -self.transp(x, y, v)


class LopsidedMetric(geoopt.Sphere):
    def inner(self, x, u, v=None, *, keepdim=False):
        v = u if v is None else v
        return super().inner(x, u, v + 0.1 * v.roll(1, -1), keepdim=keepdim)


class IndefiniteMetric(geoopt.Sphere):
    def inner(self, x, u, v=None, *, keepdim=False):
        signs = torch.ones_like(u)
        signs[..., :2] = -1
        return super().inner(x, signs * u, v if v is not None else u, keepdim=keepdim)


class ObliqueProjection(geoopt.Sphere):
    def proju(self, x, u):
        z = x + 0.5 * x.roll(1, -1)
        return u - (x * u).sum(-1, keepdim=True) / (x * z).sum(-1, keepdim=True) * z


class ProjectsFirstPointOnly(geoopt.Sphere):
    def proju(self, x, u):
        return u - (x * u).sum().reshape([1] * x.ndim) * x if x.ndim > 1 else super().proju(x, u)


class WrongDimension(geoopt.Sphere):
    dim = 5


class Overwrites(geoopt.Sphere):
    def proju(self, x, u):
        return u.sub_((x * u).sum(-1, keepdim=True) * x) if u.ndim == 1 else super().proju(x, u)


PLANTED = [
    (Stays, [RETRACTION]),
    (HalfStep, [RETRACTION]),
    (NearlyRight, [RETRACTION]),
    (LeavesTheSphere, ["retr lands on the manifold"]),
    (StartsElsewhere, [RETRACTION]),
    (ScaledGradient, ["egrad2rgrad is the gradient"]),
    (ForgetsToProjectTheGradient, ["egrad2rgrad is tangent"]),
    (LazyTransport, ["transport lands in the tangent space"]),
    (BentTransport, ["transport is linear"]),
    (ShrinkingTransport, ["transport is the identity at u = 0"]),
    (TwoTransports, ["retr_transp is retr and transport"]),
    (LopsidedMetric, ["inner is symmetric"]),
    (IndefiniteMetric, ["inner is positive"]),
    (ObliqueProjection, ["proju is self-adjoint"]),
    (ProjectsFirstPointOnly, ["proju takes batches"]),
    (WrongDimension, ["rank of proju is the dimension"]),
    (Overwrites, ["arguments are left as they are"]),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("planted", "names"), PLANTED)
def test_planted_bugs_are_named(planted, names, dtype) -> None:
    if planted is NearlyRight and dtype == torch.float32:
        pytest.skip("an error of 1e-4 is below what single precision shows")
    for seed in range(3):
        result = sm.check_manifold(planted(), size=(5,), dtype=dtype, seed=seed)
        assert set(names) <= set(failures(result)), str(result)


def test_planted_bugs_of_order_zero_have_slope_one() -> None:
    for planted in (Stays, HalfStep, NearlyRight):
        result = sm.check_retraction(planted(), size=(5,))
        assert result.slope == pytest.approx(1, abs=0.05)
        assert failures(result) == [RETRACTION]
    elsewhere = sm.check_retraction(StartsElsewhere(), size=(5,))
    assert failures(elsewhere) == ["retr(x, 0) is x", RETRACTION]


def test_only_what_is_planted_is_found() -> None:
    for planted, names in PLANTED:
        if planted in (LazyTransport, ScaledGradient, WrongDimension):
            assert failures(sm.check_manifold(planted(), size=(5,))) == names


# -- order of a retraction ----------------------------------------------------------------------


def test_a_product_of_ones_own_that_unpacks_needs_no_size() -> None:
    """A product of geoopt draws points of its flat size only, whatever its subclass adds."""

    class Pair(ProductManifold):
        def unpack(self, x: Tensor) -> tuple[Tensor, ...]:
            return self.unpack_tensor(x)

    assert sm.check_manifold(Pair((EuclideanStiefel(), (5, 2)), (Euclidean(ndim=1), 3)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("M", "size", "slope"),
    [
        (geoopt.Sphere(), (5,), 3),
        (PolarStiefel(), (6, 3), 3),
        (geoopt.EuclideanStiefelExact(), (6, 3), 3),
        (EuclideanStiefel(), (6, 3), 2),
        (sm.SpectralTTManifold(PLAN), None, 2),
        (fixed_rank(6, 5, 2), None, 3),
        (fixed_rank(6, 5, 2, "qr"), None, 2),
        (SPD(), (4, 4), 3),
        (geoopt.PoincareBall(c=torch.tensor(1.0, dtype=torch.float64)), (4,), 2),
    ],
    ids=lambda case: str(case)[:60],
)
def test_second_order_is_told_from_first(M, size, slope, dtype) -> None:
    if isinstance(M, geoopt.PoincareBall) and dtype == torch.float32:
        M = geoopt.PoincareBall()
    for seed in range(3):
        result = sm.check_retraction(M, order=2, size=size, dtype=dtype, seed=seed)
        assert result.slopes[0].passed
        assert result.passed == (slope == 3)
        assert result.slope == pytest.approx(slope, abs=0.05 if dtype == torch.float64 else 0.4)
        euclidean = not isinstance(M, SPD | geoopt.PoincareBall)
        assert (result.slopes[1].name == SECOND) == euclidean
        assert result.expected_slope == 3


def test_a_straight_line_is_exact_and_passes() -> None:
    result = sm.check_retraction(Euclidean(ndim=1), size=(5,), order=2)
    assert result.passed
    assert all(slope.exact and slope.verdict == "exact" for slope in result.slopes)
    assert math.isnan(result.slope)


# -- gradients ----------------------------------------------------------------------------------

W = normal(5, 6, 8)
SAMPLED = (torch.tensor([0, 2, 5, 5]), torch.tensor([1, 7, 0, 3]))


def completion(tt: sm.SpectralTT) -> Tensor:
    return (tt.entries(*SAMPLED) - W[SAMPLED].to(tt.dtype)).square().sum() + tt.norm() ** 4


def dense_cost(tt: sm.SpectralTT) -> Tensor:
    D = tt.to_matrix()
    return (D.sin() * W[: D.shape[-2], : D.shape[-1]].to(D)).sum()


COSTS = [
    (geoopt.Sphere(), (6,), quadratic),
    (geoopt.Sphere(), (6,), bent),
    (EuclideanStiefel(), (6, 2), bent),
    (PolarStiefel(), (6, 2), bent),
    (Euclidean(ndim=1), (6,), bent),
    (fixed_rank(6, 8, 2), None, dense_cost),
    *((sm.SpectralTTManifold(PLAN, spectrum), None, completion) for spectrum in SPECTRA),
]
# Names without an address: processes that share the tests have to find the same ones.
COST_NAMES = [f"{M} {cost.__name__}"[:60] for M, _, cost in COSTS]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "size", "cost"), COSTS, ids=COST_NAMES)
def test_gradients_of_autograd_pass(M, size, cost, dtype) -> None:
    for seed in range(3):
        of = {"size": size, "dtype": dtype, "seed": seed}
        result = sm.check_gradient(M, cost, **of).raise_if_failed()
        if dtype == torch.float64:
            assert result.slope == pytest.approx(2, abs=0.1)

        def wrong(x: Tensor) -> Tensor:
            return (1.1 if dtype == torch.float64 else 1.5) * ManifoldCost(M, cost).gradient(x)[1]

        assert not sm.check_gradient(M, cost, gradient=wrong, **of)


def test_a_gradient_that_is_wrong_by_a_little() -> None:
    """Where the straightest piece of the curve has slope 2 all the same."""
    field = ManifoldCost(geoopt.Sphere(), bent)
    for excess in (1e-2, 1e-3, 1e-4):

        def wrong(x: Tensor, by: float = excess) -> Tensor:
            return (1 + by) * field.gradient(x)[1]

        result = sm.check_gradient(geoopt.Sphere(), bent, size=(6,), gradient=wrong)
        assert failures(result) == ["<grad, v> is Df(x)[v]", GRADIENT]
        assert result.slope == pytest.approx(1, abs=0.1)


def test_gradients_with_a_metric_of_their_own() -> None:
    for M, size, cost in (
        (SPD(), (4, 4), lambda x: x.logdet() + x.sin().sum()),
        (geoopt.PoincareBall(c=torch.tensor(1.0, dtype=torch.float64)), (6,), bent),
    ):
        for seed in range(3):
            assert sm.check_gradient(M, cost, size=size, seed=seed)
        without = sm.check_gradient(
            M, cost, size=size, gradient=lambda x, f=cost: torch.func.grad(f)(x)
        )
        assert not without[GRADIENT].passed
    bug = sm.check_gradient(ScaledGradient(), bent, size=(6,))
    assert failures(bug) == ["<grad, v> is Df(x)[v]", GRADIENT]
    bug = sm.check_gradient(ForgetsToProjectTheGradient(), bent, size=(6,))
    assert failures(bug) == ["grad is tangent"]


def test_costs_that_leave_nothing_to_measure() -> None:
    """Constant, linear on a flat space, zero at the point, critical at the point, far from zero."""
    sphere, flat = geoopt.Sphere(), Euclidean(ndim=1)
    for dtype in DTYPES:
        of = {"dtype": dtype, "size": (6,)}
        for M, cost in (
            (sphere, lambda x: x.new_ones(())),
            (sphere, lambda x: x @ x),
            (flat, lambda x: x.sum()),
        ):
            assert sm.check_gradient(M, cost, **of).slopes[0].exact
            result = sm.check_hessian(M, cost, **of)
            assert result.passed
            assert all(slope.exact for slope in result.slopes)
        assert sm.check_gradient(flat, lambda x: 1e4 + 1e6 * (3 * x).sin().sum(), **of)
    values, vectors = torch.linalg.eigh(A)
    x = vectors[:, 0].contiguous()
    for shift in (0.0, float(values[0])):

        def cost(y: Tensor, c: float = shift) -> Tensor:
            return quadratic(y) - c

        assert sm.check_gradient(sphere, cost, x)
        result = sm.check_hessian(sphere, cost, x)
        assert result.passed
        assert result.notes == ("c is retr: the point is critical",)
    y = EuclideanStiefel().random(5, 2, dtype=torch.float64)
    for power in (1, 2, 3):
        assert sm.check_gradient(EuclideanStiefel(), lambda z, p=power: ((z - y) ** p).sum(), y)
        assert sm.check_hessian(EuclideanStiefel(), lambda z, p=power: ((z - y) ** p).sum(), y)


# -- Hessians -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "size", "cost"), COSTS, ids=COST_NAMES)
def test_hessians_by_autograd_pass(M, size, cost, dtype) -> None:
    if isinstance(M, PolarStiefel):
        pytest.skip("its Hessian is known by its exact type only; see below")
    for seed in range(1 if size is None else 3):
        of = {"size": size, "dtype": dtype, "seed": seed}
        result = sm.check_hessian(M, cost, **of).raise_if_failed()
        assert [slope.name for slope in result.slopes] == [FIELD, HESSIAN]

        def wrong(x: Tensor, u: Tensor) -> Tensor:
            return (1.1 if dtype == torch.float64 else 1.5) * ManifoldCost(M, cost).hessian(x)(u)

        assert not sm.check_hessian(M, cost, hessian=wrong, **of)


def stiefel_hessian(x: Tensor, u: Tensor) -> Tensor:
    return ManifoldCost(EuclideanStiefel(), bent).hessian(x)(u)


def test_the_curve_suits_the_retraction() -> None:
    def notes(M, hessian=None, size=(6, 2), cost=bent) -> tuple[list[str], tuple[str, ...]]:
        result = sm.check_hessian(M, cost, size=size, hessian=hessian).raise_if_failed()
        return [slope.name for slope in result.slopes], result.notes

    both = [FIELD, HESSIAN]
    assert notes(EuclideanStiefel()) == (both, ("c is expmap",))
    second = ("c is retr, which is of second order here",)
    assert notes(PolarStiefel(), stiefel_hessian) == (both, second)

    class WithoutExp(EuclideanStiefel):
        def expmap(self, x, u):
            raise NotImplementedError

    names, why = notes(WithoutExp(), stiefel_hessian)
    assert names == [FIELD]
    assert "no expmap" in why[0]
    qr = fixed_rank(6, 8, 2, "qr")
    assert notes(qr, size=None, cost=dense_cost)[0] == [FIELD]
    svd = fixed_rank(6, 8, 2)
    assert notes(svd, size=None, cost=dense_cost) == (both, second)


def test_a_hessian_in_a_metric_of_its_own() -> None:
    """With the affine invariant metric, Hess of (log det x)^2 is u -> 2 tr(x^-1 u) x."""

    def cost(x: Tensor) -> Tensor:
        return x.logdet() ** 2

    def hessian(x: Tensor, u: Tensor) -> Tensor:
        return 2 * torch.linalg.solve(x, u).trace() * x

    result = sm.check_hessian(SPD(), cost, size=(4, 4), hessian=hessian)
    assert result.passed
    assert result.notes[-1] == "c is expmap"
    assert [slope.name for slope in result.slopes] == [HESSIAN]
    assert not sm.check_hessian(SPD(), cost, size=(4, 4), hessian=lambda x, u: 1.01 * hessian(x, u))
    with pytest.raises(ManifoldError, match="not known"):
        sm.check_hessian(SPD(), cost, size=(4, 4))

    class WithoutExp(SPD):
        def expmap(self, x, u):
            raise NotImplementedError

    with pytest.raises(ManifoldError, match="no Hessian can be checked"):
        sm.check_hessian(WithoutExp(), cost, size=(4, 4), hessian=hessian)
    with pytest.raises(ManifoldError, match="second order is not known"):
        sm.check_retraction(WithoutExp(), size=(4, 4), order=2)


def _projected_second_derivative(x: Tensor, u: Tensor) -> Tensor:
    """The usual mistake: the curvature of the manifold is forgotten."""
    return geoopt.Sphere().proju(x, torch.autograd.functional.hvp(bent, x, u)[1])


def _sphere_hessian(x: Tensor, u: Tensor) -> Tensor:
    return ManifoldCost(geoopt.Sphere(), bent).hessian(x)(u)


@pytest.mark.parametrize(
    ("wrong", "names"),
    [
        (_projected_second_derivative, [FIELD, HESSIAN]),
        (lambda x, u: 1.001 * _sphere_hessian(x, u), [FIELD]),
        (
            lambda x, u: _sphere_hessian(x, u) + 0.1 * geoopt.Sphere().proju(x, u.roll(1)),
            ["Hess is symmetric", FIELD, HESSIAN],
        ),
        (lambda x, u: _sphere_hessian(x, u) + u.norm() * u, ["Hess is linear", FIELD, HESSIAN]),
        # Along x it is orthogonal to u: no quadratic model sees it.
        (lambda x, u: _sphere_hessian(x, u) + u[0] * x, ["Hess[u] is tangent"]),
    ],
)
def test_wrong_hessians_are_named(wrong, names) -> None:
    for seed in range(3):
        result = sm.check_hessian(geoopt.Sphere(), bent, size=(6,), hessian=wrong, seed=seed)
        assert set(names) <= set(failures(result)), str(result)


def test_the_field_sees_what_the_quadratic_model_cannot() -> None:
    """An error across u, linear and symmetric in the plane of u and w: <Hess u, u> is right."""
    sphere = geoopt.Sphere()
    x = sphere.random(6, dtype=torch.float64)
    u = sphere.proju(x, normal(1, 6))
    u = u / u.norm()
    w = sphere.proju(x, normal(2, 6))
    w = w - (w @ u) * u

    def wrong(y: Tensor, v: Tensor) -> Tensor:
        return _sphere_hessian(y, v) + 0.01 * ((v @ u) * w + (v @ w) * u)

    assert failures(sm.check_hessian(sphere, bent, x, u, hessian=wrong)) == [FIELD]


# -- transport ----------------------------------------------------------------------------------


def test_transports() -> None:
    for M, size in (
        (geoopt.Sphere(), (5,)),
        (EuclideanStiefel(), (6, 3)),
        (sm.SpectralTTManifold(PLAN), None),
        (fixed_rank(6, 5, 2), None),
    ):
        result = sm.check_vector_transport(M, size=size, order=2)
        assert result.passed
        assert [round(slope.found) for slope in result.slopes] == [1, 2]
    lengths = ["transport keeps lengths"]
    assert sm.check_vector_transport(SPD(), size=(4, 4), isometric=True)
    lossy = sm.check_vector_transport(geoopt.Sphere(), size=(5,), isometric=True)
    assert failures(lossy) == lengths
    lazy = sm.check_vector_transport(LazyTransport(), size=(5,))
    assert failures(lazy) == ["transport lands in the tangent space"]
    shrinking = sm.check_vector_transport(ShrinkingTransport(), size=(5,))
    assert failures(shrinking) == ["transport is the identity at u = 0", "|T(tu) v - v|"]
    with pytest.raises(ManifoldError, match=r"order=1\) holds"):
        sm.check_vector_transport(SPD(), size=(4, 4), order=2)


def test_a_transport_that_turns_is_not_parallel() -> None:
    class Turns(geoopt.Sphere):
        """Right to zeroth order in the step; its derivative rotates the tangent space."""

        def transp(self, x, y, v):
            angle = (y - x).norm(dim=-1, keepdim=True)
            return self.proju(y, v + angle * v.roll(1, -1))

    assert sm.check_vector_transport(Turns(), size=(5,))
    assert failures(sm.check_vector_transport(Turns(), size=(5,), order=2)) == ["|P(T(tu) v - v)|"]


# -- the result ---------------------------------------------------------------------------------


def test_a_result_reads_prints_draws_and_raises() -> None:
    good = sm.check_retraction(PolarStiefel(), size=(5, 2), order=2)
    bad = sm.check_retraction(HalfStep(), size=(5,), order=2)
    assert bool(good) is good.passed is True
    assert bool(bad) is bad.passed is False
    assert good.raise_if_failed() is good
    text = str(bad)
    assert text.splitlines()[0] == "check_retraction of Sphere manifold, torch.float64: FAILED"
    assert f"FAIL  slope of {RETRACTION}" in text
    assert "1.00" in text
    assert ">= 2 - 0.15" in text
    html = ET.fromstring(bad._repr_html_())
    rows = [["".join(cell.itertext()) for cell in row] for row in html.iter("tr")]
    assert rows[0] == ["", "law", "found", "wanted"]
    assert ["FAIL", f"slope of {RETRACTION}", "1.00", ">= 2 - 0.15"] in rows
    bold = [row[0].text for row in html.iter("tr") if "font-weight:600" in row[0].get("style", "")]
    assert bold == ["FAIL"] * len(bad.failures)
    assert html.find("div/b").text == text.splitlines()[0]
    assert not re.search(r"#fff|white;|black|background:#", bad._repr_html_()), "colours of its own"
    with pytest.raises(CheckError, match="FAILED") as caught:
        bad.raise_if_failed()
    assert caught.value.result is bad
    assert isinstance(caught.value, SttpError | AssertionError)
    with pytest.raises(CheckError):
        sm.check_retraction(HalfStep(), size=(5,), raises=True)
    with pytest.raises(AssertionError):
        sm.check_manifold(Stays(), size=(5,), raises=True)
    assert bad[RETRACTION] is bad.slopes[0]
    with pytest.raises(KeyError, match="none of the laws"):
        bad["nonsense"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        bad.laws = ()
    assert (good.slope, good.expected_slope) == (good.slopes[-1].found, 3)
    assert good.tolerance == 0.15
    assert len(good.steps) == len(good.errors)
    exact = sm.check_retraction(Euclidean(ndim=1), size=(5,))
    _, given_axes = plt.subplots()
    assert good.plot(given_axes) is given_axes
    for result in (good, bad, exact):
        axes = result.plot()
        assert axes.get_xscale() == axes.get_yscale() == "log"
        assert axes.get_title().endswith("passed" if result else "FAILED")
        labels = [text.get_text() for text in axes.get_legend().get_texts()]
        assert any(result.slopes[0].name in label for label in labels)
        axes.figure.canvas.draw()
    plt.close("all")


def test_the_same_seed_gives_the_same_result_and_no_trace() -> None:
    state = torch.get_rng_state()
    first, again, other = (
        sm.check_manifold(EuclideanStiefel(), size=(5, 2), seed=seed) for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert str(first) == str(again)
    assert first.errors == again.errors
    assert first.errors != other.errors


def test_a_given_vector_is_taken_at_unit_length() -> None:
    x = EuclideanStiefel().random(5, 2, dtype=torch.float64)
    u = EuclideanStiefel().proju(x, normal(1, 5, 2))
    small = sm.check_retraction(EuclideanStiefel(), x, 1e-5 * u)
    large = sm.check_retraction(EuclideanStiefel(), x, 1e5 * u)
    assert small.passed
    assert small.slope == pytest.approx(large.slope, abs=1e-3)


def test_what_is_refused() -> None:
    sphere, stiefel = geoopt.Sphere(), EuclideanStiefel()
    x = sphere.random(5, dtype=torch.float64)
    u = sphere.proju(x, normal(0, 5))
    with pytest.raises(ManifoldError, match=r"size=\(5,\)"):
        sm.check_manifold(sphere)
    with pytest.raises(ManifoldError, match="not both"):
        sm.check_manifold(sphere, x, size=(5,))
    with pytest.raises(ManifoldError, match="draws no random points"):
        sm.check_manifold(geoopt.Lorentz(), size=(5,))
    with pytest.raises(ManifoldError, match="projx"):
        sm.check_manifold(sphere, 2 * x)
    with pytest.raises(ManifoldError, match="real numbers"):
        sm.check_manifold(sphere, x.to(torch.complex128))
    with pytest.raises(ManifoldError, match="off the manifold"):
        sm.check_manifold(sphere, x, dtype=torch.float32)
    with pytest.raises(ManifoldError, match="give x as well"):
        sm.check_retraction(sphere, u=u, size=(5,))
    with pytest.raises(ManifoldError, match="give x as well"):
        sm.check_vector_transport(sphere, v=u, size=(5,))
    with pytest.raises(ManifoldError, match="not tangent"):
        sm.check_retraction(sphere, x, x)
    for wrong in (torch.zeros_like(x), u.float(), u[:3]):
        with pytest.raises(ManifoldError, match="other than zero"):
            sm.check_gradient(sphere, quadratic, x, wrong)
    for order in (0, 3):
        with pytest.raises(ManifoldError, match="order"):
            sm.check_retraction(stiefel, size=(5, 2), order=order)
        with pytest.raises(ManifoldError, match="order"):
            sm.check_vector_transport(stiefel, size=(5, 2), order=order)
    with pytest.raises(ManifoldError, match="scalar"):
        sm.check_gradient(sphere, lambda y: y, x)


# -- the fit of a slope -------------------------------------------------------------------------

STEPS = [10 ** (-k / 8) for k in range(97)]


@given(
    power=st.integers(1, 4),
    scale=st.floats(-3, 3),
    next_term=st.floats(-3, 3),
    seed=seeds,
)
def test_the_power_of_a_noisy_power_law_is_found(power, scale, next_term, seed) -> None:
    noise = 1e-16 * normal(seed, len(STEPS)).abs()
    errors = [
        abs(10**scale * t**power + 10**next_term * t ** (power + 1)) + float(n)
        for t, n in zip(STEPS, noise, strict=True)
    ]
    slope, window, exact = fit_slope(STEPS, errors, [3e-15] * len(STEPS))
    assert not exact
    assert window is not None
    assert power - 0.1 <= slope <= power + 1.1
    if next_term <= scale:
        assert slope == pytest.approx(power, abs=0.25)


@given(power=st.integers(2, 3), small=st.floats(-4, -1), seed=seeds)
def test_a_small_error_of_lower_order_is_not_overlooked(power, small, seed) -> None:
    noise = 1e-16 * normal(seed, len(STEPS)).abs()
    errors = [
        t**power + 10**small * t ** (power - 1) + float(n)
        for t, n in zip(STEPS, noise, strict=True)
    ]
    slope, _, _ = fit_slope(STEPS, errors, [3e-15] * len(STEPS))
    assert slope == pytest.approx(power - 1, abs=0.25)


def test_slopes_of_noise_and_of_what_is_not_finite() -> None:
    slope, window, exact = fit_slope(STEPS, [1e-16] * len(STEPS), [3e-15] * len(STEPS))
    assert (math.isnan(slope), window, exact) == (True, None, True)
    slope, window, exact = fit_slope(STEPS, [math.nan] * len(STEPS), [3e-15] * len(STEPS))
    assert (math.isnan(slope), window, exact) == (True, None, False)
    constant, _, exact = fit_slope(STEPS, [1e-3] * len(STEPS), [3e-15] * len(STEPS))
    assert (round(constant, 6), exact) == (0, False)
    broken = sm.check_gradient(
        geoopt.Sphere(), quadratic, size=(5,), gradient=lambda x: torch.full_like(x, math.nan)
    )
    assert not broken
