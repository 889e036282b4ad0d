"""`truncate_` and `grow_`: ranks of a network that change."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import normal, seeds, shapes
from torch import Tensor, nn
from ways_to_hold import METHODS, every_method

from sttp_manifold import TTShape, tt_svd
from sttp_manifold.errors import ConversionError, OptimizerError, ShapeError, SpectrumError
from sttp_manifold.nn import SpectralWeight, compress, grow_, make_weight, truncate_
from sttp_manifold.optim import RiemannianAdam, check_optimizer


def network(method: str, kind: str = "sttp", rank: int = 4, **how: Any) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(8, 12, 3), nn.Flatten(), nn.Linear(12, 30), nn.Tanh(), nn.Linear(30, 10)
    ).double()
    compress(model, rank, method=method, kind=kind, grow="allow", **how)
    return model


def dense(model: nn.Module) -> list[Tensor]:
    return [m().detach() for m in model.modules() if isinstance(m, SpectralWeight)]


@example(TTShape((2,), (3, 2, 5), ranks=(1, 2, 2, 2, 1)), 1, 1, "householder", "bounded")
@given(
    shape=shapes(max_modes=4),
    seed=seeds,
    more=st.integers(1, 6),
    method=st.sampled_from(METHODS),
    spectrum=st.sampled_from(["free", "full", "normalized", "bounded"]),
)
def test_growing_leaves_the_weight_and_truncating_takes_it_back(
    shape: TTShape, seed: int, more: int, method: str, spectrum: str
) -> None:
    torch.manual_seed(seed)
    weight = make_weight(method, shape, spectrum, "random", dtype=torch.float64)
    before = weight().detach()
    wanted = TTShape(shape.out_modes, shape.in_modes, rank=max(shape.ranks) + more)
    grown: Any = grow_(weight, max(shape.ranks) + more)
    assert grown.shape == wanted
    torch.testing.assert_close(grown().detach(), before, rtol=0, atol=1e-10)
    assert grown.tt().orthonormality_error() < 1e-10
    back: Any = truncate_(grown, 1.0)
    assert all(a <= b for a, b in zip(back.shape.ranks, shape.ranks, strict=True))
    assert back.shape.rank == shape.rank
    torch.testing.assert_close(back().detach(), before, rtol=0, atol=1e-10)


@given(
    shape=shapes(max_modes=4),
    seed=seeds,
    energy=st.floats(0.05, 1.0),
    spectrum=st.sampled_from(["free", "full"]),
)
def test_the_energy_is_kept(shape: TTShape, seed: int, energy: float, spectrum: str) -> None:
    W = normal(seed, shape.d_out, shape.d_in)
    weight = make_weight("riemannian", shape, spectrum, tt_svd(W, shape))
    before = weight().detach()
    lower: Any = truncate_(weight, energy)
    lost = (lower().detach() - before).norm() ** 2
    assert lost <= (1 - energy + 1e-12) * before.norm() ** 2
    assert all(a <= b for a, b in zip(lower.shape.ranks, shape.ranks, strict=True))


@given(seed=seeds, energy=st.floats(0.05, 0.999))
def test_with_one_mode_a_side_it_is_the_lowest_rank(seed: int, energy: float) -> None:
    shape = TTShape.svd(12, 9, 7)
    weight = make_weight("householder", shape, init=tt_svd(normal(seed, 12, 9), shape))
    s2 = torch.linalg.svdvals(weight().detach())[:7].square()
    lower: Any = truncate_(weight, energy)
    enough = (s2.cumsum(0) >= energy * s2.sum()).nonzero()[0, 0] + 1
    assert lower.shape.rank == int(enough)
    U, s, V = torch.linalg.svd(weight().detach())
    best = (U[:, :enough] * s[:enough]) @ V[:enough]
    torch.testing.assert_close(lower().detach(), best, rtol=0, atol=1e-9)


@every_method
@pytest.mark.parametrize("kind", ["sttp", "svdp"])
def test_whole_networks(method: str, kind: str) -> None:
    model = network(method, kind)
    model[4].spectral_weight.requires_grad_(False)
    layers, before = list(model), dense(model)
    x = torch.randn(3, 8, 3, 3, dtype=torch.float64)
    y = model(x).detach()
    assert grow_(model, 6, generator=torch.Generator().manual_seed(1)) is model
    assert list(model) == layers
    for a, b in zip(dense(model), before, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    torch.testing.assert_close(model(x).detach(), y)
    assert [m.shape.rank for m in model.modules() if isinstance(m, SpectralWeight)] == [6, 6, 6]
    assert not model[4].spectral_weight.trainable
    assert model[2].spectral_weight.trainable
    assert truncate_(model, rank=3) is model
    for m in model.modules():
        if isinstance(m, SpectralWeight):
            assert (m.shape.rank, m.method) == (3, method)
    truncate_(model, tol=0.0)
    model(x).sum().backward()


@every_method
@pytest.mark.parametrize("spectrum", ["free", "full", "normalized", "bounded"])
def test_new_directions_are_not_stuck(method: str, spectrum: str) -> None:
    """The gradient moves the new singular values first, and then what belongs to them."""
    torch.manual_seed(0)
    shape = TTShape.for_matrix(12, 10, 3)
    weight: Any = make_weight(method, shape, spectrum, "random", dtype=torch.float64)
    weight = grow_(weight, 5)
    before = weight.tt().detach()
    target = torch.randn(12, 10, dtype=torch.float64)
    optimizer = RiemannianAdam(weight.parameters(), lr=0.02)
    for step in range(3):
        optimizer.zero_grad()
        (weight() - 0.2 * target).square().sum().backward()
        optimizer.step()
        if step == 0:
            assert int((weight.tt().singular_values() > 1e-4).sum()) == 5
    assert float((weight.tt().to_matrix() - before.to_matrix()).detach().norm()) > 0.01


@every_method
def test_ties_and_optimizers(method: str) -> None:
    a = network(method)
    tied = nn.ModuleList([a, nn.Sequential(a[2])])
    optimizer = RiemannianAdam(tied.parameters(), lr=0.1)
    truncate_(tied, rank=2)
    assert tied[0][2].spectral_weight is tied[1][0].spectral_weight
    assert a[2].spectral_weight.shape.rank == 2
    with pytest.raises(OptimizerError):
        check_optimizer(optimizer, tied)


@every_method
def test_fixed_values_that_are_left_are_kept(method: str) -> None:
    weight: Any = make_weight(
        method, TTShape.svd(9, 8, 4), "fixed", "random", values=[4, 3, 2, 1], dtype=torch.float64
    )
    lower: Any = truncate_(weight, rank=2)
    torch.testing.assert_close(
        lower.tt().singular_values().detach(), torch.tensor([4.0, 3.0], dtype=torch.float64)
    )


@every_method
def test_what_cannot_change_is_refused_and_nothing_has_changed(method: str) -> None:
    model = network(method)
    model.append(compress(nn.Linear(10, 10).double(), 4, init="eye", spectrum="identity"))
    parts, state = list(model.modules()), copy.deepcopy(model.state_dict())
    for call in (lambda: truncate_(model, rank=2), lambda: grow_(model, 6)):
        with pytest.raises(SpectrumError, match=r"'5\.spectral_weight'.*identity"):
            call()
        assert list(model.modules()) == parts
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    fixed = make_weight(method, TTShape.svd(9, 8, 4), "fixed")
    with pytest.raises(SpectrumError, match="fixed"):
        grow_(fixed, 6)
    assert grow_(fixed, 3) is fixed


@pytest.mark.parametrize(
    "how", [{}, {"energy": 0.9, "rank": 2}, {"energy": 0.0}, {"energy": 1.1}, {"tol": 1.0}]
)
def test_arguments_that_are_none(how: dict[str, Any]) -> None:
    with pytest.raises(ConversionError):
        truncate_(network("householder"), **how)


def test_other_models() -> None:
    with pytest.raises(ConversionError, match="compress"):
        truncate_(nn.Linear(3, 3), 0.9)
    with pytest.raises(ShapeError, match="rank"):
        grow_(network("householder"), 0)
    with torch.device("meta"):
        weight = make_weight("householder", TTShape.svd(9, 8, 4))
    with pytest.raises(ConversionError, match="meta"):
        truncate_(weight, 0.9)


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_lower_precision(method: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight: Any = make_weight(method, TTShape.for_matrix(24, 20, 4), init="random", dtype=dtype)
    grown: Any = grow_(weight, 6)
    assert grown.dtype == dtype
    gap = (grown() - weight()).detach().float().norm() / weight().detach().float().norm()
    assert float(gap) < 8 * torch.finfo(dtype).eps
