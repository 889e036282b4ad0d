"""Spectral weights behind the tensors of modules that keep their forward."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sttp_manifold.errors import ShapeError
from sttp_manifold.nn import compress, decompress, summary, switch, weights_of
from sttp_manifold.nn.held import held_in
from sttp_manifold.nn.stack import MatrixView
from sttp_manifold.nn.stock import TABLE, Row

DOUBLE: Any = {"dtype": torch.float64}


class Experts(nn.Module):
    """Three matrices in one tensor, and a transposed one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(3, 6, 4, **DOUBLE))
        self.scale = nn.Parameter(torch.ones(6, **DOUBLE))
        self.back = nn.Parameter(torch.randn(6, 5, **DOUBLE))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.first.mT * self.scale).sum(0) @ self.back


def views(module: nn.Module) -> dict[str, MatrixView]:
    how: dict[str, Any] = {"first": {"count": 3, "stacked": True}, "back": {"order": (1, 0)}}
    return {
        n: MatrixView(tuple(p.shape), **how[n])
        for n, p in module._parameters.items()
        if n in how and p is not None
    }


@pytest.fixture(autouse=True)
def row() -> Iterator[Row]:
    row = Row(Experts, None, views=views)
    TABLE.append(row)
    yield row
    TABLE.remove(row)


def made(rank: int = 100, **how: Any) -> tuple[nn.Module, Any, Tensor, Tensor]:
    torch.manual_seed(3)
    model, x = nn.Sequential(Experts()), torch.randn(3, 7, 4, **DOUBLE)
    y = model(x).detach()
    return compress(model, rank=rank, grow="allow", **how), model[0], x, y


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_compress_and_back() -> None:
    model, experts, x, y = made()
    close(model(x), y)
    assert list(weights_of(experts)) == ["first.0", "first.1", "first.2", "back"]
    table = summary(model)
    assert [(r.layer, r.shape) for r in table.rows] == [("0.first", (3, 6, 4)), ("0.back", (6, 5))]
    assert table.total.dense == 3 * 24 + 6 + 30
    switch(model, "riemannian")
    close(model(x), y)
    decompress(model)
    assert list(model) == [experts]
    assert type(experts) is Experts
    assert list(experts._parameters) == ["first", "scale", "back"]
    close(model(x), y)


def test_copies_are_on_their_own() -> None:
    model, experts, x, y = made()
    twins = [copy.deepcopy(experts), pickle.loads(pickle.dumps(experts)), copy.copy(experts)]
    for twin in twins[:2]:
        close(twin(x), y)
        parametrize.remove_parametrizations(twin, "back")
        close(twin(x), y)
    close(twins[2](x), y)
    close(model(x), y)
    decompress(twins[0])
    close(twins[0](x), y)
    close(model(x), y)
    assert set(held_in(experts)) == {"first", "back"}


def test_states_and_assignments() -> None:
    model, experts, x, _ = made(2)
    other, *_ = made(2)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    low = experts.first.detach().flip(0)
    experts.first = low
    close(experts.first, low)
    with pytest.raises(ShapeError, match=r"\(3, 6, 4\)"):
        experts.first = low[0]


def test_sharing() -> None:
    torch.manual_seed(0)
    model: Any = nn.ModuleList([Experts(), Experts()])
    model[1].first = model[0].first
    compress(model, rank=2, grow="allow")
    one, two = (held_in(m)["first"].weight for m in model)
    assert one is two
    decompress(model)
    assert model[0].first is model[1].first
    assert model[0].back is not model[1].back


def test_what_was_held_stays_so() -> None:
    model, experts, x, y = made()
    parametrize.remove_parametrizations(experts, "back")
    assert list(weights_of(experts)) == ["first.0", "first.1", "first.2"]
    before = held_in(experts)["first"]
    compress(model, rank=100, grow="allow")
    assert held_in(experts)["first"] is before
    assert "back" in weights_of(experts)
    close(model(x), y)


def test_torchs_own_parametrizations_beside_it() -> None:
    model, experts, x, y = made()
    parametrize.register_parametrization(experts, "scale", nn.Identity())
    close(model(x), y)
    close(copy.deepcopy(model)(x), y)
    decompress(model)
    close(model(x), y)
    parametrize.remove_parametrizations(experts, "scale")
    assert type(experts) is Experts
