"""A training that is resumed from states is the one that went on, bit for bit."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from networks_together import Net
from torch import Tensor, nn
from ways_to_hold import every_method

from sttp_manifold.nn import SpectralConv2d, SpectralLinear, together
from sttp_manifold.optim import RiemannianAdam


def network(method: str, seed: int) -> Net:
    torch.manual_seed(seed)
    return Net(method).float()


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, count: int) -> Tensor:
    for k in range(first, first + count):
        x = torch.randn(4, 8, 4, 4, generator=torch.Generator().manual_seed(k))
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
    return loss.detach()


@every_method
@pytest.mark.parametrize("on", [True, False], ids=["together", "alone"])
def test_resumed_training_is_the_same_bit_for_bit(method: str, on: bool) -> None:
    kind = torch.optim.Adam if method == "householder" else RiemannianAdam
    model = together(network(method, 0), on)
    optimizer = kind(model.parameters(), lr=1e-2)
    steps(model, optimizer, 0, 5)
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    wanted = steps(model, optimizer, 5, 5)

    file.seek(0)
    states = torch.load(file)
    other = together(network(method, 1), on)
    other_optimizer = kind(other.parameters(), lr=1e-2)
    other.load_state_dict(states[0])
    other_optimizer.load_state_dict(states[1])
    assert torch.equal(steps(other, other_optimizer, 5, 5), wanted)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@every_method
@pytest.mark.parametrize("on", [True, False], ids=["together", "alone"])
def test_the_first_forward_is_that_of_every_later_one(method: str, on: bool) -> None:
    model = together(network(method, 0), on)
    x = torch.randn(3, 8, 4, 4)
    outputs = [model(x).detach() for _ in range(3)]
    outputs.append(together(copy.deepcopy(model), on)(x).detach())
    with torch.no_grad():
        outputs += [model(x), model(x)]
    assert all(torch.equal(y, outputs[0]) for y in outputs)
    alone = nn.ModuleList([SpectralLinear(12, 8, 3), SpectralConv2d(4, 6, 3, 3)])
    for layer, size in zip(alone, [(5, 12), (2, 4, 6, 6)], strict=True):
        rows = torch.randn(size)
        assert torch.equal(layer(rows), layer(rows))
