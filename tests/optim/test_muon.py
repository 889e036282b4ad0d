"""RiemannianMuon: the angle of a step, its formulas the slow way, and torch's optimizers beside."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from spectral_points import frame_error, points, put_gradients

from sttp_manifold._geoopt import EuclideanStiefel, ManifoldParameter, geoopt
from sttp_manifold.errors import OptimizerError
from sttp_manifold.optim import RiemannianAdam, RiemannianMuon, muon
from sttp_manifold.optim._direction import POLYNOMIALS

SPECTRA = ("identity", "free", "normalized", "bounded", "full", "fixed")
FRAMES = [(40, 8), (16, 8), (9, 8), (8, 8), (7, 7), (12, 4), (64, 3), (5, 1), (1, 1), (2, 2)]


def frame(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    start = torch.linalg.qr(torch.randn(*shape, dtype=torch.float64, generator=generator))[0]
    return ManifoldParameter(start.contiguous().to(dtype), manifold=EuclideanStiefel())


def sphere_point(dtype=torch.float64):
    manifold = geoopt.Sphere()
    return ManifoldParameter(manifold.projx(torch.ones(4, dtype=dtype)), manifold=manifold)


# --- The rate is an angle. ---


def angles(X, Y):
    """The largest by which a unit vector of coordinates turns, and between the two spans."""
    aligned = X.mT @ Y
    cosine = float(torch.linalg.eigvalsh((aligned + aligned.mT) / 2)[0])
    between = scipy.linalg.subspace_angles(X.numpy(), Y.numpy()).max()
    return math.acos(min(max(cosine, -1.0), 1.0)), float(between)


@pytest.mark.parametrize("retraction", ["newton_schulz", "qr", "polar", "cayley"])
@pytest.mark.parametrize("shape", FRAMES)
@pytest.mark.parametrize("lr", [1e-3, 0.03, 0.3])
def test_a_step_turns_by_its_rate(shape, retraction, lr):
    x = frame(*shape)
    start = x.detach().clone()
    put_gradients([x], 1)
    RiemannianMuon([x], lr=lr, retraction=retraction).step()
    turned, between = angles(start, x.detach())
    if shape == (1, 1):
        assert torch.equal(start, x.detach())
        return
    # By a Cayley transform to second order; by the others too where columns turn unequally, and by
    # the Q factor then to first order.
    first_order = lr / 20 if retraction == "qr" else 0
    assert turned == pytest.approx(lr, rel=5e-4 + lr**2 / 4 + first_order)
    second_order = lr**2 / 4 if retraction == "cayley" else 0
    assert between <= lr * (1 + 5e-4 + second_order)
    if shape[1] == 1:
        assert between == pytest.approx(lr, rel=5e-4 + second_order)


@pytest.mark.parametrize("lr", [0.5, 1.0, 1.5])
def test_long_steps_too(lr):
    x = frame(12, 4)
    start = x.detach().clone()
    put_gradients([x], 1)
    RiemannianMuon([x], lr=lr).step()
    assert angles(start, x.detach())[0] == pytest.approx(lr, rel=5e-4)
    assert frame_error(x) < 1e-13


def test_all_frames_of_a_weight_turn_by_the_same_angle():
    M, x = points()
    start = x.detach().clone()
    put_gradients([x], 1)
    RiemannianMuon([x], lr=0.1).step()
    for span, count, d, r in M.frame_groups:
        if d == r == 1:
            continue
        for X, Y in zip(
            start[span].view(count, d, r), x.detach()[span].view(count, d, r), strict=True
        ):
            assert angles(X, Y)[0] == pytest.approx(0.1, rel=3e-3)


# --- Against the formulas, written the slow way. ---


def sym(A):
    return (A + A.mT) / 2


def polar_factor(Z):
    U, _, Vt = torch.linalg.svd(Z, full_matrices=False)
    return U @ Vt


def reference(M, x, grads, lr, mu, nesterov, adam_lr, betas, eps, decay):
    """Frame by frame with singular value decompositions; the spectrum by torch's AdamW."""
    frames = x.detach().clone()
    part = M.spectrum_slice
    theta = torch.nn.Parameter(frames[part].clone())
    adam = torch.optim.AdamW([theta], lr=adam_lr, betas=betas, eps=eps, weight_decay=decay)
    momenta = torch.zeros_like(frames)
    for grad in grads:
        for span, count, d, r in M.frame_groups:
            for k in range(count):
                at = slice(span.start + k * d * r, span.start + (k + 1) * d * r)
                X, G = frames[at].view(d, r), grad[at].view(d, r)
                G = G - X @ sym(X.mT @ G)
                m = mu * momenta[at].view(d, r) + (1 - mu) * G
                u = mu * m + (1 - mu) * G if nesterov else m
                omega = u @ X.mT - X @ u.mT
                U, s, Vt = torch.linalg.svd(omega)
                # What the polynomials make of one singular value after the other.
                s = s / (s**4).sum().div(2) ** 0.25
                for a, b, c in POLYNOMIALS:
                    s = a * s + b * s**3 + c * s**5
                D = (U * s) @ Vt @ X
                Y = polar_factor(X - math.tan(lr) * D)
                frames[at] = Y.flatten()
                momenta[at] = (m - Y @ sym(Y.mT @ m)).flatten()
        theta.grad = grad[part].clone()
        adam.step()
    frames[part] = theta.detach()
    return frames


@pytest.mark.parametrize(("mu", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_it_follows_its_formulas(mu, nesterov, decay):
    M, x = points()
    grads = torch.randn(8, M.n_elements, dtype=torch.float64)
    settings = dict(adam_lr=0.02, adam_betas=(0.8, 0.95), adam_eps=1e-3, weight_decay=decay)
    expected = reference(M, x, grads, 0.1, mu, nesterov, 0.02, (0.8, 0.95), 1e-3, decay)
    optimizer = RiemannianMuon([x], lr=0.1, momentum=mu, nesterov=nesterov, **settings)
    for grad in grads:
        x.grad = grad.clone()
        optimizer.step()
    torch.testing.assert_close(x.detach(), expected, rtol=0, atol=1e-9)
    part = M.spectrum_slice
    torch.testing.assert_close(x.detach()[part], expected[part], rtol=0, atol=1e-13)


@given(
    spectrum=st.sampled_from(SPECTRA),
    seed=st.integers(0, 99),
    lr=st.floats(1e-4, 1.5),
    options=st.fixed_dictionaries(
        {"nesterov": st.booleans(), "maximize": st.booleans(), "weight_decay": st.floats(0, 1)}
    ),
)
def test_it_stays_on_the_manifold_with_tangent_momentum(spectrum, seed, lr, options):
    M, x = points(spectrum, 2, seed=seed)
    optimizer = RiemannianMuon([x], lr=lr, adam_lr=1e-2, **options)
    for step in range(4):
        put_gradients([x], seed + step)
        optimizer.step()
    momentum = optimizer.state[x]["exp_avg"]
    assert frame_error(x) < 1e-12
    assert float((M.proju(x.detach(), momentum) - momentum).abs().max()) < 1e-12


# --- What is no frame. ---


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("rate", [1e-2, None, torch.tensor(1e-2)])
def test_plain_parameters_move_by_adamw_bit_for_bit(decay, rate):
    plain = [torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(5))]
    twins = copy.deepcopy(plain)
    optimizer = RiemannianMuon([*plain, points()[1]], lr=1e-2, adam_lr=rate, weight_decay=decay)
    torchs = torch.optim.AdamW(twins, lr=rate or 1e-2, weight_decay=decay)
    for step in range(5):
        put_gradients(plain, step)
        put_gradients(twins, step)
        optimizer.step()
        torchs.step()
    for p, q in zip(plain, twins, strict=True):
        assert torch.equal(p, q)


def test_other_manifolds_move_by_riemannian_adam():
    x = sphere_point()
    y = copy.deepcopy(x)
    optimizer = RiemannianMuon([x], lr=0.3, adam_lr=1e-2, adam_betas=(0.8, 0.9))
    adam = RiemannianAdam([y], lr=1e-2, betas=(0.8, 0.9))
    for step in range(5):
        put_gradients([x], step)
        put_gradients([y], step)
        optimizer.step()
        adam.step()
    assert torch.equal(x.detach(), y.detach())


def test_the_weight_decays_through_its_spectrum():
    M, x = points()
    before = M.unpack(x).to_matrix().detach()
    x.grad = torch.zeros_like(x)
    RiemannianMuon([x], lr=0.03, adam_lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(M.unpack(x).to_matrix().detach(), 0.95 * before)


needs_torch_muon = pytest.mark.skipif(muon.torch_muon is None, reason="torch before 2.9")


@needs_torch_muon
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_plain_matrices_move_by_torchs_muon_if_asked_for(nesterov, decay):
    matrices = [torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(6, 9))]
    bias = torch.nn.Parameter(torch.randn(5))
    twins = copy.deepcopy([*matrices, bias])
    settings = dict(momentum=0.9, nesterov=nesterov, weight_decay=decay)
    optimizer = RiemannianMuon(
        [*matrices, bias, points()[1]], lr=0.02, adam_lr=1e-3, plain_matrices="muon", **settings
    )
    torchs = [
        torch.optim.Muon(twins[:2], lr=0.02, **settings),
        torch.optim.AdamW(twins[2:], lr=1e-3, weight_decay=decay),
    ]
    for step in range(5):
        put_gradients([*matrices, bias], step)
        put_gradients(twins, step)
        optimizer.step()
        for other in torchs:
            other.step()
    for p, q in zip([*matrices, bias], twins, strict=True):
        assert torch.equal(p, q)


def test_a_torch_without_muon_is_named(monkeypatch):
    monkeypatch.setattr("sttp_manifold.optim._muon_settings.torch_muon", None)
    p = torch.nn.Parameter(torch.ones(2, 2))
    with pytest.raises(OptimizerError, match=r"torch\.optim\.Muon, but torch .* has none; install"):
        RiemannianMuon([p], plain_matrices="muon")
    RiemannianMuon([p])


# --- Rates that change. ---


def rates(optimizer, x, steps, scheduler=None):
    """How far a spectrum and the frames move, a step each."""
    M, moved = x.manifold, []
    for step in range(steps):
        before = x.detach().clone()
        put_gradients([x], step)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        change = (x.detach() - before).abs()
        span = M.frame_groups[0].span
        moved.append((float(change[M.spectrum_slice].max()), float(change[span].max())))
    return np.array(moved)


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=20),
    ],
)
def test_a_schedule_moves_both_rates_alike(make):
    """Adam with beta1 = 0 and beta2 = 0 moves by its rate exactly."""
    optimizer = RiemannianMuon(
        [points()[1]], lr=0.1, adam_lr=0.02, adam_betas=(0.0, 0.0), adam_eps=0.0
    )
    scheduler = make(optimizer)
    x = optimizer.param_groups[0]["params"][0]
    for step in range(8):
        rate = optimizer.param_groups[0]["lr"]
        moved = rates(optimizer, x, 1)[0]
        assert moved[0] == pytest.approx(0.2 * rate, rel=1e-9), step
        scheduler.step()


def test_without_a_rate_of_its_own_adam_takes_lr():
    _, x = points()
    optimizer = RiemannianMuon([x], lr=0.05, adam_betas=(0.0, 0.0), adam_eps=0.0)
    assert rates(optimizer, x, 1)[0, 0] == pytest.approx(0.05, rel=1e-9)


def test_frames_may_rest_while_adam_moves():
    _, x = points()
    optimizer = RiemannianMuon([x], lr=0.0, adam_lr=0.02, adam_betas=(0.0, 0.0), adam_eps=0.0)
    moved = rates(optimizer, x, 2)
    np.testing.assert_allclose(moved[:, 0], 0.02, rtol=1e-9)
    np.testing.assert_allclose(moved[:, 1], 0, atol=1e-14)


@pytest.mark.parametrize("capturable", [False, True])
def test_rates_may_be_tensors(capturable):
    ends = []
    for make in (float, lambda v: torch.tensor(v, dtype=torch.float64)):
        x, F = points()[1], frame(9, 4)
        optimizer = RiemannianMuon(
            [x, F], lr=make(0.1), adam_lr=make(0.02), weight_decay=0.1, capturable=capturable
        )
        for step in range(4):
            put_gradients([x, F], step)
            optimizer.step()
            optimizer.param_groups[0]["lr"] *= 0.5  # a tensor in place
        ends.append(torch.cat([x.detach(), F.detach().flatten()]))
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-12)


# --- Sizes of gradients. ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-20, 1e-10, 1e10, 1e20])
def test_frames_move_alike_for_gradients_of_any_size(scale, dtype):
    ends = []
    for size in (1.0, scale):
        params = [frame(*shape, dtype=dtype) for shape in FRAMES]
        optimizer = RiemannianMuon(params, lr=0.03)
        for step in range(5):
            put_gradients(params, step, size)
            optimizer.step()
        ends.append([p.detach() for p in params])
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3 if dtype == torch.float32 else 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_gradients_are_no_step(dtype):
    params = [points(dtype=dtype)[1], *(frame(*shape, dtype=dtype) for shape in FRAMES)]
    start = [p.detach().clone() for p in params]
    optimizer = RiemannianMuon(params, lr=0.1)
    for _ in range(3):
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    for p, q in zip(params, start, strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=0, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_errors_of_a_normal_gradient_are_no_step(dtype):
    """At a minimum on the manifold the gradient is normal, and not zero."""
    params = [frame(*shape, dtype=dtype) for shape in FRAMES]
    start = [p.detach().clone() for p in params]
    for p in params:
        S = torch.randn(p.shape[-1], p.shape[-1], dtype=dtype)
        p.grad = p.detach() @ (S + S.mT)
    RiemannianMuon(params, lr=0.1).step()
    for p, q in zip(params, start, strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=0, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_spike_that_is_finite_leaves_frames_finite(dtype):
    params = [frame(*shape, dtype=dtype) for shape in FRAMES]
    optimizer = RiemannianMuon(params, lr=0.1)
    for size in (1.0, torch.finfo(dtype).max, 1.0):
        for p in params:
            p.grad = (torch.rand_like(p) - 0.5) * 2 * size
        optimizer.step()
    for p in params:
        assert frame_error(p) < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_steps_of_half_precision_are_those_of_float32_rounded(dtype):
    params = [points(dtype=dtype)[1], *(frame(*shape, dtype=dtype) for shape in FRAMES)]
    twins = [ManifoldParameter(p.detach().float(), manifold=p.manifold) for p in params]
    optimizers = [RiemannianMuon(ps, lr=0.05, adam_lr=1e-2) for ps in (params, twins)]
    smallest = 2.0**-24 if dtype == torch.float16 else 1e-30
    for step, scale in enumerate((1.0, 1e4, 30 * smallest)):
        put_gradients(params, step, scale)
        for p, q in zip(params, twins, strict=True):
            q.data.copy_(p.data)
            q.grad = p.grad.float()
        for optimizer in optimizers:
            with torch.autocast("cpu"):
                optimizer.step()
        for p, q in zip(params, twins, strict=True):
            assert torch.equal(p.detach(), q.detach().to(dtype))
            moment = optimizers[0].state[p]["exp_avg"]
            assert moment.dtype == torch.float32
            assert torch.equal(moment, optimizers[1].state[q]["exp_avg"])


def test_not_finite_gradients_give_nan_and_no_error():
    for bad in (math.nan, math.inf):
        x, F = points()[1], frame(9, 4)
        x.grad, F.grad = torch.full_like(x, bad), torch.full_like(F, bad)
        RiemannianMuon([x, F], lr=0.1).step()
        assert x.isnan().all()
        assert F.isnan().all()


# --- How a step is computed, and what is refused; tests/contracts has the other laws. ---


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("retraction", ["newton_schulz", "qr", "polar", "cayley"])
def test_a_step_asks_for_no_value(retraction, capturable):
    params = []
    for p in (points()[1], points("bounded", 2)[1], frame(2, 9, 4)):
        q = ManifoldParameter(p.detach().to("meta"), manifold=p.manifold)
        q.grad = torch.empty_like(q.detach())
        params.append(q)
    optimizer = RiemannianMuon(
        params, lr=0.1, weight_decay=0.1, retraction=retraction, capturable=capturable
    )
    for rate in (0.1, torch.empty((), device="meta"), torch.empty((1,), device="meta")):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    optimizer.state_dict()
    optimizer.stabilize()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_step_is_of_products_only(dtype, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("a factorization in a step")

    params = [points(dtype=dtype)[1], *(frame(*shape, dtype=dtype) for shape in FRAMES)]
    for name in ("svd", "svdvals", "eigh", "qr", "cholesky_ex", "solve_triangular", "inv_ex"):
        monkeypatch.setattr(torch.linalg, name, refuse)
    optimizer = RiemannianMuon(params, lr=0.5)
    for step in range(4):
        put_gradients(params, step)
        optimizer.step()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lr": -1.0}, "Invalid learning rate"),
        ({"lr": 1.6}, r"angle of a step in radians, up to pi/2"),
        ({"lr": math.nan}, "Invalid learning rate"),
        ({"adam_lr": -1.0}, r"got adam_lr=-1.0; it takes None, a finite number >= 0"),
        ({"adam_betas": (0.9, 1.0)}, "got adam_betas"),
        ({"adam_eps": math.inf}, "got adam_eps"),
        ({"momentum": 1.0}, r"takes a number in \[0, 1\)"),
        ({"momentum": 0.0}, "Nesterov momentum requires a momentum"),
        ({"weight_decay": -0.1}, "got weight_decay=-0.1"),
        ({"plain_matrices": "sgd"}, "takes 'adam' or 'muon'"),
        ({"retraction": "pogo"}, "Euclidean directions"),
        ({"retraction": "exp"}, "got retraction='exp'"),
        ({"stabilize": 0}, "got stabilize=0"),
        ({"capturable": True, "stabilize": 2}, "cannot honour stabilize=2"),
        ({"capturable": True, "plain_matrices": "muon"}, "together with plain_matrices='muon'"),
    ],
)
def test_settings_that_no_step_can_use(settings, words):
    if settings.get("plain_matrices") == "muon" and muon.torch_muon is None:
        pytest.skip("torch before 2.9")
    _, x = points()
    with pytest.raises(OptimizerError, match=words):
        RiemannianMuon([x], **settings)
    optimizer = RiemannianMuon([torch.nn.Parameter(torch.ones(2))])
    with pytest.raises(OptimizerError, match=words):
        optimizer.add_param_group({"params": [x], **settings})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"betas": (0.9, 0.99)},
        {"eps": 1e-6},
        {"amsgrad": True},
        {"differentiable": True},
        {"decoupled_weight_decay": False},
        {"second_moment": "elementwise"},
    ],
)
def test_settings_of_adam_that_muon_has_not(settings):
    _, x = points()
    with pytest.raises(OptimizerError, match=rf"got {next(iter(settings))}="):
        RiemannianMuon([{"params": [x], **settings}])


@needs_torch_muon
def test_the_rule_of_plain_matrices_may_change():
    p = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = RiemannianMuon([p])
    for rule in ("adam", "muon", "adam", "muon"):
        optimizer.param_groups[0]["plain_matrices"] = rule
        put_gradients([p], 0)
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
    assert p.isfinite().all()


def test_other_manifolds_are_not_captured():
    with pytest.raises(OptimizerError, match="Sphere"):
        RiemannianMuon([sphere_point()], capturable=True)


# --- For good. ---


@pytest.mark.slow
def test_ten_thousand_long_steps_in_float32():
    params = [points(dtype=torch.float32)[1], frame(60, 20, dtype=torch.float32)]
    optimizer = RiemannianMuon(params, lr=1.2, adam_lr=1e-2)
    worst = 0.0
    for step in range(10_000):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
        if step % 50 == 49:
            worst = max(worst, *map(frame_error, params))
    assert worst < 2e-6


def test_it_optimizes():
    """Most of a matrix that the format holds is found from a random start."""
    M, x = points("free", seed=5)
    target = M.unpack(points("free", seed=6)[1]).to_matrix().detach()
    optimizer = RiemannianMuon([x], lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    losses = []
    for _ in range(300):
        optimizer.zero_grad()
        loss = (M.unpack(x).to_matrix() - target).square().sum()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        scheduler.step()
    assert losses[-1] < 5e-2 * losses[0]
