"""The solvers: against eigh and scipy, and by laws that hold whatever the problem."""

from __future__ import annotations

import time
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import Counted, brockett, completion, rosenbrock
from strategies import normal, seeds, shapes, spectra, weight

import sttp_manifold as sm
from sttp_manifold._geoopt import Euclidean, EuclideanStiefel, geoopt
from sttp_manifold.errors import ManifoldError
from sttp_manifold.manifolds.cost import ManifoldCost
from sttp_manifold.optim._objective import Limits, Objective, Stopped
from sttp_manifold.optim._progress import Progress
from sttp_manifold.optim.minimize import METHODS

OURS = tuple(m for m in METHODS if not m.startswith("pymanopt"))
FAST = tuple(m for m in OURS if m != "steepest_descent")


# -- against what was not written here ---------------------------------------------------------


@pytest.mark.parametrize("method", OURS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_brockett_finds_the_eigenvectors_of_eigh(method, dtype) -> None:
    A, weights, cost, x0 = brockett(0, dtype=dtype)
    tolerance = 1e-9 if dtype == torch.float64 else 2e-5
    result = sm.minimize(
        EuclideanStiefel(), cost, x0, method, gradient_tolerance=tolerance, max_iterations=3000
    )
    assert result.success, result
    values, vectors = torch.linalg.eigh(A)
    values, vectors = values.flip(0)[:3], vectors.flip(1)[:, :3]
    overlap = (vectors.mT @ result.x.double()).abs()
    exact = 1e-8 if dtype == torch.float64 else 5e-4
    assert torch.allclose(overlap, torch.eye(3, dtype=torch.float64), atol=exact)
    assert result.fun == pytest.approx(-float((weights * values).sum()) / 2, rel=exact)
    assert result.x.dtype == dtype


@pytest.mark.parametrize("method", OURS)
def test_rayleigh_quotient_on_the_sphere(method) -> None:
    B = normal(3, 15, 15)
    A = B @ B.mT
    x0 = normal(4, 15)
    result = sm.minimize(
        geoopt.Sphere(), lambda x: x @ A @ x, x0 / x0.norm(), method, gradient_tolerance=1e-7,
        max_iterations=20_000,
    )  # fmt: skip
    assert result.success
    assert result.fun == pytest.approx(float(torch.linalg.eigvalsh(A)[0]), abs=1e-10)


@pytest.mark.parametrize(
    ("method", "theirs"),
    [("conjugate_gradient", "CG"), ("lbfgs", "L-BFGS-B"), ("trust_regions", "trust-ncg")],
)
def test_rosenbrock_as_scipy_in_comparable_evaluations(method, theirs) -> None:
    """One start says little, the path being chaotic: all starts together are compared."""
    derivatives = {"jac": scipy.optimize.rosen_der}
    if theirs == "trust-ncg":
        derivatives["hess"] = scipy.optimize.rosen_hess
    evaluations = []
    for seed, n in enumerate((2, 4, 4, 6, 8)):
        x0 = normal(seed, n)
        reference = scipy.optimize.minimize(
            scipy.optimize.rosen, x0.numpy(), method=theirs, tol=1e-9, **derivatives
        )
        result = sm.minimize(
            Euclidean(ndim=1), rosenbrock, x0, method, gradient_tolerance=1e-8,
            options={"curvature": 0.4} if theirs == "CG" else {},
        )  # fmt: skip
        assert result.success
        if abs(result.fun - reference.fun) < 1e-3:  # there is a second minimum from n = 4 on
            np.testing.assert_allclose(result.x.numpy(), reference.x, atol=1e-4)
            evaluations.append((result.nfev, reference.nfev))
    assert len(evaluations) >= 3
    ours, others = np.sum(evaluations, 0)
    assert ours <= 1.3 * others


@pytest.mark.parametrize("method", ["conjugate_gradient", "trust_regions", "lbfgs"])
def test_completion_is_exact(method) -> None:
    M, cost, x0 = completion(8)
    result = sm.minimize(M, cost, x0, method, gradient_tolerance=0, cost_tolerance=1e-10)
    assert result.success
    assert result.status == 1
    assert result.fun <= 1e-10
    # Every entry is right, not only those that were observed.
    all_entries = completion(8, observed=1.1)[1]
    assert all_entries(M.unpack(result.x)) < 1e-8


@pytest.mark.parametrize("spectrum", sm.tt.SPECTRA)
@pytest.mark.parametrize("method", FAST)
def test_completion_in_single_precision(spectrum, method) -> None:
    plan = sm.TTShape((3, 4), (2, 5), rank=2)
    M, cost, x0 = completion(2, spectrum, observed=0.9, dtype=torch.float32, shape=plan)
    result = sm.minimize(M, cost, x0, method, gradient_tolerance=1e-3, max_iterations=50)
    assert result.fun < 0.5 * result.history["cost"][0]
    assert result.x.dtype == result.jac.dtype == torch.float32
    assert M.check_point_on_manifold(result.x, atol=1e-4)
    if result.success:
        assert result.grad_norm <= 1e-3


# -- rates -------------------------------------------------------------------------------------


def test_trust_regions_end_quadratically_and_do_not_stall() -> None:
    A, _, cost, x0 = brockett(5, n=20, p=4)
    scale = float(torch.linalg.eigvalsh(A).abs().max())
    result = sm.minimize(
        EuclideanStiefel(), cost, x0, gradient_tolerance=1e-12 * scale, options={"theta": 1.0}
    )
    assert result.success, result
    norms = np.array(result.history["grad_norm"])
    last = norms[(norms < 1e-1) & (norms > 1e-12)]
    assert len(last) >= 2
    ratios = last[1:] / last[:-1] ** 2
    # The order, not only fast: the constant of the square stays bounded while norms collapse.
    assert ratios.max() < 100, norms
    assert norms[-1] < 1e-12 * scale


@pytest.mark.parametrize("memory", [3, 6, 12])
def test_lbfgs_solves_a_quadratic_in_memory_steps(memory) -> None:
    """With exact steps it is conjugate gradients: one step for each distinct curvature."""
    curvatures = torch.arange(1.0, memory + 1, dtype=torch.float64).repeat(4)
    x0 = normal(memory, 4 * memory)
    result = sm.minimize(
        Euclidean(ndim=1), lambda x: (curvatures * x * x).sum() / 2, x0, "lbfgs",
        gradient_tolerance=1e-9, options={"memory": memory, "curvature": 1e-6, "decrease": 1e-7},
    )  # fmt: skip
    assert result.success
    assert result.nit <= memory + 1


@pytest.mark.parametrize("rule", ["polak_ribiere_plus", "hestenes_stiefel"])
def test_conjugate_gradients_solve_a_quadratic_in_as_many_steps_as_curvatures(rule) -> None:
    curvatures = torch.tensor([1.0, 3.0, 10.0, 40.0], dtype=torch.float64).repeat(5)
    result = sm.minimize(
        Euclidean(ndim=1), lambda x: (curvatures * x * x).sum() / 2, normal(0, 20),
        "conjugate_gradient", gradient_tolerance=1e-8,
        options={"beta_rule": rule, "curvature": 1e-6, "decrease": 1e-7},
    )  # fmt: skip
    assert result.success
    assert result.nit <= 5


@pytest.mark.parametrize("method", ["conjugate_gradient", "lbfgs", "trust_regions"])
def test_noise_in_the_values_hides_no_minimum(method) -> None:
    """Values are right to rounding of a large constant only: slopes must decide in the end."""
    _, _, cost, x0 = brockett(6)

    def noisy(x):
        wobble = 1e6 * (1e3 * x.detach()).sin().sum()
        return (cost(x) + 1e6 + wobble) - wobble

    result = sm.minimize(EuclideanStiefel(), noisy, x0, method, gradient_tolerance=1e-10)
    assert result.success, result


def test_steps_stay_within_the_trust_region() -> None:
    x0 = torch.full((20,), -1.2, dtype=torch.float64)
    options = {"initial_radius": 0.1, "max_radius": 0.3}
    result = sm.minimize(Euclidean(ndim=1), rosenbrock, x0, options=options)
    assert result.success
    steps = np.array(result.history["step"])
    assert steps.max() <= 0.3 * (1 + 1e-9)
    # The recurrences for the length inside of the region are exact: steps end on its boundary.
    assert np.isclose(steps, 0.3, rtol=1e-9).sum() >= 5


class TurningPlane(Euclidean):
    """The plane in a frame ``(phi, a, b)`` that every retraction turns: a gauge, as on fixed rank.

    Whoever subtracts points, or vectors of two points without transport, is lost here.
    """

    def __init__(self) -> None:
        super().__init__(ndim=1)

    def turn(self, angle, v):
        c, s = angle.cos(), angle.sin()
        a, b = v[..., 1], v[..., 2]
        return torch.stack([torch.zeros_like(a), c * a - s * b, s * a + c * b], -1)

    def unpack(self, x):
        return self.turn(x[0], x)[1:]

    def egrad2rgrad(self, x, u):
        return u * u.new_tensor([0.0, 1.0, 1.0])

    proju = egrad2rgrad

    def retr(self, x, u):
        angle = x.new_tensor(0.7)
        moved = self.turn(-angle, x + self.proju(x, u))
        return torch.cat([(x[0] + angle).view(1), moved[1:]])

    def transp(self, x, y, v):
        return self.turn(x[0] - y[0], v)

    def hessian_operator(self, cost, x):
        leaf = x.clone().requires_grad_()
        with torch.enable_grad():
            value = cost(self.unpack(leaf))
            (gradient,) = torch.autograd.grad(value, leaf, create_graph=True)
            gradient = self.proju(x, gradient)

        def apply(u):
            (moved,) = torch.autograd.grad(gradient, leaf, u, retain_graph=True)
            return self.proju(x, moved)

        return apply


@pytest.mark.parametrize("method", METHODS)
def test_a_gauge_that_turns_with_every_step_changes_nothing(method) -> None:
    turning = TurningPlane()
    x0 = torch.tensor([0.0, -1.2, 1.0], dtype=torch.float64)
    options = {"return_all": True}
    if method == "trust_regions":  # whose defaults look at the number of coordinates
        options |= {"initial_radius": 0.3, "max_radius": 2.0, "max_inner": 2}
    limits = {"max_iterations": 12, "gradient_tolerance": 0, "options": options}
    result = sm.minimize(turning, rosenbrock, x0, method, **limits)
    plain = sm.minimize(Euclidean(ndim=1), rosenbrock, x0[1:], method, **limits)
    assert result.nit == plain.nit == 12
    assert result.nhev == plain.nhev
    path = torch.stack([turning.unpack(x) for x in result.allvecs])
    assert torch.allclose(path, torch.stack(plain.allvecs), atol=1e-6)


# -- laws --------------------------------------------------------------------------------------


@settings(max_examples=15)
@given(plan=shapes(max_numel=200), spectrum=spectra, seed=seeds, method=st.sampled_from(METHODS))
def test_laws_of_every_method(plan, spectrum, seed, method) -> None:
    M = sm.SpectralTTManifold(plan, spectrum)
    generator = torch.Generator().manual_seed(seed)
    target = normal(seed, plan.d_out, plan.d_in)
    cost = Counted(lambda tt: (tt.to_matrix() - target).square().sum() / 2)
    x0 = M.random(dtype=torch.float64, generator=generator)
    kept = x0.clone()
    result = sm.minimize(M, cost, x0, method, gradient_tolerance=1e-5, max_iterations=40)
    assert torch.equal(x0, kept)
    assert type(result.x) is torch.Tensor
    assert cost.calls == result.nfev
    assert M.check_point_on_manifold(result.x, atol=1e-9)
    costs = np.array(result.history["cost"])
    # Up to what rounding may do to a sum of squares of this size.
    assert (np.diff(costs) <= 1e-13 * costs[0]).all() or method.startswith("pymanopt")
    assert len(costs) == result.nit + 1
    assert result.history["nfev"] == sorted(result.history["nfev"])
    assert result.success == (result.grad_norm <= 1e-5)
    value, gradient = ManifoldCost(M, cost).gradient(result.x)
    assert result.fun == pytest.approx(float(value), rel=1e-12)
    assert torch.allclose(result.jac, gradient, atol=1e-12)
    assert result.grad_norm == pytest.approx(float(gradient.norm()), abs=1e-12)


@settings(max_examples=10)
@given(plan=shapes(max_numel=150), seed=seeds, method=st.sampled_from(FAST))
def test_a_start_at_the_minimum_stays_there(plan, seed, method) -> None:
    M = sm.SpectralTTManifold(plan, "free")
    tt = weight(plan, "free", seed)
    target = tt.to_matrix()
    result = sm.minimize(M, lambda w: (w.to_matrix() - target).square().sum(), M.pack(tt), method)
    assert result.success
    assert result.nit == 0
    assert result.nfev == 1


@pytest.mark.parametrize("method", METHODS)
def test_counts_are_true(method) -> None:
    _, _, cost, x0 = brockett(7)
    counted = Counted(cost)
    result = sm.minimize(EuclideanStiefel(), counted, x0, method, gradient_tolerance=1e-4)
    assert counted.calls == result.nfev == result.history["nfev"][-1]
    assert result.njev <= result.nfev
    assert (result.nhev > 0) == ("trust" in method)
    if method == "trust_regions":
        # One call a point: value, gradient and Hessian share it.
        assert result.njev == result.nit + 1


@pytest.mark.parametrize("most", [1, 2, 7])
@pytest.mark.parametrize("method", METHODS)
def test_evaluations_never_exceed_their_limit(method, most) -> None:
    _, _, cost, x0 = brockett(8)
    counted = Counted(cost)
    result = sm.minimize(
        EuclideanStiefel(), counted, x0, method, max_evaluations=most, gradient_tolerance=0
    )
    assert counted.calls == result.nfev == most
    assert result.status == 4
    assert not result.success


@pytest.mark.parametrize("most", [1, 5])
@pytest.mark.parametrize("method", [m for m in METHODS if "trust" in m])
def test_hessian_products_never_exceed_their_limit(method, most) -> None:
    _, _, cost, x0 = brockett(8)
    result = sm.minimize(
        EuclideanStiefel(), cost, x0, method, max_products=most, gradient_tolerance=0
    )
    assert result.nhev == most
    assert result.status == 8
    assert f"max_products = {most}" in result.message


def test_time_is_a_limit_within_an_iteration_too() -> None:
    """Products with a slow Hessian, of a cost that is called once."""

    class Slow(EuclideanStiefel):
        def hessian_operator(self, cost, x):
            def apply(u):
                time.sleep(0.02)
                return u

            return apply

    _, _, cost, x0 = brockett(8)
    result = sm.minimize(Slow(), cost, x0, "trust_regions", max_time=0.15, gradient_tolerance=0)
    assert result.status == 5
    assert result.time < 5


@pytest.mark.parametrize("method", METHODS)
def test_iterations_step_and_time_are_limits(method) -> None:
    _, _, cost, x0 = brockett(9)
    M = EuclideanStiefel()
    result = sm.minimize(M, cost, x0, method, max_iterations=3, gradient_tolerance=0)
    assert (result.nit, result.status) == (3, 3)
    assert sm.minimize(M, cost, x0, method, max_iterations=0).nit == 0
    result = sm.minimize(M, cost, x0, method, step_tolerance=100, gradient_tolerance=0)
    assert (result.nit, result.status) == (1, 2)
    assert result.history["step"][1] > 0

    def slow(x):
        time.sleep(0.02)
        return cost(x)

    result = sm.minimize(M, slow, x0, method, max_time=0.1, gradient_tolerance=0)
    assert result.status == 5
    assert result.time >= 0.1


# -- costs that are not finite -----------------------------------------------------------------


@pytest.mark.parametrize("method", OURS)
def test_steps_back_from_where_the_cost_is_not_finite(method) -> None:
    """The cost x - log x is nan beyond zero, and the first step lands there."""
    far = ("initial_radius", "max_radius") if method == "trust_regions" else ("initial_step",)
    options = dict.fromkeys(far, 100.0)
    result = sm.minimize(
        Euclidean(ndim=1), lambda x: (x - x.log()).sum(),
        torch.tensor([3.0, 2.5], dtype=torch.float64), method, options=options,
    )  # fmt: skip
    assert result.success
    assert torch.allclose(result.x, torch.ones(2, dtype=torch.float64), atol=1e-5)


def test_a_cost_that_is_not_finite_at_the_start_is_an_error() -> None:
    x0 = torch.tensor([-1.0, 1.0])
    with pytest.raises(ManifoldError, match="cost is nan at x0, which is not finite"):
        sm.minimize(Euclidean(ndim=1), lambda x: x.log().sum(), x0)
    with pytest.raises(ManifoldError, match=r"gradient norm is nan at x0|gradient norm is inf"):
        sm.minimize(Euclidean(ndim=1), lambda x: x.sqrt().sum(), torch.tensor([0.0, 1.0]))


def test_an_end_without_success_says_so() -> None:
    """In float32 the gradient of a large sum cannot be made this small."""
    x0 = torch.linspace(-3, 3, 50)
    for method in OURS:
        result = sm.minimize(
            Euclidean(ndim=1), lambda x: (1e3 * (x - 0.1).square() + (7 * x).cos()).sum(), x0,
            method, gradient_tolerance=1e-12, max_iterations=300,
        )  # fmt: skip
        assert not result.success
        assert result.status == 7, (method, result)
        assert "float32" in result.message
        assert result.grad_norm < 1e-1


# -- preconditioners ---------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["conjugate_gradient", "trust_regions", "lbfgs"])
def test_the_inverse_hessian_as_preconditioner_ends_at_once(method) -> None:
    curvatures = torch.logspace(-3, 3, 30, dtype=torch.float64)
    x0 = normal(1, 30)

    def cost(x):
        return (curvatures * x * x).sum() / 2

    tight = {} if method == "trust_regions" else {"curvature": 1e-8, "decrease": 1e-9}
    far = {"initial_radius": 1e4, "max_radius": 1e4} if method == "trust_regions" else {}
    plain = sm.minimize(Euclidean(ndim=1), cost, x0, method, options={**tight, **far})
    preconditioned = sm.minimize(
        Euclidean(ndim=1), cost, x0, method,
        options={"preconditioner": lambda x, u: u / curvatures, **tight, **far},
    )  # fmt: skip
    assert preconditioned.success
    assert preconditioned.nit <= 2
    if method == "trust_regions":
        assert preconditioned.nhev <= 3 < plain.nhev
    else:
        assert plain.nit > 10


@pytest.mark.parametrize("method", [m for m in METHODS if m != "pymanopt:steepest_descent"])
def test_any_positive_preconditioner_reaches_the_same_minimum(method) -> None:
    A, weights, cost, x0 = brockett(10)
    M = EuclideanStiefel()
    C = normal(11, 12, 12)
    C = torch.eye(12, dtype=torch.float64) + 0.2 * C @ C.mT / 12

    def preconditioner(x, u):
        return M.proju(x, C @ u)

    result = sm.minimize(
        M, cost, x0, method, max_iterations=3000, options={"preconditioner": preconditioner}
    )
    top = torch.linalg.eigvalsh(A).flip(0)[:3]
    assert result.success
    assert result.fun == pytest.approx(-float((weights * top).sum()) / 2, rel=1e-9)


# -- what is seen from outside -----------------------------------------------------------------


def test_a_batch_of_points_is_one_point_of_a_product() -> None:
    B = normal(12, 2, 8, 8)
    A = B @ B.mT
    x0 = torch.nn.functional.normalize(normal(13, 2, 8), dim=-1)
    for method in FAST:
        result = sm.minimize(
            geoopt.Sphere(), lambda x: torch.einsum("bi,bij,bj->", x, A, x), x0, method
        )
        assert result.fun == pytest.approx(float(torch.linalg.eigvalsh(A)[:, 0].sum()), abs=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_the_callback_sees_every_iterate_and_can_stop(method) -> None:
    _, _, cost, x0 = brockett(14)
    seen = []

    def callback(intermediate):
        seen.append(intermediate)
        if len(seen) == 4:
            raise StopIteration

    result = sm.minimize(
        EuclideanStiefel(), cost, x0, method, callback=callback, options={"return_all": True}
    )
    assert result.status == 6
    assert [s.nit for s in seen] == [0, 1, 2, 3]
    assert [s.fun for s in seen] == result.history["cost"]
    assert [s.grad_norm for s in seen] == result.history["grad_norm"]
    assert [s.nfev for s in seen] == result.history["nfev"]
    assert all(torch.equal(s.x, x) for s, x in zip(seen, result.allvecs, strict=True))
    assert torch.equal(result.allvecs[0], x0)


def test_progress_writes_to_standard_error_only(capsys) -> None:
    _, _, cost, x0 = brockett(15)
    sm.minimize(EuclideanStiefel(), cost, x0, progress=True)
    shown = capsys.readouterr()
    assert not shown.out
    assert "trust regions: iteration" in shown.err
    assert "gradient_tolerance" in shown.err
    sm.minimize(EuclideanStiefel(), cost, x0)
    assert capsys.readouterr() == ("", "")


def test_the_result_reads_as_scipys() -> None:
    _, _, cost, x0 = brockett(16)
    result = sm.minimize(EuclideanStiefel(), cost, x0)
    assert isinstance(result, scipy.optimize.OptimizeResult)
    assert result["x"] is result.x
    assert "allvecs" not in result
    text = repr(result)
    assert text.splitlines()[0].strip().startswith("message: gradient norm")
    assert "(12, 3) (float64, cpu)" in text


def test_the_result_is_a_table_and_a_curve_in_a_notebook() -> None:
    _, _, cost, x0 = brockett(0)
    result = sm.minimize(EuclideanStiefel(), cost, x0, "trust_regions")
    html = ET.fromstring(result._repr_html_())
    cells = {row[0].text: row[1].text for row in html.iter("tr") if row[0].tag == "td"}
    assert cells["nfev"] == str(result.nfev)
    assert float(cells["fun"]) == pytest.approx(result.fun, rel=1e-5)
    assert "message" not in cells
    assert result.message in "".join(html.find("div").itertext())
    (curve,) = html.iter("{http://www.w3.org/2000/svg}polyline")
    heights = [float(point.split(",")[1]) for point in curve.get("points").split()]
    assert len(heights) == result.nit + 1
    norms = result.history["grad_norm"]
    # Downwards on the page is downwards in the logarithm, in proportion.
    expected = np.interp(np.log(norms), [np.log(min(norms)), np.log(max(norms))], [104, 14])
    np.testing.assert_allclose(heights, expected, atol=0.06)


def test_a_result_without_a_curve_still_shows() -> None:
    _, _, cost, x0 = brockett(0)
    result = sm.minimize(EuclideanStiefel(), cost, x0, max_iterations=0)
    ET.fromstring(result._repr_html_())
    result.history["grad_norm"] = [float("nan"), 0.0]
    assert "svg" not in result._repr_html_()
    del result.history
    assert "svg" not in result._repr_html_()


def test_names_that_do_not_exist_are_answered_with_those_that_do() -> None:
    _, _, cost, x0 = brockett(17)
    M = EuclideanStiefel()
    with pytest.raises(ManifoldError, match=r"method='newton'.*'trust_regions'.*pymanopt:trust"):
        sm.minimize(M, cost, x0, "newton")
    with pytest.raises(ManifoldError, match=r"'memory'; its options are .*beta_rule"):
        sm.minimize(M, cost, x0, "conjugate_gradient", options={"memory": 3})
    with pytest.raises(ManifoldError, match=r"'fletcher' is none of 'polak_ribiere_plus'"):
        sm.minimize(M, cost, x0, "conjugate_gradient", options={"beta_rule": "fletcher"})
    with pytest.raises(ManifoldError, match="takes no preconditioner"):
        sm.minimize(
            M, cost, x0, "pymanopt:steepest_descent", options={"preconditioner": lambda x, u: u}
        )
    with pytest.raises(ManifoldError, match=r"kappa=2"):
        sm.minimize(M, cost, x0, options={"kappa": 2.0})


def test_starts_that_are_no_points_are_refused() -> None:
    _, _, cost, x0 = brockett(18)
    M = EuclideanStiefel()
    with pytest.raises(ManifoldError, match=r"x0 is not on EuclideanStiefel: .*projx\(x0\)"):
        sm.minimize(M, cost, 2 * x0)
    with pytest.raises(ManifoldError, match=r"floating dtype.*torch.int64"):
        sm.minimize(M, cost, torch.eye(12, 3, dtype=torch.int64))
    with pytest.raises(ManifoldError, match="returns a scalar tensor"):
        sm.minimize(M, lambda x: x, x0)
    with pytest.raises(ManifoldError, match=r"conjugate_gradient"):
        sm.minimize(geoopt.CanonicalStiefel(), cost, x0)
    with pytest.raises(ManifoldError, match="at least one evaluation"):
        sm.minimize(M, cost, x0, max_evaluations=0)


# -- when a run is idle --------------------------------------------------------------------------


def recorded(values: list[float]) -> int:
    """How many iterates of these costs, at gradients that never shrink, a run takes."""
    x = torch.ones(2, dtype=torch.float64)
    limits = Limits(0.0, None, None, None, None, None, None)
    with Progress("", quiet=True) as line:
        objective = Objective(
            Euclidean(ndim=1), lambda x: x.square().sum(), limits, None, line, False
        )
        at = objective.iterate(objective.cost.at(x))
        for count, value in enumerate(values):
            try:
                objective.record(at._replace(value=value), 1.0)
            except Stopped:
                return count
    return len(values)


def test_a_cost_near_zero_still_gains_far_below_its_start() -> None:
    """Sums of squares are exact there; their start says nothing of their rounding."""
    assert recorded([1.0] + [1e-18 * 0.95**k for k in range(200)]) == 201


def test_noise_about_a_floor_is_idle_in_the_end() -> None:
    noise = 1e-16 * normal(0, 400)
    assert recorded([2.0] + [1.0 + float(e) for e in noise]) < 100
