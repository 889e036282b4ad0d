"""The retraction is a choice: each does what it says, in both optimizers, and the state follows."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spectral_points import SHAPE, frame_error, put_gradients

from sttp_manifold._geoopt import EuclideanStiefel, ManifoldParameter, geoopt
from sttp_manifold.errors import OptimizerError
from sttp_manifold.frames import retractions
from sttp_manifold.frames.retractions import RETRACTIONS
from sttp_manifold.manifolds.spectral_tt import SpectralTTManifold
from sttp_manifold.optim import RiemannianAdam, RiemannianSGD
from sttp_manifold.tt.shape import TTShape

OPTIMIZERS = [
    (RiemannianAdam, {}),
    (RiemannianAdam, {"capturable": True}),
    (RiemannianAdam, {"second_moment": "frame"}),
    (RiemannianSGD, {"momentum": 0.9}),
]


def points(count=3, dtype=torch.float64):
    M = SpectralTTManifold(SHAPE)
    generator = torch.Generator().manual_seed(0)
    return M, [M.random_parameter(dtype=dtype, generator=generator) for _ in range(count)]


def stiefel(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    start = torch.linalg.qr(torch.randn(shape, dtype=torch.float64, generator=generator))[0]
    return ManifoldParameter(start.contiguous(), manifold=EuclideanStiefel())


# --- What each does. ---


@pytest.mark.parametrize("name", RETRACTIONS)
@given(seed=st.integers(0, 99), lr=st.floats(1e-4, 0.5), d=st.integers(2, 9), data=st.data())
@settings(max_examples=12)
def test_a_step_of_sgd_is_the_retraction_of_the_gradient(name, seed, lr, d, data):
    r = data.draw(st.integers(1, d))
    params = [stiefel(2, d, r, seed=seed), stiefel(d, r, seed=seed + 1)]
    put_gradients(params, seed)
    starts = [p.detach().clone() for p in params]
    RiemannianSGD(params, lr=lr, retraction=name).step()
    map_ = retractions.RETRACTIONS[name].along
    for p, X in zip(params, starts, strict=True):
        G = p.grad if name == "pogo" else retractions.project_tangent(X, p.grad)
        torch.testing.assert_close(p.detach(), map_(X, -lr * G), rtol=0, atol=1e-12)


def reference_adam(X, grads, lr, betas, eps, name):
    """One frame, written the slow way."""
    m, v = torch.zeros_like(X), 0.0
    map_ = retractions.RETRACTIONS[name].along
    for t, G in enumerate(grads, start=1):
        g = G if name == "pogo" else retractions.project_tangent(X, G)
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g.square().sum()
        step = -lr / (1 - betas[0] ** t) * m / ((v / (1 - betas[1] ** t)).sqrt() + eps)
        X = map_(X, step)
        if name != "pogo":
            m = retractions.project_tangent(X, m)
    return X


@pytest.mark.parametrize("name", RETRACTIONS)
@pytest.mark.parametrize("lr", [1e-3, 0.1])
def test_adam_follows_its_formulas(name, lr):
    x = stiefel(7, 3)
    grads = torch.randn(15, 7, 3, dtype=torch.float64)
    expected = reference_adam(x.detach(), grads, lr, (0.9, 0.99), 1e-8, name)
    optimizer = RiemannianAdam(
        [x], lr=lr, betas=(0.9, 0.99), retraction=name, second_moment="frame"
    )
    for G in grads:
        x.grad = G.clone()
        optimizer.step()
    torch.testing.assert_close(x.detach(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["newton_schulz", "qr", "cayley"])
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_elementwise_second_moments_follow_their_formulas(name, capturable, amsgrad):
    x, y = stiefel(7, 3), stiefel(5, 3, seed=1)  # padded into one stack
    optimizer = RiemannianAdam(
        [x, y], lr=0.1, betas=(0.9, 0.99), retraction=name, amsgrad=amsgrad,
        capturable=capturable, second_moment="elementwise",
    )  # fmt: skip
    along = retractions.RETRACTIONS[name].along
    expected = [p.detach().clone() for p in (x, y)]
    m = [torch.zeros_like(X) for X in expected]
    v, peak = copy.deepcopy(m), copy.deepcopy(m)
    for t in range(1, 12):
        put_gradients([x, y], t)
        optimizer.step()
        for k, p in enumerate((x, y)):
            X = expected[k]
            g = retractions.project_tangent(X, p.grad)
            m[k] = 0.9 * m[k] + 0.1 * g
            v[k] = 0.99 * v[k] + 0.01 * g.square()
            peak[k] = torch.maximum(peak[k], v[k])
            second = (peak if amsgrad else v)[k] / (1 - 0.99**t)
            D = m[k] / (1 - 0.9**t) / (second.sqrt() + 1e-8)
            X = along(X, -0.1 * retractions.project_tangent(X, D))
            expected[k], m[k] = X, retractions.project_tangent(X, m[k])
            torch.testing.assert_close(p.detach(), X, rtol=0, atol=1e-12)
            assert optimizer.state[p]["exp_avg_sq"].shape == p.shape


@pytest.mark.parametrize("capturable", [False, True])
def test_the_kind_of_second_moment_may_change(capturable):
    """A sum over a frame is what the other keeps; it is shared evenly on the way back."""
    _, params = points()
    optimizer = RiemannianAdam(params, lr=0.05, capturable=capturable)
    for seed in range(9):
        kind = ("frame", "elementwise", "frame")[seed // 3]
        before = copy.deepcopy(optimizer.state_dict()["state"])
        optimizer.param_groups[0]["second_moment"] = kind
        put_gradients(params, seed)
        if seed in (3, 6):
            optimizer.param_groups[0]["betas"] = (0.9, 1 - 1e-12)  # to see what was taken over
        optimizer.step()
        if seed in (3, 6):
            old, new = before[0]["exp_avg_sq"].sum(), optimizer.state[params[0]]["exp_avg_sq"].sum()
            torch.testing.assert_close(old, new, rtol=1e-6, atol=0)
        optimizer.param_groups[0]["betas"] = (0.9, 0.999)
        assert max(frame_error(p) for p in params) < 1e-13


def test_second_moments_are_of_entries_where_directions_are_tangent():
    """POGO's are not: the quotient of a normal gradient would lead away from the minimum."""
    _, params = points(1)
    kinds = {
        name: RiemannianAdam(params, retraction=name).param_groups[0]["second_moment"]
        for name in RETRACTIONS
    }
    assert kinds == {**dict.fromkeys(RETRACTIONS, "elementwise"), "pogo": "frame"}
    words = "second_moment='elementwise' with retraction='pogo'.*second_moment='frame'"
    with pytest.raises(OptimizerError, match=words):
        RiemannianAdam(params, retraction="pogo", second_moment="elementwise")
    with pytest.raises(OptimizerError, match=words):
        RiemannianAdam([{"params": params, "retraction": "pogo", "second_moment": "elementwise"}])
    mixed = [{"params": params, "retraction": "pogo"}, {"params": points(1)[1]}]
    made = RiemannianAdam(mixed)
    assert [g["second_moment"] for g in made.param_groups] == ["frame", "elementwise"]
    made.param_groups[1]["retraction"] = "pogo"
    before = mixed[1]["params"][0].detach().clone()
    put_gradients(mixed[1]["params"], 0)
    with pytest.raises(OptimizerError, match=words):
        made.step()
    assert torch.equal(mixed[1]["params"][0], before)


@pytest.mark.parametrize("lr", [1e-2, 1e-3, 1e-4])
def test_pogo_with_momentum_is_a_landing_step_of_euclidean_sgd(lr):
    """Written with matrices of size ``d``; momentum, dampening and Nesterov are torch's.

    The published correction of one term leaves the fourth power of the step, and ours nothing.
    """
    x = stiefel(8, 3)
    b = None
    optimizer = RiemannianSGD([x], lr=lr, momentum=0.9, nesterov=True, retraction="pogo")
    for seed in range(10):
        X = x.detach().clone()
        put_gradients([x], seed)
        optimizer.step()
        b = x.grad if b is None else 0.9 * b + x.grad
        A = -lr * (x.grad + 0.9 * b) @ X.T
        M = X + (A - A.T) / 2 @ X
        excess = (M.T @ M - torch.eye(3, dtype=X.dtype)).norm()
        left = excess**2 + 1e-14
        assert (x.detach() - (M + (M - M @ M.T @ M) / 2)).norm() <= left
        assert (x.detach().T @ x.detach() - torch.eye(3, dtype=X.dtype)).abs().max() < 1e-14


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cls", "options", "lr"),
    [
        (RiemannianSGD, {}, 0.1),
        (RiemannianSGD, {"momentum": 0.9}, 1e-3),
        (RiemannianAdam, {}, 0.1),
    ],
)
def test_ten_thousand_steps_of_pogo_in_float32(cls, options, lr):
    """With one term of its correction, steps of 0.3 lost the frames by 7e-3."""
    _, params = points(2, torch.float32)
    optimizer = cls(params, lr=lr, retraction="pogo", **options)
    worst = 0.0
    for step in range(10_000):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
        if step % 100 == 99:
            worst = max(worst, *(frame_error(p) for p in params))
    assert worst <= 2e-6


@pytest.mark.parametrize("name", [n for n in RETRACTIONS if n != "pogo"])
@pytest.mark.parametrize(("cls", "options"), OPTIMIZERS)
@pytest.mark.parametrize("lr", [1e-3, 0.3, 30.0])
def test_frames_and_momentum_are_exact_at_any_rate(name, cls, options, lr):
    M, params = points()
    optimizer = cls(params, lr=lr, retraction=name, **options)
    for seed in range(4):
        put_gradients(params, seed)
        optimizer.step()
        for p in params:
            assert frame_error(p) < 1e-13
            u = optimizer.state[p][cls._momentum_key]
            assert (M.proju(p.detach(), u) - u).abs().max() < 1e-13 * (1 + u.abs().max())


@pytest.mark.parametrize("name", [n for n in RETRACTIONS if n != "pogo"])
@pytest.mark.parametrize(
    ("cls", "options", "lr"),
    [
        (cls, options, lr)
        for cls, options in OPTIMIZERS
        for lr in ((0.1, 1.0, 30.0) if options.get("capturable") else (1e-3, 1e-2, 0.1))
    ],
)
def test_a_thousand_steps_in_float32(name, cls, options, lr):
    """Noise, and a pull that stays: both ways in which frames drift."""
    _, params = points(2, torch.float32)
    optimizer = cls(params, lr=lr, retraction=name, **options)
    pull = torch.randn(params[0].shape)
    for step in range(1000):
        for p in params:
            p.grad = 0.3 * torch.randn_like(p) + pull
        optimizer.step()
        if step % 100 == 99:
            assert max(frame_error(p) for p in params) <= 2e-6


def test_pogo_holds_frames_at_small_steps():
    _, params = points(2, torch.float32)
    optimizer = RiemannianAdam(params, lr=1e-2, retraction="pogo")
    for seed in range(1000):
        put_gradients(params, seed)
        optimizer.step()
    assert max(frame_error(p) for p in params) <= 2e-6


@pytest.mark.parametrize("name", RETRACTIONS)
@pytest.mark.parametrize(("cls", "lr"), [(RiemannianAdam, 0.03), (RiemannianSGD, 0.02)])
def test_each_finds_the_dominant_subspace(name, cls, lr):
    generator = torch.Generator().manual_seed(1)
    A = torch.randn(12, 12, dtype=torch.float64, generator=generator)
    values, vectors = torch.linalg.eigh(A @ A.T)
    x = stiefel(12, 3, seed=2)
    optimizer = cls([x], lr=lr, retraction=name, maximize=True)
    for _ in range(1500):
        optimizer.zero_grad()
        ((x * (vectors @ (values[:, None] * (vectors.T @ x)))).sum() / 2 / values[-1]).backward()
        optimizer.step()
    overlap = torch.linalg.svdvals(vectors[:, -3:].T @ x.detach())
    assert overlap.min() > 0.999


# --- The option. ---


@pytest.mark.parametrize("cls", [RiemannianAdam, RiemannianSGD])
def test_an_unknown_retraction_is_refused(cls):
    _, params = points()
    match = rf"retraction='svd'.*'newton_schulz', 'qr'.*{cls.__name__}\(params, lr=..., retraction"
    with pytest.raises(OptimizerError, match=match):
        cls(params, lr=0.1, retraction="svd")
    optimizer = cls(params[:1], lr=0.1)
    with pytest.raises(OptimizerError, match="retraction='svd'"):
        optimizer.add_param_group({"params": params[1:], "retraction": "svd"})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("cls", [RiemannianAdam, RiemannianSGD])
def test_groups_may_retract_in_different_ways(cls):
    _, params = points()
    alone = copy.deepcopy(params)
    optimizer = cls([dict(params=params[:1], retraction="qr"), dict(params=params[1:])], lr=0.3)
    assert [g["retraction"] for g in optimizer.param_groups] == ["qr", "newton_schulz"]
    ends = [
        (cls(alone[:1], lr=0.3, retraction="qr"), alone[:1]),
        (cls(alone[1:], lr=0.3, retraction="newton_schulz"), alone[1:]),
    ]
    put_gradients(params, 0)
    put_gradients(alone, 0)
    optimizer.step()
    for one, _ in ends:
        one.step()
    for p, q in zip(params, alone, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=1e-14)
    assert not torch.allclose(params[0].detach(), params[1].detach())


def lapack(X, U, look=None):
    """A retraction of a user's: at module level, so that it can be pickled."""
    Q, R = torch.linalg.qr(X + U)
    return Q * R.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)


@pytest.mark.parametrize(("cls", "options"), OPTIMIZERS)
def test_a_retraction_of_ones_own(cls, options):
    mine = retractions.Retraction("mine", lapack)
    ends = []
    for retraction in (mine, "qr"):
        _, params = points()
        optimizer = cls(params, lr=0.3, retraction=retraction, **options)
        for seed in range(4):
            put_gradients(params, seed)
            optimizer.step()
            if seed == 1:
                params, optimizer = pickle.loads(pickle.dumps((params, optimizer)))
        assert optimizer.param_groups[0]["retraction"] == retraction
        optimizer.add_param_group({"params": points(1)[1]})
        assert optimizer.param_groups[1]["retraction"] == retraction
        ends.append([p.detach() for p in params])
    torch.testing.assert_close(*ends, rtol=0, atol=1e-13)


def test_the_retraction_is_part_of_the_state():
    _, params = points()
    optimizer = RiemannianAdam(params, retraction="cayley")
    other = RiemannianAdam(copy.deepcopy(params))
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["retraction"] == "cayley"
    twin = copy.deepcopy(optimizer)
    twin.add_param_group({"params": points(1)[1]})
    assert twin.param_groups[1]["retraction"] == "cayley"
    theirs = geoopt.optim.RiemannianAdam(copy.deepcopy(params))
    other.load_state_dict(theirs.state_dict())
    assert other.param_groups[0]["retraction"] == "qr"


# --- State between steps. ---


@pytest.mark.parametrize(("cls", "options"), OPTIMIZERS)
@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.data.copy_(p.data.roll(1, 0)),
        lambda p: setattr(p, "data", p.data.clone()),
        lambda p: p.requires_grad_(False).copy_(-p).requires_grad_(),
    ],
    ids=["written through data", "data replaced", "negated in place"],
)
def test_points_changed_between_steps_are_the_points_of_the_next(cls, options, change):
    def twice():
        params = [stiefel(2, 6, 3, seed=s) for s in range(3)]
        return params, cls(params, lr=0.1, **options)

    (kept, stepping), (fresh, reloaded) = twice(), twice()
    for seed in range(3):
        for params, optimizer in ((kept, stepping), (fresh, reloaded)):
            with torch.no_grad():
                change(params[1])
            put_gradients(params, seed)
            optimizer.step()
        # The other one starts from its parameters and state alone, every time.
        state = reloaded.state_dict()
        reloaded = cls(fresh, lr=0.1, **options)
        reloaded.load_state_dict(state)
    for p, q in zip(kept, fresh, strict=True):
        assert torch.equal(p.detach(), q.detach())


@pytest.mark.parametrize(("cls", "options"), OPTIMIZERS)
def test_gradients_that_come_and_go(cls, options):
    _, params = points()
    apart = copy.deepcopy(params)
    together = cls(params, lr=0.1, **options)
    optimizers = [cls([p], lr=0.1, **options) for p in apart]
    for seed in range(8):
        put_gradients(params, seed)
        put_gradients(apart, seed)
        for k in range(3):
            if (seed >> k) & 1:
                params[k].grad = apart[k].grad = None
        together.step()
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(params, apart, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=1e-13)


@pytest.mark.parametrize(("cls", "options"), OPTIMIZERS)
def test_a_group_that_is_replaced_keeps_the_state_of_its_parameters(cls, options):
    _, params = points()
    twins = copy.deepcopy(params)
    replaced, kept = cls(params, lr=0.1, **options), cls(twins, lr=0.1, **options)
    for seed in range(4):
        for q, optimizer in ((params, replaced), (twins, kept)):
            put_gradients(q, seed)
            optimizer.step()
        replaced.param_groups[0] = dict(replaced.param_groups[0])
    for p, q in zip(params, twins, strict=True):
        assert torch.equal(p.detach(), q.detach())


@pytest.mark.parametrize("name", RETRACTIONS)
@pytest.mark.parametrize(("cls", "options"), OPTIMIZERS)
def test_a_compiled_step_method_is_the_step(cls, options, name):
    torch._dynamo.reset()
    ends = []
    for wrap in (lambda f: f, lambda f: torch.compile(f, backend="eager")):
        _, params = points()
        optimizer = cls(params, lr=0.05, retraction=name, **options)
        step = wrap(optimizer.step)
        for seed in range(3):
            put_gradients(params, seed)
            step()
        ends.append([p.detach() for p in params])
    torch.testing.assert_close(*ends, rtol=0, atol=0)


# --- Memory. ---


def peak(step):
    """Largest sum of what is allocated and not yet freed during a call, in bytes."""
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    now, most = 0, 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def bytes_of(optimizer):
    return sum(
        t.numel() * t.element_size()
        for state in optimizer.state.values()
        for t in state.values()
        if isinstance(t, torch.Tensor) and t.ndim
    )


def test_memory_is_that_of_adam_and_one_batch_of_frames():
    M = SpectralTTManifold(TTShape.svd(256, 256, rank=32))
    params = [M.random_parameter() for _ in range(20)]
    plain = [torch.nn.Parameter(p.detach().clone()) for p in params]
    size = sum(p.numel() for p in params) * 4
    largest = 20 * max(count * d * r for _, count, d, r in M.frame_groups) * 4
    assert len(M.frame_groups) == 1
    ours = RiemannianAdam(params, lr=1e-3, second_moment="frame")
    adam = torch.optim.Adam(plain, lr=1e-3, foreach=True)
    for optimizer, q in ((ours, params), (adam, plain)):
        for p in q:
            p.grad = torch.randn_like(p)
        optimizer.step()
        optimizer.step()
    temporary = peak(ours.step)
    stacks = next(iter(ours._stacks.values()))
    tensors = [t for b in stacks.blocks for t in (*b.arrays.values(), *b.scalars.values())]
    kept = sum(t.numel() * 4 for t in tensors)
    assert not any("exp_avg" in state for state in ours.__dict__["state"].values())
    assert kept < 1.01 * size
    assert bytes_of(adam) == 2 * size
    # The rest for r x r matrices and spectra.
    assert kept + temporary <= bytes_of(adam) + 1.3 * largest
    assert bytes_of(ours) == kept


@pytest.mark.parametrize(
    ("cls", "options", "at_most"),
    [
        (RiemannianAdam, {"lr": 1e-3}, 2.7),
        (RiemannianAdam, {"lr": 1e-3, "second_moment": "frame"}, 1.6),
        (RiemannianSGD, {"lr": 1e-5, "momentum": 0.9}, 1.6),
    ],
)
def test_memory_of_a_step_does_not_grow_with_the_network(cls, options, at_most):
    """With its state, one moment a frame, it is less than Adam's state, from some size on."""
    M = SpectralTTManifold(TTShape.svd(512, 256, rank=32))
    found = []
    for count in (30, 60):
        params = [M.random_parameter() for _ in range(count)]
        optimizer = cls(params, **options)
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
        found.append(peak(optimizer.step))
    size = sum(p.numel() for p in params) * 4
    assert found[1] < found[0] + 0.02 * size
    assert bytes_of(optimizer) + found[1] < at_most * size


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cls", [RiemannianAdam, RiemannianSGD])
@pytest.mark.parametrize("retraction", ["newton_schulz", "qr", "polar", "cayley"])
def test_points_in_half_precision_stay_on_the_manifold(cls, retraction, dtype):
    M = SpectralTTManifold(TTShape.for_matrix(24, 20, rank=4))
    p = ManifoldParameter(M.random_parameter().detach().to(dtype), manifold=M)
    optimizer = cls([p], lr=1.0, retraction=retraction)
    for _ in range(10):
        p.grad = torch.randn(p.shape).to(dtype)
        optimizer.step()
    assert p.dtype == dtype
    assert M.unpack(p.detach().float()).orthonormality_error() < 4 * torch.finfo(dtype).eps
