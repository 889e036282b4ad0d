"""Costs whose numbers their dtype can hardly hold, and costs that do not depend on the point."""

from __future__ import annotations

import math

import pytest
import torch

import sttp_manifold as sm
from sttp_manifold._geoopt import Euclidean, geoopt
from sttp_manifold.errors import ManifoldError
from sttp_manifold.optim.minimize import METHODS

F32, F64 = torch.float32, torch.float64
OWN = [method for method in METHODS if not method.startswith("pymanopt")]


def quadratic(dtype: torch.dtype, scale: float):
    A = torch.diag(torch.arange(1.0, 6.0, dtype=dtype))
    return lambda x: scale * (x @ A @ x), torch.full((5,), 5**-0.5, dtype=dtype)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("dtype", "scale"), [(F32, 1e-25), (F32, 1e-34), (F32, 1e30), (F64, 1e-200), (F64, 1e200)]
)
def test_no_false_success_where_squares_underflow_or_overflow(dtype, scale, method) -> None:
    cost, x = quadratic(dtype, scale)
    relative = 1e-3 if method.startswith("pymanopt") else 1e-5
    told = []
    result = sm.minimize(
        geoopt.Sphere(),
        cost,
        x,
        method,
        gradient_tolerance=relative * scale,
        callback=told.append,
        max_iterations=200,
    )
    assert result.success, result.message
    assert result.nit > 2
    assert result.fun == pytest.approx(scale, rel=1e-5)
    # All that a user sees is in his own units.
    assert result.history["cost"][0] == pytest.approx(3 * scale, rel=1e-5)
    assert told[0].fun == pytest.approx(3 * scale, rel=1e-5)
    assert told[0].grad_norm == pytest.approx(math.sqrt(8) * scale, rel=1e-5)
    assert told[0].jac.abs().max() <= 2 * scale
    assert result.grad_norm <= relative * scale
    assert result.history["grad_norm"][-1] == result.grad_norm


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("method", OWN)
def test_points_far_out_come_back(dtype, method) -> None:
    """Entries of 1e6: gradients of 1e20, <d, Hd> beyond float32, and a way of 1e6 to go."""
    x = 1e6 * torch.arange(1.0, 7.0, dtype=dtype)
    result = sm.minimize(
        Euclidean(ndim=1), lambda y: y.pow(4).sum(), x, method, gradient_tolerance=1e-3
    )
    assert result.success, result.message
    assert result.fun < 1e-3


@pytest.mark.parametrize("method", OWN)
@pytest.mark.parametrize("size", [1e-15, 1e-6, 1e6, 1e15])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_weights_of_any_size(dtype, size, method) -> None:
    F = sm.FixedTTRankManifold(sm.TTShape.for_matrix(12, 10, rank=3))
    torch.manual_seed(0)
    W = torch.randn(12, 10, dtype=dtype)
    x = F.from_matrix(size * W).as_subclass(torch.Tensor)
    near = F.from_matrix(size * (W + 0.3 * torch.randn(12, 10, dtype=dtype)))
    target = F.to_matrix(near.as_subclass(torch.Tensor))
    result = sm.minimize(
        F,
        lambda tt: (tt.to_matrix() - target).square().sum(),
        x,
        method,
        gradient_tolerance=2e-3 * size,
    )
    assert result.success, result.message
    assert result.fun < 1e-5 * size**2


@pytest.mark.parametrize("size", [1e6, 1e9])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_trust_regions_grow_on_the_way_to_large_weights(dtype, size) -> None:
    """From singular values of one; a radius capped by the start made a thousand small steps."""
    F = sm.FixedTTRankManifold(sm.TTShape.svd(8, 7, rank=2))
    torch.manual_seed(0)
    W = size * torch.randn(8, 2, dtype=dtype) @ torch.randn(2, 7, dtype=dtype)
    x = F.random(dtype=dtype)
    result = sm.minimize(F, lambda tt: (tt.to_matrix() - W).square().sum(), x, "trust_regions")
    assert result.nit < 200
    assert torch.linalg.norm(F.to_matrix(result.x) - W) < 1e-5 * torch.linalg.norm(W)


@pytest.mark.parametrize("given", [{}, {"max_radius": 2.0}])
def test_the_largest_radius_is_the_given_one_or_grows_in_flat_space(given) -> None:
    target = torch.full((6,), 1e5, dtype=torch.float64)
    result = sm.minimize(
        geoopt.Euclidean(ndim=1),
        lambda x: (x - target).square().sum(),
        torch.zeros(6, dtype=torch.float64),
        "trust_regions",
        options=given,
        max_iterations=60,
    )
    assert result.success == (not given)
    steps = result.history["step"][1:]
    assert max(steps) > 1e4 or all(step <= 2.0 * (1 + 1e-9) for step in steps)


def test_gradients_are_finite_where_their_norm_is_not() -> None:
    x = torch.full((100,), 2.0, dtype=F32)
    told = []
    sm.minimize(
        Euclidean(ndim=1),
        lambda y: 1e36 * (y - 1).square().sum() / 2,
        x,
        "lbfgs",
        gradient_tolerance=1e32,
        callback=told.append,
    )
    assert told[0].grad_norm == pytest.approx(1e37, rel=1e-5)
    assert told[-1].grad_norm <= 1e32
    # The norm itself is beyond float32.
    wide = torch.ones(10_000, dtype=F32)
    far = sm.minimize(
        Euclidean(ndim=1),
        lambda y: (1e37 * (y - 1)).sum(),
        wide,
        "steepest_descent",
        max_iterations=0,
    )
    assert far.grad_norm == pytest.approx(1e39, rel=1e-5)


def test_what_cannot_be_held_is_said() -> None:
    x = torch.full((4,), 1e20, dtype=F32)
    with pytest.raises(ManifoldError, match=r"cost is inf at x0.*float32 ends at 3\.4e\+38"):
        sm.minimize(Euclidean(ndim=1), lambda y: y.square().sum(), x)


# -- costs that do not depend on the point --------------------------------------------------------


def independent():
    A = torch.eye(4)
    weight = torch.ones((), requires_grad=True)

    @torch.no_grad()
    def without_grad(x):
        return (x * (A @ x)).sum()

    return {
        "detach": lambda x: (x.detach() ** 2).sum(),
        "data": lambda x: (x.data**2).sum(),
        "item": lambda x: torch.tensor((x**2).sum().item()),
        "constant": lambda x: torch.tensor(3.0),
        "no_grad": without_grad,
        "numpy": lambda x: torch.tensor(float(x.detach().numpy().sum())),
        "of other parameters": lambda x: weight * (x.detach() ** 2).sum(),
    }


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", independent())
def test_a_cost_that_does_not_depend_on_the_point_is_an_error(name, method) -> None:
    x = torch.full((4,), 0.5)
    with pytest.raises(ManifoldError, match="the cost does not depend on the point"):
        sm.minimize(geoopt.Sphere(), independent()[name], x, method)


def test_nor_may_it_hide_behind_a_weight_or_pymanopt() -> None:
    F = sm.FixedTTRankManifold(sm.TTShape.for_matrix(6, 4, rank=2))
    x = F.random().as_subclass(torch.Tensor)
    cost = lambda tt: tt.to_matrix().detach().square().sum()  # noqa: E731
    for M in (F, F.total_space):
        with pytest.raises(ManifoldError, match="does not depend"):
            sm.minimize(M, cost, x, "conjugate_gradient")
    with pytest.raises(ManifoldError, match="does not depend"):
        sm.pymanopt_problem(F, cost).riemannian_gradient(x.double().numpy())
    result = sm.check_gradient(F, cost)
    assert not result.passed
    assert any("autograd finds no way" in note for note in result.notes)


@pytest.mark.parametrize("method", METHODS)
def test_a_gradient_that_is_zero_by_right_is_a_success(method) -> None:
    x = torch.full((4,), 0.5, dtype=F64)
    for cost in (lambda x: (0 * x).sum(), lambda x: x @ x):
        result = sm.minimize(geoopt.Sphere(), cost, x, method)
        assert result.success
        assert result.nit == 0


def test_inference_mode_around_a_run_takes_nothing_away() -> None:
    cost, x = quadratic(F64, 1.0)
    with torch.inference_mode():
        result = sm.minimize(geoopt.Sphere(), cost, x.clone())
    assert result.success
    assert result.fun == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"gradient_tolerance": "1e-6"}, "gradient_tolerance is a number, got '1e-6'"),
        ({"gradient_tolerance": math.nan}, "gradient_tolerance is a number, got nan"),
        ({"gradient_tolerance": None}, "gradient_tolerance is a number, got None"),
        ({"max_iterations": 2.5}, "max_iterations is an integer, or None for no limit, got 2.5"),
        ({"max_iterations": -1}, "max_iterations is not below zero, got -1"),
        ({"max_time": -1.0}, r"max_time is not below zero, got -1\.0"),
        ({"max_evaluations": True}, "max_evaluations is an integer"),
        ({"callback": 3}, "callback is a function, but int came"),
        ({"options": ["memory"]}, "options are a mapping"),
        ({"options": {3: 4}}, "has no option 3"),
        ({"method": ["lbfgs"]}, r"method=\['lbfgs'\] is none of"),
        ({"method": "lbfgs", "options": {"memory": "ten"}}, "memory='ten' lies outside"),
        ({"method": "lbfgs", "options": {"curvature": None}}, "curvature=None lies outside"),
    ],
)
def test_arguments_of_another_kind_are_named(given, said) -> None:
    cost, x = quadratic(F64, 1.0)
    with pytest.raises(ManifoldError, match=said):
        sm.minimize(geoopt.Sphere(), cost, x, **given)


def test_a_cost_of_integers_or_complex_numbers_is_named() -> None:
    x = torch.full((4,), 0.5, dtype=F64)
    for cost, dtype in ((lambda x: x.sum().long(), "int64"), (lambda x: x.sum() * 1j, "complex")):
        with pytest.raises(ManifoldError, match=rf"scalar tensor of real numbers.*{dtype}"):
            sm.minimize(geoopt.Sphere(), cost, x)
    with pytest.raises(ManifoldError, match="cost is a function, but str came"):
        sm.minimize(geoopt.Sphere(), "x", x)


def test_a_callback_that_raises_ends_the_run_with_its_own_error() -> None:
    cost, x = quadratic(F64, 1.0)

    def broken(_):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        sm.minimize(geoopt.Sphere(), cost, x, callback=broken, progress=True)
    with pytest.raises(ManifoldError, match="max_time = 0 seconds spent before the cost at x0"):
        sm.minimize(geoopt.Sphere(), cost, x, max_time=0)


@pytest.mark.parametrize("method", METHODS)
def test_batches_of_nothing_and_points_that_are_numbers(method) -> None:
    nothing = torch.empty(0, 4, dtype=F64)
    result = sm.minimize(geoopt.Sphere(), lambda y: y.square().sum(), nothing, method)
    assert result.success
    assert result.x.shape == (0, 4)
    one = torch.tensor(1.0, dtype=F64)
    result = sm.minimize(Euclidean(ndim=0), lambda y: (y - 3) ** 2, one, method)
    assert result.success
    assert float(result.x) == pytest.approx(3.0, abs=1e-6)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "pymanopt:steepest_descent"])
def test_preconditioners_that_are_none_are_named(method) -> None:
    cost, x = quadratic(F64, 1.0)
    for wrong, said in (
        (lambda x, u: None, "of shape .5,.; this one gave NoneType"),
        (lambda x, u: u[:2], "this one gave .2,."),
        (lambda x, u: -u, "positive definite on each tangent space"),
    ):
        with pytest.raises(ManifoldError, match=said):
            sm.minimize(geoopt.Sphere(), cost, x, method, options={"preconditioner": wrong})


@pytest.mark.parametrize("method", OWN)
def test_a_cost_without_bottom_ends_with_a_word(method) -> None:
    x = torch.ones(3, dtype=F32)
    result = sm.minimize(
        Euclidean(ndim=1), lambda y: -y.square().sum(), x, method, max_iterations=300
    )
    assert not result.success
    assert math.isfinite(result.fun)
    assert torch.isfinite(result.x).all()
