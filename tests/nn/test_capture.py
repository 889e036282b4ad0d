"""A training step to be captured: ordinary on the CPU, and a warm-up that leaves no trace."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sttp_manifold.errors import ConversionError, OptimizerError, ShapeError
from sttp_manifold.nn import capture_step, compress
from sttp_manifold.nn.capture import rewound
from sttp_manifold.optim import RiemannianAdam, RiemannianMuon, RiemannianSGD

OPTIMIZERS = {
    "adam": lambda p: RiemannianAdam(p, lr=0.01, amsgrad=True),
    "sgd": lambda p: RiemannianSGD(p, lr=0.1, momentum=0.9),
    "muon": lambda p: RiemannianMuon(p, lr=0.03),
}


def network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 6))
    return compress(net, rank=3, method="riemannian")


def loss_fn(model, x, y):
    return (model(x) - y).square().mean()


def batch(seed):
    torch.manual_seed(seed)
    return torch.randn(8, 12), torch.randn(8, 6)


def train(model, optimizer, seeds):
    for seed in seeds:
        optimizer.zero_grad()
        loss_fn(model, *batch(seed)).backward()
        optimizer.step()


@pytest.mark.parametrize("name", ["adam", "sgd", "muon"])
def test_on_the_cpu_it_is_an_ordinary_step(name):
    a, b = network(), network()
    step = capture_step(a, OPTIMIZERS[name](a.parameters()), loss_fn, batch(0))
    optimizer = OPTIMIZERS[name](b.parameters())
    for seed in range(4):
        loss = step(*batch(seed))
        assert not loss.requires_grad
        train(b, optimizer, [seed])
    for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("name", ["adam", "sgd", "muon"])
def test_a_warm_up_leaves_no_trace(name, begun):
    a = network()
    optimizer = OPTIMIZERS[name](a.parameters())
    if begun:
        train(a, optimizer, [5])
    b = copy.deepcopy(a)
    other = OPTIMIZERS[name](b.parameters())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    places = [p.data_ptr() for p in a.parameters()]
    with rewound(a, optimizer):
        train(a, optimizer, [1, 2])
    assert places == [p.data_ptr() for p in a.parameters()]
    train(a, optimizer, [3, 4])
    train(b, other, [3, 4])
    for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_captured_is_said():
    model = network()
    optimizer = RiemannianAdam(model.parameters())
    with pytest.raises(
        ConversionError, match=r"capture_step\(model, optimizer, loss_fn, \(x, y\)\)"
    ):
        capture_step(model, optimizer, loss_fn, [])
    with pytest.raises(ConversionError, match=r"cpu, meta.*model\.to\(device\)"):
        capture_step(model, optimizer, loss_fn, [torch.ones(2, 12, device="meta")])
    step = capture_step(model, optimizer, loss_fn, batch(0))
    with pytest.raises(ShapeError, match="drop_last=True"):
        step(torch.ones(3, 12), torch.ones(3, 6))


def test_an_optimizer_that_counts_on_the_host_is_refused_on_cuda():
    with FakeTensorMode():
        model = nn.Module()
        model.p = nn.Parameter(torch.empty(3, 2, device="cuda"))
        x = torch.empty(4, 3, device="cuda")
        with pytest.raises(OptimizerError, match=r"Adam\(.*capturable=True\)"):
            capture_step(model, torch.optim.Adam(model.parameters()), loss_fn, [x])
