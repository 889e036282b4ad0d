"""How far a step of Adam can go, what that spares an accelerator, and what it must not rest on."""

from __future__ import annotations

import math

import pytest
import torch
from calls import dispatched
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds

from sttp_manifold import SpectralTTManifold, TTShape
from sttp_manifold._geoopt import EuclideanStiefel, ManifoldParameter
from sttp_manifold.experiments.models import network, weight_sizes
from sttp_manifold.frames import _branch_free
from sttp_manifold.frames.orthonormal import polar_factor
from sttp_manifold.frames.retractions import RETRACTIONS
from sttp_manifold.optim import RiemannianAdam, _reach
from sttp_manifold.optim._reach import longest_step


@given(
    beta1=st.floats(0, 0.99),
    beta2=st.floats(0.5, 0.9999),
    growth=st.floats(-3, 3),
    steps=st.integers(1, 60),
    seed=seeds,
)
def test_no_gradients_make_a_longer_step(beta1, beta2, growth, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    m = v = 0.0
    for t in range(1, steps + 1):
        g = float(torch.randn((), generator=generator, dtype=torch.float64)) * math.exp(growth * t)
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        step = abs(m) / (1 - beta1**t) / math.sqrt(v / (1 - beta2**t) + 1e-300)
        assert step <= longest_step(beta1, beta2) * (1 + 1e-9)


@pytest.mark.parametrize(("beta1", "beta2", "value"), [(0.9, 0.999, 7.2702), (0.0, 0.99, 10.0)])
def test_the_worst_gradients_make_that_step(beta1, beta2, value):
    assert longest_step(beta1, beta2) == pytest.approx(value, rel=1e-4)
    m = v = 0.0
    for t in range(4000):  # gradients in proportion to (beta1 / beta2)^k, k steps before the end
        g = (beta1 / beta2) ** (3999 - t)
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
    assert m / math.sqrt(v) == pytest.approx(value, rel=1e-3)


def test_without_a_bound_it_is_infinite():
    assert longest_step(0.9, 0.5) == math.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("within", [1e-6, 1e-3, 1e-2, 0.1, 0.5])
def test_frames_near_the_identity_by_the_series_alone(dtype, within):
    torch.manual_seed(0)
    Q = torch.linalg.qr(torch.randn(3, 20, 6, dtype=torch.float64))[0]
    A = torch.randn(3, 6, 6, dtype=torch.float64)
    D = A + A.mT
    D *= within / D.flatten(1).norm(dim=1).view(-1, 1, 1)
    L = torch.linalg.cholesky(torch.eye(6) + D).mT
    Z = (Q @ L).to(dtype)
    found = _branch_free.near_factors(Z, within)
    torch.testing.assert_close(found, polar_factor(Z.double()).to(dtype))
    gram = found.mT @ found
    error = float((gram - torch.eye(6, dtype=dtype)).abs().max())
    assert error < (2e-6 if dtype == torch.float32 else 5e-15)


def parameters(dtype, seed=0):
    torch.manual_seed(seed)
    manifold = SpectralTTManifold(TTShape((4, 3), (5, 2), rank=3), spectrum="free")
    loose = EuclideanStiefel()
    start = torch.linalg.qr(torch.randn(2, 40, 20))[0].contiguous()
    return [
        ManifoldParameter(manifold.random(2, manifold.n_elements).to(dtype), manifold=manifold),
        ManifoldParameter(start.to(dtype), manifold=loose),
    ]


def give(params, seed):
    torch.manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape).to(p.dtype)


@pytest.fixture
def accelerated(monkeypatch):
    """Steps as where a look is not free; calls of the short way are counted."""
    calls = []
    near = RETRACTIONS["newton_schulz"].of_near
    counting = RETRACTIONS["newton_schulz"]._replace(
        of_near=lambda Z, within: calls.append(within) or near(Z, within)
    )
    monkeypatch.setattr(_reach, "looks_for_free", lambda device: False)
    monkeypatch.setitem(RETRACTIONS, "newton_schulz", counting)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("second_moment", ["frame", "elementwise"])
@pytest.mark.parametrize("lr", [1e-4, 1e-3, 1e-2, 0.05, 0.3])
def test_the_short_way_goes_to_the_same_points(accelerated, monkeypatch, dtype, second_moment, lr):
    mine, theirs = parameters(dtype), parameters(dtype)
    options = dict(lr=lr, second_moment=second_moment, amsgrad=True, weight_decay=0.1)
    short, usual = RiemannianAdam(mine, **options), RiemannianAdam(theirs, **options)
    for k in range(4):
        give(mine, k)
        give(theirs, k)
        short.step()
        with monkeypatch.context() as patch:
            patch.setattr(_reach, "looks_for_free", lambda device: True)
            usual.step()
    for p, q in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p.detach(), q.detach())
        for name, value in usual.state[q].items():
            torch.testing.assert_close(short.state[p][name], value, rtol=1e-4, atol=1e-6)
    entries = math.sqrt(800) if second_moment == "elementwise" else 1
    assert bool(accelerated) == ((7.2702 * lr * entries) ** 2 <= 0.5)


def test_whoever_writes_a_point_has_it_made_a_frame_again(accelerated):
    params = parameters(torch.float32)
    optimizer = RiemannianAdam(params, lr=1e-3)
    for k in range(3):
        give(params, k)
        optimizer.step()
    assert accelerated
    before = len(accelerated)
    with torch.no_grad():
        params[1].mul_(3).add_(0.2)
    give(params, 4)
    optimizer.step()
    assert len(accelerated) == before
    X = params[1].detach()
    torch.testing.assert_close(X.mT @ X, torch.eye(20).expand(2, -1, -1), rtol=0, atol=2e-6)
    give(params, 5)
    optimizer.step()
    assert len(accelerated) > before


def test_a_momentum_from_elsewhere_goes_no_farther_than_the_rate_allows(accelerated):
    params = parameters(torch.float32)
    optimizer = RiemannianAdam(params, lr=1e-2, second_moment="frame")
    give(params, 0)
    optimizer.step()
    for p in params:
        optimizer.state[p]["exp_avg"].mul_(1e4)
    give(params, 1)
    optimizer.step()  # by Cholesky QR, as anywhere
    before = params[1].detach().clone()
    for p in params:
        p.grad = p.grad * 0
    optimizer.step()
    assert accelerated
    X = params[1].detach()
    assert float((X - before).flatten(1).norm(dim=1).max()) <= 1e-2 * 7.2702
    torch.testing.assert_close(X.mT @ X, torch.eye(20).expand(2, -1, -1), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("options", "at_most"),
    [
        ({"second_moment": "frame"}, 90),
        ({"second_moment": "frame", "capturable": True}, 230),
        ({"lr": 1e-5}, 110),
        ({}, 140),
    ],
)
def test_operations_of_a_step_for_a_network(options, at_most):
    """ResNet-32 at rank 64 without kernels of our own, on a device that has no values to ask for.

    It took 414 in float32, and 919 kernels on a GPU before that.
    """
    params = []
    for size in weight_sizes(network("resnet-32", device="meta")):
        manifold = SpectralTTManifold(TTShape.for_weight(size, 64))
        point = manifold.random_parameter().detach().to("meta")
        params.append(ManifoldParameter(point, manifold=manifold))
        params[-1].grad = torch.empty_like(point)
    optimizer = RiemannianAdam(params, fused=False, **{"lr": 1e-3, **options})
    optimizer.step()
    optimizer.step()
    assert dispatched(optimizer.step) <= at_most
