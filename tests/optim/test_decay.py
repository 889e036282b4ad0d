"""Weight decay is of the weight: in charts by `decay_weights`, on manifolds by their optimizers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import sttp_manifold as sm
from sttp_manifold.errors import OptimizerError
from sttp_manifold.tt import SPECTRA

DOUBLE: Any = {"dtype": torch.float64}


def layer(method: str, spectrum: str = "free", seed: int = 0, rank: int = 3) -> Any:
    torch.manual_seed(seed)
    return sm.nn.SpectralLinear(
        12, 10, rank, method=method, spectrum=spectrum, init="random", bias=False, **DOUBLE
    )


def still(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = torch.zeros_like(p)


def cosine(a: Tensor, b: Tensor) -> float:
    return float(nn.functional.cosine_similarity(a.flatten(), b.flatten(), 0))


@given(
    st.sampled_from(["free", "full"]),
    st.floats(1e-4, 0.5),
    st.floats(0, 1),
    st.integers(0, 100),
    st.integers(1, 8),
)
def test_a_step_without_gradient_is_a_multiple_of_the_weight(
    spectrum: str, lr: float, decay: float, seed: int, rank: int
) -> None:
    chart, point = (layer(m, spectrum, seed, rank) for m in ("householder", "riemannian"))
    steps: list[tuple[Any, Any]] = [
        (chart, torch.optim.AdamW(sm.optim.param_groups(chart), lr=lr)),
        (point, sm.optim.RiemannianAdam(
            sm.optim.param_groups(point, weight_decay=decay), lr=lr, decoupled_weight_decay=True
        )),
    ]  # fmt: skip
    sm.optim.decay_weights(steps[0][1], chart, decay)
    for model, optimizer in steps:
        before = model.weight.detach().clone()
        still(model)
        optimizer.step()
        torch.testing.assert_close(
            model.weight.detach(), (1 - lr * decay) * before, rtol=1e-9, atol=1e-11
        )


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_other_spectra_take_a_step_along_the_slope_of_the_norm(spectrum: str) -> None:
    model = layer("householder", spectrum)
    weight = model.spectral_weight
    theta = weight.coordinates
    (slope,) = torch.autograd.grad(weight().square().sum() / 2, theta)
    wanted = theta.detach() - 1e-3 * slope
    weight.decay_(1e-3)
    torch.testing.assert_close(theta.detach(), wanted, rtol=1e-9, atol=1e-10)


def test_the_trap_and_the_way_out() -> None:
    """What AdamW does to a chart that gets no gradient, and what it does with this."""
    plain, right = layer("householder"), layer("householder")
    start = plain.weight.detach().clone()
    trap = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.3)
    groups = sm.optim.param_groups(right, weight_decay=0.3)
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    handle = sm.optim.decay_weights(optimizer, right, 0.3)
    for _ in range(500):
        for model, step in ((plain, trap), (right, optimizer)):
            still(model)
            step.step()
    assert cosine(plain.weight.detach(), start) < 0.9
    assert cosine(right.weight.detach(), start) > 1 - 1e-9
    shrunk = float(right.weight.detach().norm() / start.norm())
    assert shrunk == pytest.approx((1 - 1e-2 * 0.3) ** 500, rel=1e-6)
    handle.remove()
    before = right.weight.detach().clone()
    optimizer.step()
    assert torch.equal(right.weight, before)


def test_one_without_a_gradient_stays_and_tensors_are_rates() -> None:
    model = nn.ModuleList([layer("householder"), layer("householder")])
    groups = sm.optim.param_groups(model, lr=torch.tensor(0.1, **DOUBLE))
    optimizer = torch.optim.AdamW(groups, foreach=False, capturable=False)
    sm.optim.decay_weights(optimizer, model, 0.5)
    before = [m.weight.detach().clone() for m in model]
    still(model[0])
    optimizer.step()
    torch.testing.assert_close(model[0].weight.detach(), 0.95 * before[0])
    assert torch.equal(model[1].weight, before[1])


def test_what_would_do_nothing_or_harm_is_refused() -> None:
    chart, point = layer("householder"), layer("riemannian")
    adam = torch.optim.AdamW(chart.parameters(), lr=1e-3)
    with pytest.raises(OptimizerError, match="param_groups"):
        sm.optim.decay_weights(adam, chart, 0.1)
    with pytest.raises(OptimizerError, match="points of manifolds"):
        sm.optim.decay_weights(sm.optim.RiemannianAdam(point.parameters()), point, 0.1)
    with pytest.raises(OptimizerError, match="finite number"):
        sm.optim.decay_weights(adam, chart, -1.0)
