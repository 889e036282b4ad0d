"""The optimizers over `FixedTTRankManifold`: steps in the metric of the weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from strategies import seeds, shapes
from torch import Tensor

from sttp_manifold import FixedTTRankManifold, TTShape
from sttp_manifold._geoopt import ManifoldParameter
from sttp_manifold.manifolds.contract import HasSteepest
from sttp_manifold.optim import RiemannianAdam, RiemannianMuon, RiemannianSGD

SHAPE = TTShape(out_modes=(3, 4, 2), in_modes=(2, 5, 3), rank=4)
F = FixedTTRankManifold(SHAPE)
MAKE: dict[str, Any] = {
    "adam": lambda p, **how: RiemannianAdam(p, **{"lr": 0.05, **how}),
    "adam, decoupled": lambda p, **how: RiemannianAdam(
        p, **{"lr": 0.05, "weight_decay": 0.01, "decoupled_weight_decay": True, **how}
    ),
    "sgd": lambda p, **how: RiemannianSGD(p, **{"lr": 0.05, "momentum": 0.9, **how}),
    "muon": lambda p, **how: RiemannianMuon(p, **{"lr": 0.1, **how}),
    "muon, decay": lambda p, **how: RiemannianMuon(p, **{"lr": 0.1, "weight_decay": 0.1, **how}),
}
every_one = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)


def parameters(count: int = 3, seed: int = 0) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    return [F.random_parameter(dtype=torch.float64, generator=generator) for _ in range(count)]


def twins(params: list[Any]) -> list[Any]:
    return [ManifoldParameter(p.detach().clone(), manifold=p.manifold) for p in params]


def target() -> Tensor:
    return F.to_matrix(F.random(dtype=torch.float64, generator=torch.Generator().manual_seed(9)))


def descend(params: list[Any], optimizers: list[Any], steps: int) -> float:
    T, loss = target(), torch.zeros(())
    for _ in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = sum((F.unpack(p).to_matrix() - T).square().sum() for p in params)  # type: ignore[assignment]
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    return float(loss.detach())


@settings(max_examples=40)
@given(shape=shapes(max_modes=4), seed=seeds)
def test_the_direction_is_the_projected_polar_factor(shape: TTShape, seed: int) -> None:
    """Against LAPACK's singular vectors of the dense matrix."""
    M = FixedTTRankManifold(shape)
    assert isinstance(M, HasSteepest)
    torch.manual_seed(seed)
    x = M.random(dtype=torch.float64)
    u = M.proju(x, torch.randn_like(x))
    D = M.steepest(x, u)
    assert M.check_vector_on_tangent(x, D, atol=1e-8)
    if float(u.abs().max()) < 1e-12:
        assert not D.any()
        return
    U, s, Vh = torch.linalg.svd(M.ambient_vector(x, u), full_matrices=False)
    rank = int((s > 1e-9 * s[0]).sum())
    expected = M.project_matrix(x, U[:, :rank] @ Vh[:rank])
    size = torch.linalg.matrix_norm(M.ambient_vector(x, expected), 2)
    torch.testing.assert_close(D, expected / size, rtol=0, atol=1e-6)
    assert torch.linalg.matrix_norm(M.ambient_vector(x, D), 2) == pytest.approx(1)
    nuclear = float(s.sum() / size)
    assert float(M.inner(x, u, D)) == pytest.approx(nuclear, rel=1e-6)


def test_on_matrices_it_is_riemannion() -> None:
    """With one mode a side, by the blocks of the polar factor in bases of the two spaces."""
    M = FixedTTRankManifold(TTShape.svd(9, 7, rank=2))
    torch.manual_seed(0)
    x = M.random(dtype=torch.float64)
    u = M.proju(x, torch.randn_like(x))
    D = M.ambient_vector(x, M.steepest(x, u))
    U, _, Vh = torch.linalg.svd(M.to_matrix(x))
    P, _, Q = torch.linalg.svd(M.ambient_vector(x, u))
    blocks = U.T @ (P[:, :4] @ Q[:4]) @ Vh.T
    blocks[2:, 2:] = 0
    expected = U @ blocks @ Vh
    torch.testing.assert_close(D, expected / torch.linalg.matrix_norm(expected, 2))


def test_of_nothing_there_is_no_direction() -> None:
    x = F.random(2, F.n_elements, dtype=torch.float64)
    assert not F.steepest(x, torch.zeros_like(x)).any()
    u = F.proju(x, torch.randn_like(x))
    for scale in (1e-150, 1e150):
        torch.testing.assert_close(F.steepest(x, scale * u), F.steepest(x, u))


@every_one
def test_a_batch_moves_as_each_alone(make: Any) -> None:
    params = parameters()
    alone, apart = twins(params), twins(params)
    descend(params, [make(params)], 6)
    descend(alone, [make([p]) for p in alone], 6)
    descend(apart, [make(apart, foreach=False)], 6)
    for p, q, r in zip(params, alone, apart, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=1e-9)
        torch.testing.assert_close(r.detach(), q.detach(), rtol=0, atol=1e-9)


@every_one
def test_a_point_that_joins_later_moves_alone(make: Any) -> None:
    params = parameters()
    params[1].requires_grad_(False)
    optimizer = make(params)
    T = target()
    for step in range(4):
        if step == 2:
            params[1].requires_grad_(True)
        optimizer.zero_grad()
        sum((F.unpack(p).to_matrix() - T).square().sum() for p in params).backward()  # type: ignore[union-attr]
        optimizer.step()
    counts = [float(optimizer.state[p].get("step", 0)) for p in params]
    assert counts in ([4, 2, 4], [0, 0, 0])
    assert all(F.check_point_on_manifold(p.detach()) for p in params)


@pytest.mark.parametrize(("name", "lr"), [("adam", 0.05), ("sgd", 0.05), ("muon", 0.2)])
def test_a_weight_is_found(name: str, lr: float) -> None:
    params = parameters(2)
    optimizer = MAKE[name](params, lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)
    for _ in range(200):
        loss = descend(params, [optimizer], 1)
        schedule.step()
    assert loss < 1e-4
    assert all(F.check_point_on_manifold(p.detach()) for p in params)


def test_a_step_of_muon_is_as_long_as_its_rate() -> None:
    (p,) = parameters(1)
    p.manifold = F  # TT-SVD, which is right to second order
    before = F.to_matrix(p.detach())
    descend([p], [RiemannianMuon([p], lr=1e-4)], 1)
    moved = torch.linalg.matrix_norm(F.to_matrix(p.detach()) - before, 2)
    assert float(moved) == pytest.approx(1e-4, rel=1e-2)


def test_momentum_is_the_same_when_a_point_is_put_back() -> None:
    """Which changes its gauge, so that the same numbers would be another vector."""
    (p,) = parameters(1)
    optimizer = MAKE["sgd"]([p])
    descend([p], [optimizer], 3)
    before = F.ambient_vector(p.detach(), optimizer.state[p]["momentum_buffer"])
    optimizer.stabilize()
    after = F.ambient_vector(p.detach(), optimizer.state[p]["momentum_buffer"])
    torch.testing.assert_close(after, before)


def test_decay_shrinks_the_weight() -> None:
    for make in (MAKE["muon, decay"], MAKE["adam, decoupled"]):
        (p,) = parameters(1)
        optimizer = make([p])
        before = F.to_matrix(p.detach())
        p.grad = torch.zeros_like(p)
        optimizer.step()
        group = optimizer.param_groups[0]
        factor = 1 - group["lr"] * group["weight_decay"]
        torch.testing.assert_close(F.to_matrix(p.detach()), factor * before)
