"""States of others: of torch's optimizers, of geoopt's, of other parameters."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from saved_states import through_file

from sttp_manifold._geoopt import EuclideanStiefel, ManifoldParameter, ProductManifold, geoopt
from sttp_manifold.errors import OptimizerError
from sttp_manifold.manifolds.spectral_tt import SpectralTTManifold
from sttp_manifold.optim import RiemannianAdam, RiemannianSGD
from sttp_manifold.tt.shape import TTShape

SHAPE = TTShape(out_modes=(3, 4, 2), in_modes=(2, 5, 3), rank=4)


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


def step(optimizer, params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, dtype=p.dtype, generator=generator)
    optimizer.step()


@pytest.mark.parametrize("says", [True, False])
def test_a_state_of_frames_goes_on_as_one(says):
    """Into an optimizer of entries; also one of an earlier release, which did not say its kind."""
    x = SpectralTTManifold(SHAPE).random_parameter(dtype=torch.float64)
    y = copy.deepcopy(x)
    old, new = RiemannianAdam([x], lr=0.05, second_moment="frame"), RiemannianAdam([y], lr=1.0)
    for seed in range(3):
        step(old, [x], seed)
    with torch.no_grad():
        y.copy_(x)
    state = through_file(old.state_dict())
    if not says:
        del state["param_groups"][0]["second_moment"]
    new.load_state_dict(state)
    assert new.param_groups[0]["second_moment"] == "frame"
    for seed in range(3, 6):
        step(old, [x], seed)
        step(new, [y], seed)
    assert torch.equal(x, y)


@pytest.mark.parametrize("kind", ["frame", "elementwise"])
def test_a_group_that_comes_after_a_pickle_or_a_state_is_of_the_same_kind(kind):
    first, second, third = (SpectralTTManifold(SHAPE).random_parameter() for _ in range(3))
    made = RiemannianAdam([first], second_moment=kind)
    unpickled = pickle.loads(pickle.dumps(made))
    unpickled.add_param_group({"params": [second]})
    loaded = RiemannianAdam([first])
    loaded.load_state_dict(made.state_dict())
    loaded.add_param_group({"params": [third]})
    for optimizer in (unpickled, loaded):
        assert [group["second_moment"] for group in optimizer.param_groups] == [kind, kind]
