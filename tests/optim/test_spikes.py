"""One huge gradient, then good ones: nothing becomes NaN, and frames stay frames.

The reference is torch's Adam, whose second moment overflows to infinity and stays there: finite,
and at rest.
"""

from __future__ import annotations

import copy
import io

import pytest
import torch

from sttp_manifold._geoopt import EuclideanStiefel, ManifoldParameter, geoopt
from sttp_manifold.frames.retractions import RETRACTIONS
from sttp_manifold.manifolds.spectral_tt import SpectralTTManifold
from sttp_manifold.optim import RiemannianAdam, RiemannianMuon, RiemannianSGD
from sttp_manifold.tt.shape import TTShape

SPIKES = [
    (torch.float16, 300.0),
    (torch.float16, 6e4),
    (torch.bfloat16, 1e30),
    (torch.float32, 1e19),
    (torch.float32, 1e30),
    (torch.float32, 1e37),
    (torch.float64, 1e200),
    (torch.float64, 1e306),
]
ADAM = [
    {},
    {"amsgrad": True},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "decoupled_weight_decay": True},
    {"foreach": False},
    {"maximize": True},
    {"betas": (0.9, 0.0)},
    {"betas": (0.0, 0.999)},
]
SGD = [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"foreach": False}]


def framed(dtype):
    torch.manual_seed(0)
    params = [
        SpectralTTManifold(TTShape((4, 3), (5, 2), rank=3), spectrum=spectrum).random_parameter()
        for spectrum in ("free", "bounded", "identity")
    ]
    params.append(ManifoldParameter(EuclideanStiefel().random(6, 4)))
    return [ManifoldParameter(p.detach().to(dtype), manifold=p.manifold) for p in params]


def generic(dtype):
    torch.manual_seed(0)
    manifolds = {
        "Sphere": (7,),
        "PoincareBall": (4,),
        "Stiefel": (5, 2),
        "EuclideanStiefelExact": (5, 2),
        "Lorentz": (4,),
    }
    params = []
    for name, shape in manifolds.items():
        M = getattr(geoopt, name)().to(dtype)
        x = M.projx(0.3 * torch.randn(shape).to(dtype))
        params.append(ManifoldParameter(x, manifold=M))
    return params


def run(optimizer, params, spike, after=12):
    for step in range(after + 3):
        generator = torch.Generator().manual_seed(step)
        for p in params:
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.grad = (noise.sign() * spike if step == 2 else noise).to(p.dtype)
        optimizer.step()
        for p in params:
            assert p.detach().isfinite().all(), (type(p.manifold).__name__, step)


def check(params):
    for p in params:
        eps = torch.finfo(p.dtype).eps
        if hasattr(p.manifold, "unpack"):
            error = p.manifold.unpack(p.detach().double()).orthonormality_error()
        else:
            x = p.detach().double()
            error = float((x.mT @ x - torch.eye(x.shape[-1], dtype=x.dtype)).abs().max())
        assert error <= 20 * eps


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("retraction", RETRACTIONS)
@pytest.mark.parametrize("options", ADAM, ids=str)
@pytest.mark.parametrize(("dtype", "spike"), SPIKES)
def test_frames_under_adam(dtype, spike, options, retraction, capturable):
    params = framed(dtype)
    optimizer = RiemannianAdam(
        params, lr=0.05, retraction=retraction, capturable=capturable, **options
    )
    run(optimizer, params, spike)
    check(params)


@pytest.mark.parametrize("retraction", RETRACTIONS)
@pytest.mark.parametrize("options", SGD, ids=str)
@pytest.mark.parametrize(("dtype", "spike"), [s for s in SPIKES if s[0] != torch.float16])
@pytest.mark.parametrize("look", [True, False])
def test_frames_under_sgd(dtype, spike, options, retraction, look, monkeypatch):
    """The spectrum moves as torch moves it: only frames are looked at."""
    step = type(RETRACTIONS["qr"]).step
    monkeypatch.setattr(type(RETRACTIONS["qr"]), "step", lambda *a: step(*a, look=look))
    params = [p for p in framed(dtype) if getattr(p.manifold, "spectrum", "identity") == "identity"]
    optimizer = RiemannianSGD(params, lr=0.05, retraction=retraction, **options)
    run(optimizer, params, spike)
    check(params)


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (RiemannianAdam, {"second_moment": "frame"}),
        (RiemannianAdam, {"second_moment": "frame", "eps": 0.0, "capturable": True}),
        (RiemannianAdam, {"eps": 0.0, "capturable": True}),
        (RiemannianMuon, {}),
        (RiemannianMuon, {"nesterov": False, "weight_decay": 0.1}),
    ],
    ids=str,
)
@pytest.mark.parametrize(("dtype", "spike"), SPIKES)
def test_frames_under_others(cls, options, dtype, spike):
    params = framed(dtype)
    run(cls(params, lr=0.05, **options), params, spike)
    check(params)


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (RiemannianAdam, {"second_moment": "frame", "betas": (0.9, 0.0)}),
        (RiemannianMuon, {"adam_betas": (0.9, 0.0)}),
    ],
)
@pytest.mark.parametrize(("dtype", "spike"), [(torch.float32, 1e30), (torch.float64, 1e200)])
def test_a_second_moment_that_keeps_nothing_forgets_an_overflow(cls, options, dtype, spike):
    params = framed(dtype)
    run(cls(params, lr=0.05, **options), params, spike)
    check(params)


@pytest.mark.parametrize("lr", [0.0, 1e-30])
def test_a_rate_of_zero_is_no_step_however_long(lr):
    params = framed(torch.float32)
    start = [p.detach().clone() for p in params]
    optimizer = RiemannianSGD(params, lr=lr)
    for p in params:
        p.grad = torch.full_like(p, 1e30)
    optimizer.step()
    for p, q in zip(params, start, strict=True):
        assert p.detach().isfinite().all()
        if not lr:
            torch.testing.assert_close(p.detach(), q, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("cls", "options"),
    [(RiemannianAdam, o) for o in ({}, {"amsgrad": True}, {"weight_decay": 0.1})]
    + [(RiemannianSGD, o) for o in SGD[:3]],
    ids=str,
)
@pytest.mark.parametrize(("dtype", "spike"), [s for s in SPIKES if s[0].itemsize > 2])
def test_other_manifolds(cls, options, dtype, spike):
    params = generic(dtype)
    run(cls(params, lr=0.05, **options), params, spike)
    for p in params:
        inside, reason = p.manifold.check_point_on_manifold(p.detach(), explain=True, atol=1e-3)
        assert inside or isinstance(p.manifold, geoopt.EuclideanStiefelExact), reason


def test_gradients_that_are_not_finite_still_show():
    for cls in (RiemannianAdam, RiemannianSGD):
        for value in (torch.inf, torch.nan):
            params = [*framed(torch.float32), generic(torch.float32)[0]]
            optimizer = cls(params, lr=0.1)
            for p in params:
                p.grad = torch.full_like(p, value)
            optimizer.step()
            assert all(p.detach().isnan().any() for p in params)


# --- Half precision. ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_moments_of_half_precision_are_kept_in_float32(dtype, amsgrad):
    params = framed(dtype)
    optimizer = RiemannianAdam(params, lr=0.05, amsgrad=amsgrad)
    run(optimizer, params, 300.0)
    twins = copy.deepcopy(params)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    resumed = RiemannianAdam(twins, lr=9.0)
    resumed.load_state_dict(torch.load(buffer))
    for p, q in zip(params, twins, strict=True):
        for name, value in optimizer.state[p].items():
            assert value.dtype == torch.float32
            assert torch.equal(resumed.state[q][name], value), name
    run(optimizer, params, 1.0)
    run(resumed, twins, 1.0)
    for p, q in zip(params, twins, strict=True):
        assert torch.equal(p.detach(), q.detach())


def test_a_state_in_half_precision_is_taken_up():
    """As it was saved before."""
    params = framed(torch.bfloat16)
    optimizer = RiemannianAdam(params, lr=0.05)
    run(optimizer, params, 1.0)
    state = copy.deepcopy(optimizer.state_dict())
    for moments in state["state"].values():
        for name in ("exp_avg", "exp_avg_sq"):
            moments[name] = moments[name].bfloat16()
    optimizer.load_state_dict(state)
    run(optimizer, params, 1e19)
    check(params)
    assert all(s["exp_avg_sq"].dtype == torch.float32 for s in optimizer.state.values())


def test_a_momentum_of_half_precision_does_not_overflow_where_the_sum_would():
    params = framed(torch.float16)[2:]
    optimizer = RiemannianSGD(params, lr=1e-6, momentum=0.9)
    for _ in range(8):
        for p in params:
            p.grad = torch.full_like(p, 3e4)
        optimizer.step()
    assert all(s["momentum_buffer"].dtype == torch.float32 for s in optimizer.state.values())
    check(params)
