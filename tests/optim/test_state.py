"""A run that is saved, loaded and continued is the run that was never stopped, bit for bit."""

from __future__ import annotations

import copy
import io
import itertools
import pickle

import pytest
import torch

from sttp_manifold._geoopt import EuclideanStiefel, ManifoldParameter, ProductManifold, geoopt
from sttp_manifold.errors import OptimizerError
from sttp_manifold.manifolds.spectral_tt import SpectralTTManifold
from sttp_manifold.optim import RiemannianAdam, RiemannianSGD
from sttp_manifold.tt.shape import TTShape

SHAPE = TTShape(out_modes=(3, 4, 2), in_modes=(2, 5, 3), rank=4)


class Model(torch.nn.Module):
    """Every kind of parameter: plain, ours (twice, with and without batch), single, other."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        M = SpectralTTManifold(SHAPE, spectrum="bounded", bound=2.0)
        sphere = geoopt.Sphere()
        self.plain = torch.nn.Parameter(torch.randn(3, 2, dtype=dtype))
        self.one = M.random_parameter(dtype=dtype)
        self.many = SpectralTTManifold(SHAPE).random_parameter(2, dtype=dtype)
        self.frame = ManifoldParameter(EuclideanStiefel().random(6, 4, dtype=dtype))
        self.other = ManifoldParameter(sphere.projx(torch.randn(5, dtype=dtype)), manifold=sphere)


def train(model, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for name, p in model.named_parameters():
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            if name == "frame" and step == 1:
                p.grad = None
        optimizer.step()


def directly(state):
    return state


def through_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer)


ADAM = [
    dict(amsgrad=a, maximize=m, foreach=f, stabilize=s, weight_decay=w, decoupled_weight_decay=d)
    for a, m, f, s, (w, d) in itertools.product(
        (False, True),
        (False, True),
        (None, True, False),
        (None, 2),
        ((0.0, False), (0.1, False), (0.1, True)),
    )
]
SGD = [
    dict(momentum=mo, dampening=d, nesterov=n, maximize=m, foreach=f, stabilize=s, weight_decay=w)
    for (mo, d, n), m, f, s, w in itertools.product(
        ((0.0, 0.0, False), (0.9, 0.0, False), (0.9, 0.3, False), (0.9, 0.0, True)),
        (False, True),
        (None, True, False),
        (None, 2),
        (0.0, 0.1),
    )
]
CASES = [(RiemannianAdam, options) for options in ADAM]
CASES += [(RiemannianSGD, options) for options in SGD]


@pytest.mark.parametrize("carry", [directly, through_file])
@pytest.mark.parametrize(
    ("cls", "options"),
    CASES,
    ids=lambda v: v.__name__ if isinstance(v, type) else "-".join(map(str, v.values())),
)
def test_a_loaded_run_continues_bit_for_bit(cls, options, carry):
    torch.manual_seed(0)
    model = Model()
    optimizer = cls(model.parameters(), lr=0.05, **options)
    train(model, optimizer, range(3))
    twin = copy.deepcopy(model)
    # Other settings, all of which the state must replace.
    resumed = cls(twin.parameters(), lr=9.0)
    resumed.load_state_dict(carry(optimizer.state_dict()))
    train(model, optimizer, range(3, 7))
    train(twin, resumed, range(3, 7))
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.detach(), q.detach()), name
        a, b = optimizer.state[p], resumed.state[q]
        assert a.keys() == b.keys()
        for key in a:
            assert torch.equal(torch.as_tensor(a[key]), torch.as_tensor(b[key])), (name, key)


@pytest.mark.parametrize("options", [{}, {"stabilize": 2}])
@pytest.mark.parametrize(
    ("ours", "torchs", "more"),
    [
        (RiemannianAdam, torch.optim.Adam, {}),
        (RiemannianSGD, torch.optim.SGD, {"momentum": 0.9}),
    ],
)
def test_a_state_of_torchs_goes_on_with_ours(ours, torchs, more, options):
    """It says nothing of what torch does not know."""
    plain = [torch.nn.Parameter(torch.ones(3, 2)) for _ in range(2)]
    twins = copy.deepcopy(plain)
    optimizer, resumed = torchs(plain, lr=0.05, **more), ours(twins, lr=9.0, **more, **options)
    for step in range(6):
        if step == 3:
            resumed.load_state_dict(optimizer.state_dict())
            for p, q in zip(plain, twins, strict=True):
                q.data.copy_(p.data)
        for p in (*plain, *twins):
            p.grad = torch.full_like(p, step - 1.5)
        optimizer.step()
        if step >= 3:
            resumed.step()
    assert resumed.param_groups[0]["stabilize"] == options.get("stabilize")
    for p, q in zip(plain, twins, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("cls", [RiemannianAdam, RiemannianSGD])
def test_the_state_is_needed(cls):
    """The test above would notice a state that is lost."""
    torch.manual_seed(0)
    options = {"momentum": 0.9} if cls is RiemannianSGD else {}
    model = Model()
    optimizer = cls(model.parameters(), lr=0.05, **options)
    train(model, optimizer, range(3))
    twin = copy.deepcopy(model)
    train(model, optimizer, range(3, 5))
    train(twin, cls(twin.parameters(), lr=0.05, **options), range(3, 5))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert not torch.equal(p.detach(), q.detach())


@pytest.mark.parametrize("cls", [RiemannianAdam, RiemannianSGD])
def test_scheduler_and_optimizer_resume_together(cls):
    torch.manual_seed(0)
    model = Model()
    optimizer = cls(model.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    for step in range(3):
        train(model, optimizer, [step])
        scheduler.step()
    twin = copy.deepcopy(model)
    resumed = cls(twin.parameters(), lr=0.05)
    rescheduled = torch.optim.lr_scheduler.CosineAnnealingLR(resumed, 10)
    resumed.load_state_dict(through_file(optimizer.state_dict()))
    rescheduled.load_state_dict(through_file(scheduler.state_dict()))
    for step in range(3, 6):
        for m, o, s in ((model, optimizer, scheduler), (twin, resumed, rescheduled)):
            train(m, o, [step])
            s.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.detach(), q.detach())


@pytest.mark.parametrize("cls", [RiemannianAdam, RiemannianSGD])
def test_deepcopy_and_pickle_carry_the_optimizer_with_its_model(cls):
    for carry in (copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))):
        torch.manual_seed(0)
        model = Model()
        optimizer = cls(model.parameters(), lr=0.05, stabilize=2)
        train(model, optimizer, range(3))
        twin, resumed = carry((model, optimizer))
        train(model, optimizer, range(3, 6))
        train(twin, resumed, range(3, 6))
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(p.detach(), q.detach())
        resumed.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})


def test_state_follows_the_dtype_of_the_parameters():
    torch.manual_seed(0)
    model = Model()
    optimizer = RiemannianAdam(model.parameters(), lr=0.05)
    train(model, optimizer, range(2))
    twin = copy.deepcopy(model).double()
    resumed = RiemannianAdam(twin.parameters(), lr=0.05)
    resumed.load_state_dict(optimizer.state_dict())
    train(twin, resumed, range(2, 4))
    train(model, optimizer, range(2, 4))
    assert resumed.state[twin.one]["exp_avg_sq"].dtype == torch.float64
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.detach().double(), q.detach(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("batch", [(), (3,)])
def test_a_run_of_geoopt_continues_here(amsgrad, batch):
    """Its second moments are repeated over each frame, and its step counts are plain numbers."""
    M = SpectralTTManifold(SHAPE)
    product = ProductManifold(*zip(M.manifolds, M.shapes, strict=True))
    x = M.random_parameter(*batch, dtype=torch.float64)
    params = [
        ManifoldParameter(x.detach().clone(), manifold=product),
        ManifoldParameter(EuclideanStiefel().random(*batch, 6, 4, dtype=torch.float64)),
        torch.nn.Parameter(torch.randn(3, dtype=torch.float64)),
    ]
    twins = [x, copy.deepcopy(params[1]), copy.deepcopy(params[2])]
    theirs = geoopt.optim.RiemannianAdam(params, lr=0.05, amsgrad=amsgrad)
    ours = RiemannianAdam(twins, lr=1.0)

    def advance(optimizer, params, step):
        generator = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape, dtype=p.dtype, generator=generator)
        optimizer.step()

    for step in range(3):
        advance(theirs, params, step)
    with torch.no_grad():
        for p, q in zip(params, twins, strict=True):
            q.copy_(p)
    ours.load_state_dict(through_file(theirs.state_dict()))
    for step in range(3, 8):
        advance(theirs, params, step)
        advance(ours, twins, step)
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=1e-10)


def test_a_state_of_another_parameter_is_refused():
    M = SpectralTTManifold(SHAPE)
    x = M.random_parameter()
    optimizer = RiemannianAdam([x])
    x.grad = torch.ones_like(x)
    optimizer.step()
    state = optimizer.state_dict()
    state["state"][0]["exp_avg_sq"] = torch.zeros(7)
    optimizer.load_state_dict(state)
    with pytest.raises(OptimizerError, match=r"exp_avg_sq.*\(7,\).*load_state_dict"):
        optimizer.step()
