"""`follow`: optimizers go on after the ranks of their model have changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import seeds, shapes
from torch import Tensor, nn

from sttp_manifold import TTShape
from sttp_manifold.errors import OptimizerError
from sttp_manifold.nn import compress, grow_, make_weight, switch, truncate_
from sttp_manifold.optim import (
    RiemannianAdam,
    RiemannianMuon,
    RiemannianSGD,
    check_optimizer,
    follow,
)
from sttp_manifold.optim._carried import Carrier, carried_state

SPECTRA = ["free", "full", "bounded"]
OURS: dict[str, Any] = {
    "sgd": lambda p: RiemannianSGD(p, lr=0.05, momentum=0.9),
    "adam": lambda p: RiemannianAdam(p, lr=0.02),
    "adam, amsgrad": lambda p: RiemannianAdam(p, lr=0.02, amsgrad=True),
    "adam, frame": lambda p: RiemannianAdam(p, lr=0.02, second_moment="frame"),
    "adam, pogo": lambda p: RiemannianAdam(p, lr=0.02, retraction="pogo"),
    "muon": lambda p: RiemannianMuon(p, lr=0.02),
}
every_one = pytest.mark.parametrize("make", OURS.values(), ids=OURS)


def network(kind: str = "svdp", method: str = "riemannian", **how: Any) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 36), nn.Tanh(), nn.Linear(36, 12)).double()
    return compress(model, rank=4, kind=kind, method=method, **how)


def point_of(model: nn.Module) -> Any:
    return model[0].spectral_weight.point  # type: ignore[index]


def train(model: nn.Module, optimizer: Any, steps: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(48, 24, dtype=torch.float64, generator=generator)
    y = torch.randn(48, 12, dtype=torch.float64, generator=generator)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    return model(x).detach()


def velocity(manifold: Any, x: Tensor, u: Tensor) -> Tensor:
    """That of the weight, by differentiation."""

    def weight(point: Tensor) -> Tensor:
        return manifold.unpack(point).to_matrix()

    x, u = (t.detach().as_subclass(Tensor) for t in (x, u))
    return torch.autograd.functional.jvp(weight, x, u)[1]


# -- the trajectory -------------------------------------------------------------------------------


@every_one
def test_a_direction_of_zero_that_comes_and_goes_changes_nothing(make: Any) -> None:
    model, twin = network(), network()
    optimizer, other = make(model.parameters()), make(twin.parameters())
    train(model, optimizer, 5)
    train(twin, other, 5)
    grow_(model, 7)
    optimizer.follow(model)
    truncate_(model, energy=1.0)
    optimizer.follow(model)
    check_optimizer(optimizer, model)
    assert point_of(model).shape == point_of(twin).shape
    torch.testing.assert_close(
        train(model, optimizer, 8), train(twin, other, 8), rtol=0, atol=1e-11
    )


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_momentum_of_a_tensor_train_moves_the_weight_as_before(spectrum: str) -> None:
    model, twin = network("sttp", spectrum=spectrum), network("sttp", spectrum=spectrum)
    make = OURS["sgd"]
    optimizer, other = make(model.parameters()), make(twin.parameters())
    train(model, optimizer, 5)
    train(twin, other, 5)
    # Cores come together at the higher ranks, and fall apart again.
    grow_(model, 7)
    optimizer.follow(model)
    truncate_(model, energy=1.0)
    optimizer.follow(model)
    one, two = train(model, optimizer, 1), train(twin, other, 1)
    torch.testing.assert_close(one, two, rtol=0, atol=1e-4)  # vertical parts, to second order
    bare = network("sttp", spectrum=spectrum)
    fresh = make(bare.parameters())
    train(bare, fresh, 5)
    fresh.state.clear()
    assert (train(bare, fresh, 1) - two).abs().max() > 30 * (one - two).abs().max()


def test_several_changes_are_followed_at_once() -> None:
    model, twin = network(), network()
    make = OURS["muon"]
    optimizer, other = make(model.parameters()), make(twin.parameters())
    train(model, optimizer, 4)
    train(twin, other, 4)
    grow_(model, 6)
    truncate_(model, rank=4)
    switch(model, "householder")
    switch(model, "riemannian")
    optimizer.follow(model)
    torch.testing.assert_close(
        train(model, optimizer, 5), train(twin, other, 5), rtol=0, atol=1e-11
    )


# -- vectors --------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    shape=shapes(max_modes=4),
    seed=seeds,
    more=st.integers(0, 5),
    spectrum=st.sampled_from(SPECTRA),
)
def test_what_is_carried_moves_the_weight_as_before(
    shape: TTShape, seed: int, more: int, spectrum: str
) -> None:
    torch.manual_seed(seed)
    weight: Any = make_weight("riemannian", shape, spectrum, "random", dtype=torch.float64)
    with torch.no_grad():  # singular values that are equal have no directions of their own
        part = weight.point[weight.manifold.spectrum_slice]
        part *= torch.linspace(0.5, 1, len(part), dtype=torch.float64)
    old, x = weight.manifold, weight.point.detach()
    u = old.proju(x, torch.randn_like(x))
    grown: Any = grow_(weight, max(shape.ranks) + more)
    new, y = grown.manifold, grown.point.detach()
    v = Carrier(old, new, x, y).vector(u)
    assert new.check_vector_on_tangent(y, v, atol=1e-8)
    expected = velocity(old, x, u)
    torch.testing.assert_close(velocity(new, y, v), expected, rtol=0, atol=1e-7)
    back: Any = truncate_(grown, 1.0)
    w = Carrier(new, back.manifold, y, back.point.detach()).vector(v)
    assert back.manifold.check_vector_on_tangent(back.point.detach(), w, atol=1e-8)
    if back.shape == shape:
        moved = velocity(back.manifold, back.point, w)
        torch.testing.assert_close(moved, expected, rtol=0, atol=1e-6)


@given(shape=shapes(max_modes=4), seed=seeds, rank=st.integers(1, 4))
def test_second_moments_are_none_of_new_directions_and_never_negative(
    shape: TTShape, seed: int, rank: int
) -> None:
    torch.manual_seed(seed)
    weight: Any = make_weight("riemannian", shape, "free", "random", dtype=torch.float64)
    old, x = weight.manifold, weight.point.detach()
    count = sum(group.copies for group in old.frame_groups)
    state = {
        "step": torch.tensor(3.0),
        "exp_avg": old.proju(x, torch.randn_like(x)),
        "exp_avg_sq": torch.rand(count + shape.rank, dtype=torch.float64),
        "max_exp_avg_sq": torch.rand_like(x),
    }
    for changed in (truncate_(weight, rank=rank), grow_(weight, shape.rank + 2)):
        new: Any = changed
        carried = carried_state(weight.point, new.point, state, momentum="exp_avg")
        assert carried is not None
        assert carried["step"] == 3
        frames = sum(group.copies for group in new.manifold.frame_groups)
        assert carried["exp_avg_sq"].shape == (frames + new.shape.rank,)
        assert carried["max_exp_avg_sq"].shape == new.point.shape
        assert (carried["exp_avg_sq"] >= 0).all()
        assert (carried["max_exp_avg_sq"] >= 0).all()
        if new.shape.rank > shape.rank:
            rest = carried["exp_avg_sq"][frames:]
            torch.testing.assert_close(
                rest[: shape.rank].sort().values, state["exp_avg_sq"][count:].sort().values
            )
            assert rest[shape.rank :].abs().max() < 1e-12


def test_columns_of_a_matrix_that_are_dropped() -> None:
    """With one mode a side, by the formulas of a frame written out."""
    torch.manual_seed(0)
    weight: Any = make_weight(
        "riemannian", TTShape.svd(9, 7, rank=4), "free", "random", dtype=torch.float64
    )
    M, x = weight.manifold, weight.point.detach()
    u = M.proju(x, torch.randn_like(x))
    tt, du = M.unpack(x), M.unpack(u)
    new: Any = truncate_(weight, rank=2)
    v = carried_state(weight.point, new.point, {"exp_avg": u}, momentum="exp_avg")
    assert v is not None
    order = tt.spectrum.abs().argsort(descending=True)[:2]
    for side in (0, 1):
        X, D = tt.frames()[side][:, order], du.frames()[side][:, order]
        D = D - X @ (X.T @ D + D.T @ X) / 2
        Y, E = (new.manifold.unpack(t).frames()[side] for t in (new.point.detach(), v["exp_avg"]))
        signs = (Y.T @ X).diagonal().sign()
        torch.testing.assert_close(E, D * signs)


# -- groups, schedules and states -----------------------------------------------------------------


@every_one
def test_groups_schedules_and_states_go_on(make: Any) -> None:
    model = network("sttp")
    optimizer = make(model.parameters())
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    train(model, optimizer, 3)
    groups, rate = list(optimizer.param_groups), optimizer.param_groups[0]["lr"]
    grow_(model, 6)
    optimizer.follow(model)
    assert all(a is b for a, b in zip(groups, optimizer.param_groups, strict=True))
    assert {id(p) for p in groups[0]["params"]} == {id(p) for p in model.parameters()}
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == rate / 2
    assert set(optimizer.state) == set(model.parameters())
    truncate_(model, rank=3)
    optimizer.follow(model)
    train(model, optimizer, 2)

    twin = network("sttp")
    truncate_(twin, rank=3)
    twin.load_state_dict(model.state_dict())
    other = make(twin.parameters())
    other.load_state_dict(optimizer.state_dict())
    assert torch.equal(train(model, optimizer, 3), train(twin, other, 3))
    check_optimizer(optimizer, model)


def test_a_frozen_weight_and_one_without_a_step_have_no_state() -> None:
    model = network()
    point_of(model).requires_grad_(False)
    optimizer = OURS["adam"](model.parameters())
    grow_(model, 5)
    optimizer.follow(model)
    assert not optimizer.state
    train(model, optimizer, 2)
    truncate_(model, rank=4)
    optimizer.follow(model)
    assert point_of(model) not in optimizer.state
    assert not point_of(model).requires_grad


@pytest.mark.parametrize("cls", [torch.optim.Adam, torch.optim.SGD, torch.optim.RMSprop])
def test_plain_optimizers_over_charts(cls: Any) -> None:
    model = network(method="householder")
    optimizer = cls(
        model.parameters(), lr=0.01, **({"momentum": 0.9} if cls.__name__ == "SGD" else {})
    )
    train(model, optimizer, 3)
    bias = model[0].bias
    known = {k: torch.as_tensor(v).clone() for k, v in optimizer.state[bias].items()}
    truncate_(model, rank=2)
    follow(optimizer, model)
    check_optimizer(optimizer, model)
    assert set(optimizer.state) == {model[0].bias, model[2].bias}
    for name, value in known.items():
        assert torch.equal(torch.as_tensor(optimizer.state[bias][name]), value)
    before = model[0].spectral_weight().detach().clone()
    train(model, optimizer, 2)
    assert not torch.equal(before, model[0].spectral_weight().detach())


def test_follow_is_the_method() -> None:
    model = network()
    optimizer = OURS["adam"](model.parameters())
    train(model, optimizer, 2)
    grow_(model, 5)
    follow(optimizer, model)
    assert "exp_avg" in optimizer.state[point_of(model)]


def test_a_model_that_has_not_changed() -> None:
    model = network()
    optimizer = OURS["adam"](model.parameters())
    train(model, optimizer, 2)
    before = {p: dict(s) for p, s in optimizer.state.items()}
    optimizer.follow(model)
    assert before.keys() == optimizer.state.keys()


# -- what is refused ------------------------------------------------------------------------------


def refused(optimizer: Any, model: nn.Module, words: str) -> None:
    groups = [list(group["params"]) for group in getattr(optimizer, "param_groups", [])]
    with pytest.raises(OptimizerError, match=words):
        follow(optimizer, model)
    for group, params in zip(getattr(optimizer, "param_groups", []), groups, strict=True):
        assert all(a is b for a, b in zip(group["params"], params, strict=True))


def test_what_cannot_be_followed_is_named() -> None:
    model, stranger = network(), network()
    optimizer = OURS["adam"](model.parameters())
    schedule: Any = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    refused(schedule, model, "no parameter groups")
    refused(model, model, "takes an optimizer")
    truncate_(model, rank=2)
    refused(optimizer, stranger, "in no module of this Sequential")
    refused(torch.optim.LBFGS(model.parameters()), model, "LBFGS")
    both = OURS["adam"]([*optimizer.param_groups[0]["params"], point_of(model)])
    refused(both, model, "took the place of")

    plain = nn.Sequential(nn.Linear(24, 36), nn.Linear(36, 12)).double()
    optimizer = OURS["adam"](plain.parameters())
    refused(optimizer, compress(plain, rank=3, method="riemannian"), "not compress and decompress")
