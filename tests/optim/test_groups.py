"""Which parameters decay, and at which rates they move."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sttp_manifold as sm
from sttp_manifold._geoopt import EuclideanStiefel, ManifoldParameter
from sttp_manifold.errors import OptimizerError


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 20)
        self.on_manifold = sm.nn.SpectralLinear(20, 18, rank=3, method="riemannian")
        self.in_chart = sm.nn.SpectralLinear(18, 20, rank=3)
        self.conv = nn.Conv2d(3, 4, 3)
        self.norms = nn.ModuleList(
            [nn.LayerNorm((4, 5)), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.RMSNorm((4, 5))]
        )
        self.frame = ManifoldParameter(EuclideanStiefel().random(6, 3))
        self.head = nn.Linear(20, 11)
        self.head.weight = self.embed.weight
        self.frozen = nn.Parameter(torch.ones(3, 3), requires_grad=False)
        self.attention = nn.MultiheadAttention(20, 2)


@pytest.fixture
def model():
    return Model()


def names(model, groups):
    names = {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}
    return {group["name"]: {names[id(p)] for p in group["params"]} for group in groups}


def test_parameters_are_sorted_by_what_they_are(model):
    groups = sm.optim.param_groups(model, weight_decay=0.1)
    sorted_ = names(model, groups)
    assert sorted_["spectral weights"] == {"on_manifold.spectral_weight.point"}
    assert sorted_["other manifolds"] == {"frame"}
    assert sorted_["chart coordinates"] == {"in_chart.spectral_weight.coordinates"}
    assert sorted_["weights"] == {
        "head.weight",
        "conv.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
    }
    decaying = {group["name"] for group in groups if group["weight_decay"]}
    assert decaying == {"spectral weights", "weights"}
    assert {group["weight_decay"] for group in groups} == {0.1, 0.0}
    every = [p for group in groups for p in group["params"]]
    assert len(every) == len({id(p) for p in every})
    assert {id(p) for p in every} == {id(p) for p in model.parameters() if p.requires_grad}


def test_rates(model):
    groups = sm.optim.param_groups(model, lr=1e-3, frame_lr=3e-2, spectrum_lr=1e-2)
    rates = {group["name"]: group["lr"] for group in groups}
    assert rates == {
        "spectral weights": 3e-2,
        "other manifolds": 3e-2,
        "chart coordinates": 3e-2,
        "weights": 1e-3,
        "biases and norms": 1e-3,
    }
    assert [group["adam_lr"] for group in groups if "adam_lr" in group] == [1e-2]
    assert not any("lr" in group for group in sm.optim.param_groups(model))
    assert {group["lr"] for group in sm.optim.param_groups(model, lr=0.5)} == {0.5}


@pytest.mark.parametrize("cls", ["RiemannianAdam", "RiemannianSGD", "RiemannianMuon"])
def test_optimizers_take_the_groups(model, cls):
    optimizer = getattr(sm.optim, cls)(
        sm.optim.param_groups(model, weight_decay=0.1, frame_lr=2e-2), lr=1e-3
    )
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    norms = {name: p.detach().norm() for name, p in model.named_parameters()}
    optimizer.step()
    shrunk = {
        name for name, p in model.named_parameters() if p.detach().norm() < norms[name] - 1e-6
    }
    assert "in_chart.spectral_weight.coordinates" not in shrunk
    assert not any("bias" in name or "norm" in name for name in shrunk)
    if cls != "RiemannianAdam":  # whose moments turn any size of a penalty into a whole step
        assert {"embed.weight", "conv.weight"} <= shrunk
    optimizer.load_state_dict(optimizer.state_dict())


def test_a_rate_of_spectra_is_muons(model):
    groups = sm.optim.param_groups(model, frame_lr=2e-2, spectrum_lr=1e-2)
    optimizer = sm.optim.RiemannianMuon(groups)
    assert next(group["adam_lr"] for group in optimizer.param_groups) == 1e-2
    for cls in (sm.optim.RiemannianAdam, sm.optim.RiemannianSGD):
        with pytest.raises(OptimizerError, match=r"got adam_lr=0\.01, a setting of RiemannianMuon"):
            cls(sm.optim.param_groups(model, spectrum_lr=1e-2), lr=1e-3)


def test_a_rate_of_spectra_needs_spectra_on_a_manifold():
    chart = sm.nn.SpectralLinear(18, 20, rank=3)
    with pytest.raises(OptimizerError, match="charts hold frames and spectrum in one"):
        sm.optim.param_groups(chart, spectrum_lr=1e-2)
    with pytest.raises(OptimizerError, match="Linear has no spectral weight on a manifold; call"):
        sm.optim.param_groups(nn.Linear(2, 2), spectrum_lr=1e-2)


def test_a_network_of_plain_layers():
    groups = sm.optim.param_groups(nn.Linear(3, 2), weight_decay=0.1)
    torch.optim.AdamW(groups, lr=1e-3)
    assert [group["name"] for group in groups] == ["weights", "biases and norms"]
