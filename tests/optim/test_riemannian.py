"""The step on manifolds: against geoopt, against the formulas, and on the manifold for good."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spectral_points import SHAPE, frame_error, points

from sttp_manifold._geoopt import (
    Euclidean,
    EuclideanStiefel,
    ManifoldParameter,
    ProductManifold,
    geoopt,
)
from sttp_manifold.manifolds.spectral_tt import SpectralTTManifold
from sttp_manifold.optim import RiemannianAdam, RiemannianSGD

SPECTRA = ("identity", "free", "normalized", "bounded", "full", "fixed")


def quadratic(M, seed=1):
    """A cost of the weight whose minimum is not reached: gradients stay."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(SHAPE.d_out, SHAPE.d_in, dtype=torch.float64, generator=generator)

    def cost(x):
        return (M.unpack(x).to_matrix() - target.to(x.dtype)).square().sum()

    return cost


def run(optimizer, params, cost, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        cost().backward()
        optimizer.step()
    return [p.detach().clone() for p in params]


def tangent_error(M, x, u):
    return (M.proju(x, u) - u).abs().max().item()


# --- Against geoopt, the outside judge. ---


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("lr", [1e-3, 0.3])
def test_adam_is_geoopts_over_its_own_product(spectrum, batch, amsgrad, lr):
    M, x = points(spectrum, *batch)
    theirs = ProductManifold(*zip(M.manifolds, M.shapes, strict=True))
    y = ManifoldParameter(x.detach().clone(), manifold=theirs)
    cost = quadratic(M)
    ours = RiemannianAdam([x], lr=lr, amsgrad=amsgrad, retraction="qr", second_moment="frame")
    (a,) = run(ours, [x], lambda: cost(x), 60)
    (b,) = run(geoopt.optim.RiemannianAdam([y], lr=lr, amsgrad=amsgrad), [y], lambda: cost(y), 60)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", [(6, 3), (2, 5, 5), (4, 1), (2, 3, 7, 2)])
@pytest.mark.parametrize("foreach", [None, False])
def test_adam_is_geoopts_on_single_frames(shape, foreach):
    target = torch.randn(shape, dtype=torch.float64)
    start = torch.linalg.qr(torch.randn(shape, dtype=torch.float64))[0].contiguous()
    ends = []
    for cls, options in (
        (RiemannianAdam, {"foreach": foreach, "retraction": "qr", "second_moment": "frame"}),
        (geoopt.optim.RiemannianAdam, {}),
    ):
        # Three of one shape and one transposed in memory: batched, and not contiguous.
        params = [ManifoldParameter(start.clone(), manifold=EuclideanStiefel()) for _ in range(3)]
        odd = ManifoldParameter(
            start.mT.clone(memory_format=torch.contiguous_format).mT, manifold=EuclideanStiefel()
        )
        params.append(odd)

        def cost(params=params):
            return sum((k + 1) * (p - target).square().sum() for k, p in enumerate(params))

        ends.append(run(cls(params, lr=0.05, **options), params, cost, 40))
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", ["Sphere", "PoincareBall", "EuclideanStiefelExact", "Stiefel"])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_adam_is_geoopts_on_its_other_manifolds(name, amsgrad):
    manifold = getattr(geoopt, name)()
    start = manifold.projx(0.3 * torch.randn(5, 3, dtype=torch.float64))
    target = torch.randn(5, 3, dtype=torch.float64)
    ends = []
    for cls in (RiemannianAdam, geoopt.optim.RiemannianAdam):
        p = ManifoldParameter(start.clone(), manifold=manifold)
        optimizer = cls([p], lr=0.05, amsgrad=amsgrad)
        ends += run(optimizer, [p], lambda p=p: (p - target).square().sum(), 30)
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-14)


def test_sgd_without_momentum_is_geoopts():
    M, x = points("free")
    y = ManifoldParameter(
        x.detach().clone(),
        manifold=ProductManifold(*zip(M.manifolds, M.shapes, strict=True)),
    )
    cost = quadratic(M)
    (a,) = run(RiemannianSGD([x], lr=0.01, retraction="qr"), [x], lambda: cost(x), 60)
    (b,) = run(geoopt.optim.RiemannianSGD([y], lr=0.01), [y], lambda: cost(y), 60)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_the_trajectory_is_the_same_alone_batched_and_beside_others():
    cost = quadratic(SpectralTTManifold(SHAPE))
    for cls, options in ((RiemannianAdam, {}), (RiemannianSGD, {"momentum": 0.9})):
        ends = {}
        for foreach in (None, False):
            params = [points(seed=s)[1] for s in range(3)]
            params.append(torch.nn.Parameter(torch.ones(3, dtype=torch.float64)))
            optimizer = cls(params, lr=0.01, foreach=foreach, **options)
            ends[foreach] = run(
                optimizer,
                params,
                lambda p=params: sum(map(cost, p[:3])) + p[3].square().sum(),
                20,
            )
        _, alone = points(seed=1)
        ends["alone"] = run(cls([alone], lr=0.01, **options), [alone], lambda p=alone: cost(p), 20)
        torch.testing.assert_close(ends[None], ends[False], rtol=0, atol=1e-12)
        torch.testing.assert_close(ends[None][1], ends["alone"][0], rtol=0, atol=1e-12)


def test_parameters_that_joined_later_keep_their_own_count():
    """One without a gradient for a while has another bias correction, in the same batch."""
    ends = []
    for together in (True, False):
        params = [points(seed=s)[1] for s in range(2)]
        cost = quadratic(SpectralTTManifold(SHAPE))
        groups = [params] if together else [[p] for p in params]
        optimizers = [RiemannianAdam(g, lr=0.01) for g in groups]
        for step in range(8):
            for i, p in enumerate(params):
                p.grad = None
                if i == 0 or step >= 3:
                    cost(p).backward()
            for optimizer in optimizers:
                optimizer.step()
        ends.append([p.detach() for p in params])
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-13)


# --- Against the formulas, written the slow way. ---


def lapack(Z):
    Q, R = torch.linalg.qr(Z)
    return Q * torch.sign(R.diagonal())


def sym(A):
    return (A + A.T) / 2


def reference_sgd(M, x, grads, lr, momentum, dampening, nesterov, weight_decay):
    """SGD frame by frame; the gradients are given, one a step."""
    x, buffers = x.clone(), None
    for grad in grads:
        decay = weight_decay * M.weight_decay_grad(x)
        new, carried = x.clone(), torch.zeros_like(x)
        for i, (slc, shape) in enumerate(zip(M.slices, M.shapes, strict=True)):
            frame = isinstance(M.manifolds[i], EuclideanStiefel)
            X, G = x[slc].view(shape), (grad + decay)[slc].view(shape)
            g = G - X @ sym(X.T @ G) if frame else G
            b = g
            if momentum:
                if buffers is not None:
                    b = momentum * buffers[slc].view(shape) + (1 - dampening) * g
                direction = g + momentum * b if nesterov else b
            else:
                direction = g
            Y = lapack(X - lr * direction) if frame else X - lr * direction
            new[slc] = Y.flatten()
            carried[slc] = (b - Y @ sym(Y.T @ b) if frame else b).flatten()
        x, buffers = new, carried
    return x


@pytest.mark.parametrize("spectrum", ["identity", "free", "bounded", "full"])
@pytest.mark.parametrize(
    ("momentum", "dampening", "nesterov"),
    [(0.0, 0.0, False), (0.9, 0.0, False), (0.9, 0.4, False), (0.9, 0.0, True)],
)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_sgd_follows_its_formulas(spectrum, momentum, dampening, nesterov, weight_decay):
    M, x = points(spectrum)
    grads = torch.randn(12, M.n_elements, dtype=torch.float64)
    expected = reference_sgd(M, x.detach(), grads, 0.1, momentum, dampening, nesterov, weight_decay)
    optimizer = RiemannianSGD(
        [x],
        lr=0.1,
        momentum=momentum,
        dampening=dampening,
        nesterov=nesterov,
        weight_decay=weight_decay,
        retraction="qr",
    )
    for grad in grads:
        x.grad = grad.clone()
        optimizer.step()
    torch.testing.assert_close(x.detach(), expected, rtol=0, atol=1e-12)


def test_sgd_on_a_sphere_starts_its_momentum_as_torch_does():
    manifold = geoopt.Sphere()
    x = ManifoldParameter(manifold.projx(torch.randn(4, dtype=torch.float64)), manifold=manifold)
    start, grad = x.detach().clone(), torch.randn(4, dtype=torch.float64)
    x.grad = grad.clone()
    RiemannianSGD([x], lr=0.1, momentum=0.9, dampening=0.5).step()
    expected = manifold.retr(start, -0.1 * manifold.egrad2rgrad(start, grad))
    torch.testing.assert_close(x.detach(), expected)


@given(
    spectrum=st.sampled_from(SPECTRA),
    seed=st.integers(0, 99),
    lr=st.floats(1e-4, 3.0),
    options=st.fixed_dictionaries(
        {"amsgrad": st.booleans(), "maximize": st.booleans(), "weight_decay": st.floats(0, 1)}
    ),
)
@settings(max_examples=25)
def test_adam_stays_on_the_manifold_with_tangent_momentum(spectrum, seed, lr, options):
    M, x = points(spectrum, seed=seed)
    optimizer = RiemannianAdam([x], lr=lr, **options)
    for _ in range(4):
        x.grad = torch.randn_like(x)
        kept = x.grad.clone()
        optimizer.step()
        assert torch.equal(x.grad, kept)
        assert frame_error(x) < 1e-13
        momentum = optimizer.state[x]["exp_avg"]
        assert tangent_error(M, x.detach(), momentum) < 1e-13 * (1 + momentum.abs().max())


@given(spectrum=st.sampled_from(SPECTRA), seed=st.integers(0, 99), nesterov=st.booleans())
@settings(max_examples=15)
def test_sgd_stays_on_the_manifold_with_tangent_momentum(spectrum, seed, nesterov):
    M, x = points(spectrum, seed=seed)
    optimizer = RiemannianSGD([x], lr=0.3, momentum=0.9, nesterov=nesterov, weight_decay=0.1)
    for _ in range(4):
        x.grad = torch.randn_like(x)
        kept = x.grad.clone()
        optimizer.step()
        assert torch.equal(x.grad, kept)
        assert frame_error(x) < 1e-13
        buffer = optimizer.state[x]["momentum_buffer"]
        assert tangent_error(M, x.detach(), buffer) < 1e-13 * (1 + buffer.abs().max())


# --- Weight decay. ---


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("cls", [RiemannianAdam, RiemannianSGD])
def test_weight_decay_is_the_penalty_on_the_weight(spectrum, cls):
    """The same trajectory as with the penalty written into the loss."""
    M, x = points(spectrum)
    y = copy.deepcopy(x)
    cost = quadratic(M)

    def penalized(p):
        return cost(p) + 0.3 * M.unpack(p).to_matrix().square().sum() / 2

    (a,) = run(cls([x], lr=0.01, weight_decay=0.3), [x], lambda: cost(x), 25)
    (b,) = run(cls([y], lr=0.01), [y], lambda: penalized(y), 25)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("decoupled", [False, True])
def test_weight_decay_leaves_frames_alone_and_shrinks_the_spectrum(decoupled):
    M, x = points("free")
    start = x.detach().clone()
    optimizer = RiemannianAdam([x], lr=0.01, weight_decay=0.1, decoupled_weight_decay=decoupled)
    for _ in range(10):
        x.grad = torch.zeros_like(x)
        optimizer.step()
    s = M.spectrum_slice
    torch.testing.assert_close(x.detach()[: s.start], start[: s.start], rtol=0, atol=1e-14)
    assert (x.detach()[s].abs() < start[s].abs()).all()
    if decoupled:
        torch.testing.assert_close(x.detach()[s], start[s] * (1 - 0.01 * 0.1) ** 10)


def test_decoupled_decay_of_a_spectrum_is_adamw():
    M, x = points("free")
    s = M.spectrum_slice
    theta = torch.nn.Parameter(x.detach()[s].clone())
    ours = RiemannianAdam([x], lr=0.05, weight_decay=0.2, decoupled_weight_decay=True)
    theirs = torch.optim.AdamW([theta], lr=0.05, weight_decay=0.2)
    for step in range(20):
        generator = torch.Generator().manual_seed(step)
        x.grad = torch.randn(x.shape, dtype=x.dtype, generator=generator)
        theta.grad = x.grad[s].clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(x.detach()[s], theta.detach(), rtol=0, atol=1e-13)


@pytest.mark.parametrize("decoupled", [False, True])
def test_weight_decay_on_other_manifolds(decoupled):
    manifold = geoopt.PoincareBall()
    x = ManifoldParameter(torch.tensor([0.5, 0.3], dtype=torch.float64), manifold=manifold)
    optimizer = RiemannianAdam([x], lr=0.01, weight_decay=1.0, decoupled_weight_decay=decoupled)
    start = x.detach().norm()
    for _ in range(5):
        x.grad = torch.zeros_like(x)
        optimizer.step()
    assert x.detach().norm() < start


def test_weight_decay_of_single_frames_does_nothing():
    M = EuclideanStiefel()
    for cls, options in ((RiemannianAdam, {}), (RiemannianSGD, {"momentum": 0.9})):
        x = ManifoldParameter(M.random(6, 3, dtype=torch.float64), manifold=M)
        start = x.detach().clone()
        optimizer = cls([x], lr=0.1, weight_decay=0.5, **options)
        for _ in range(5):
            x.grad = torch.zeros_like(x)
            optimizer.step()
        torch.testing.assert_close(x.detach(), start, rtol=0, atol=1e-14)


# --- The interface of a torch optimizer. ---


def test_drop_in_for_geoopts():
    _, x = points()
    adam, sgd = RiemannianAdam([x]), RiemannianSGD([x], 0.1)
    assert isinstance(adam, (geoopt.optim.RiemannianAdam, torch.optim.Adam))
    assert isinstance(adam, geoopt.optim.RiemannianAdam)
    assert isinstance(adam, torch.optim.Adam)
    assert isinstance(sgd, geoopt.optim.RiemannianSGD)
    assert isinstance(sgd, torch.optim.SGD)
    assert isinstance(adam, geoopt.optim.mixin.OptimMixin)
    RiemannianAdam([x], 1e-3, (0.9, 0.99), 1e-8, 0.1, True, stabilize=10)
    sgd = RiemannianSGD([x], 0.1, 0.9, 0.0, 0.1, True, stabilize=7)
    assert sgd.param_groups[0]["stabilize"] == 7


def test_not_finite_gradients_give_nan_and_no_error():
    for value in (float("nan"), float("inf")):
        for cls in (RiemannianAdam, RiemannianSGD):
            M, x = points()
            x.grad = torch.full_like(x, value)
            optimizer = cls([x], lr=0.1)
            optimizer.step()
            optimizer.step()
            assert x.detach()[: M.spectrum_slice.start].isnan().any()


# --- Stabilizing. ---


@pytest.mark.parametrize("cls", [RiemannianAdam, RiemannianSGD])
@pytest.mark.parametrize("kind", ["ours", "stiefel", "sphere"])
def test_stabilize_puts_points_back_and_momentum_with_them(cls, kind):
    if kind == "ours":
        manifold, x = points()
    else:
        manifold = EuclideanStiefel() if kind == "stiefel" else geoopt.Sphere()
        x = ManifoldParameter(
            manifold.projx(torch.randn(5, 3, dtype=torch.float64)), manifold=manifold
        )
    options = {"momentum": 0.9} if cls is RiemannianSGD else {}
    plain = torch.nn.Parameter(torch.ones(3))
    optimizer = cls([x, plain], lr=0.1, **options)
    x.grad = torch.randn_like(x)
    optimizer.step()
    with torch.no_grad():
        x.add_(torch.randn_like(x), alpha=0.01)
    drifted = x.detach().clone()
    optimizer.stabilize()
    torch.testing.assert_close(x.detach(), manifold.projx(drifted), rtol=0, atol=1e-12)
    assert manifold.check_point_on_manifold(x.detach(), atol=1e-12)
    momentum = optimizer.state[x][optimizer._momentum_key]
    torch.testing.assert_close(manifold.proju(x.detach(), momentum), momentum)
    assert torch.equal(plain.detach(), torch.ones(3))


@pytest.mark.parametrize("cls", [RiemannianAdam, RiemannianSGD])
def test_stabilize_before_any_step(cls):
    _, x = points()
    with torch.no_grad():
        x.mul_(1.01)
    cls([x], lr=0.1).stabilize()
    assert frame_error(x) < 1e-13


# --- For good. ---


@pytest.mark.parametrize(
    ("cls", "options"), [(RiemannianAdam, {"lr": 0.03}), (RiemannianSGD, {"lr": 0.2})]
)
def test_it_optimizes(cls, options):
    """Most of a matrix that the format holds is found from a random start."""
    M, x = points("free", seed=5)
    target = M.unpack(points("free", seed=6)[1]).to_matrix().detach()

    def cost():
        return (M.unpack(x).to_matrix() - target).square().sum()

    optimizer = cls([x], **options)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 500)
    start = cost().item()
    for _ in range(500):
        run(optimizer, [x], cost, 1)
        scheduler.step()
    assert cost().item() < 5e-2 * start


def test_plain_and_all_kinds_of_manifold_parameters_in_one_group():
    _, x = points()
    sphere = geoopt.Sphere()
    params = [
        torch.nn.Parameter(torch.randn(3, dtype=torch.float64)),
        x,
        ManifoldParameter(sphere.projx(torch.randn(4, dtype=torch.float64)), manifold=sphere),
        ManifoldParameter(EuclideanStiefel().random(5, 2, dtype=torch.float64)),
        ManifoldParameter(torch.randn(2, dtype=torch.float64), manifold=Euclidean()),
    ]
    grads = [torch.randn_like(p) for p in params]
    for cls in (RiemannianAdam, RiemannianSGD):
        together, apart = copy.deepcopy(params), copy.deepcopy(params)
        optimizers = [cls(together, lr=0.1), *(cls([p], lr=0.1) for p in apart)]
        for p, g in zip(itertools.chain(together, apart), grads * 2, strict=True):
            p.grad = g.clone()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.step()
        for p, q, start in zip(together, apart, params, strict=True):
            assert torch.equal(p.detach(), q.detach())
            assert not torch.equal(p.detach(), start.detach())
