"""`minimize` goes on from the state of a result as if it had not stopped."""

from __future__ import annotations

import io

import pytest
import torch
from problems import completion
from strategies import normal

import sttp_manifold as sm
from sttp_manifold._geoopt import EuclideanStiefel
from sttp_manifold.errors import ManifoldError
from sttp_manifold.optim.minimize import METHODS

OURS = tuple(m for m in METHODS if not m.startswith("pymanopt"))


def stored(state):
    """Through a file, as a checkpoint is."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def same(a, b) -> None:
    assert torch.equal(a.x, b.x)
    assert torch.equal(a.jac, b.jac)
    counts = ("fun", "grad_norm", "nit", "nfev", "njev", "nhev", "success", "status", "message")
    assert [a[name] for name in counts] == [b[name] for name in counts]
    for name in ("cost", "grad_norm", "step", "nfev"):
        assert a.history[name] == b.history[name]


def problem(kind, dtype):
    if kind == "stiefel":
        A, x0 = normal(0, 9, 9).to(dtype), torch.linalg.qr(normal(1, 9, 3))[0].to(dtype)
        return EuclideanStiefel(), lambda x: (x * (A @ x)).sum() + (x**4).sum(), x0
    M, cost, x0 = completion(0, "free", dtype=dtype)
    if kind == "product":
        return M, cost, x0
    # Its Hessian comes from an operator of its own, which calls the cost.
    F = sm.FixedTTRankManifold(M.shape)
    return F, cost, F.pack(M.unpack(x0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", ["stiefel", "product", "fixed"])
@pytest.mark.parametrize("method", OURS)
def test_a_run_in_pieces_is_the_run(method, kind, dtype) -> None:
    M, cost, x0 = problem(kind, dtype)
    settings = {"gradient_tolerance": 0.0, "max_evaluations": 400}
    whole = sm.minimize(M, cost, x0, method, max_iterations=17, **settings)
    state = None
    for most in (0, 1, 6, 6, 17):
        result = sm.minimize(M, cost, x0, method, max_iterations=most, state=state, **settings)
        state = stored(result.state)
    same(result, whole)
    seconds = [*result.history["seconds"], result.time]
    assert seconds == sorted(seconds)


def test_a_callback_stops_a_run_that_goes_on() -> None:
    M, cost, x0 = problem("product", torch.float64)
    told: list[int] = []

    def stop_at_three(at) -> None:
        told.append(at.nit)
        if at.nit == 3:
            raise StopIteration

    first = sm.minimize(M, cost, x0, "lbfgs", max_iterations=9, callback=stop_at_three)
    assert first.status == 6
    second = sm.minimize(
        M, cost, x0, "lbfgs", max_iterations=9, callback=stop_at_three, state=first.state
    )
    assert told == list(range(10))
    same(second, sm.minimize(M, cost, x0, "lbfgs", max_iterations=9))
    # The state is as it was: it can be gone on from again.
    third = sm.minimize(M, cost, x0, "lbfgs", max_iterations=9, state=first.state)
    same(third, second)


def test_states_of_something_else_are_refused() -> None:
    M, cost, x0 = problem("product", torch.float64)
    state = sm.minimize(M, cost, x0, "lbfgs", max_iterations=2).state
    with pytest.raises(ManifoldError, match="state is of method='lbfgs'"):
        sm.minimize(M, cost, x0, "trust_regions", state=state)
    with pytest.raises(ManifoldError, match="give the x0 of that run"):
        sm.minimize(M, cost, x0.float(), "lbfgs", state=state)
    with pytest.raises(ManifoldError, match=r"state=result\.state"):
        sm.minimize(M, cost, x0, "lbfgs", state=3)
    with pytest.raises(ManifoldError, match="cannot go on from a state"):
        sm.minimize(M, cost, x0, "pymanopt:conjugate_gradient", state=state)
