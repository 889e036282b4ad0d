"""Networks of spectral layers learn, by each method, kind and spectrum."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from ways_to_hold import METHODS

from sttp_manifold.errors import OptimizerError
from sttp_manifold.nn import RiemannianWeight, SpectralWeight, compress, spectral_penalty, switch
from sttp_manifold.optim import RiemannianAdam, check_optimizer
from sttp_manifold.tt import SPECTRA

# The second moment of a frame is one number, so its step is shorter at equal lr.
LR = {"householder": 1e-2, "riemannian": 1e-1}


def problem() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """Classes of small images, told apart by a network with a convolution and a linear layer."""
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 12), nn.Linear(12, 4)
    )
    y = torch.arange(64) % 4
    patterns = torch.randn(4, 2, 4, 4)
    return model, patterns[y] + 0.3 * torch.randn(64, 2, 4, 4), y


def train(model: nn.Module, x: torch.Tensor, y: torch.Tensor, steps: int) -> list[float]:
    if any(isinstance(m, RiemannianWeight) for m in model.modules()):
        optimizer: torch.optim.Optimizer = RiemannianAdam(model.parameters(), lr=LR["riemannian"])
    else:
        optimizer = torch.optim.Adam(model.parameters(), lr=LR["householder"])
    check_optimizer(optimizer, model)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["sttp", "svdp"])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_loss_goes_down_and_the_constraint_holds(method: str, kind: str, spectrum: str) -> None:
    model, x, y = problem()
    compress(model, 4, kind=kind, method=method, spectrum=spectrum, init="random", grow="allow")
    losses = train(model, x, y, 40)
    assert losses[-1] < (0.5 if spectrum == "fixed" else 0.35) * losses[0]
    for weight in model.modules():
        if isinstance(weight, SpectralWeight):
            assert weight.tt().orthonormality_error() < 1e-5
            top = float(torch.linalg.svdvals(weight().detach())[0])
            if spectrum == "fixed":
                s = torch.linalg.svdvals(weight().detach())[: weight.shape.rank]
                wanted = torch.linspace(1, 1 / len(s), len(s))
                torch.testing.assert_close(s, wanted, rtol=0, atol=1e-5)
            if spectrum in ("identity", "normalized"):
                assert top == pytest.approx(1, abs=1e-4)
            if spectrum == "bounded":
                assert top <= 1 + 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_training_goes_on_after_a_switch(method: str) -> None:
    model, x, y = problem()
    compress(model, 4, method=method, grow="allow")
    first = train(model, x, y, 15)
    switch(model, METHODS[1 - METHODS.index(method)])
    second = train(model, x, y, 25)
    # The first loss after the switch is that of the same weights.
    assert second[0] <= 1.05 * first[-1]
    assert second[-1] < 0.5 * second[0]


def test_a_euclidean_optimizer_on_the_manifold_is_caught() -> None:
    model, _, _ = problem()
    compress(model, 4, method="riemannian", grow="allow")
    with pytest.raises(OptimizerError, match=r"'0\.spectral_weight\.point'.*RiemannianAdam"):
        check_optimizer(torch.optim.Adam(model.parameters()), model)


def test_a_penalty_joins_the_loss() -> None:
    model, x, y = problem()
    compress(model, 4)
    loss = nn.functional.cross_entropy(model(x), y) + 0.1 * spectral_penalty(model, "d_optimal")
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_frozen_weights_do_not_move() -> None:
    model, x, y = problem()
    model[0].weight.requires_grad_(False)
    compress(model, 4)
    before = model[0].weight.detach().clone()
    train(model, x, y, 3)
    assert torch.equal(model[0].weight, before)
