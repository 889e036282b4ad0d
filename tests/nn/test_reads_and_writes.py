"""`layer.weight` as foreign code has it: read often, written into, assigned, tied."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks_together import DOUBLE
from torch import Tensor, nn
from ways_to_hold import every_method

from sttp_manifold import tt_svd
from sttp_manifold.errors import ConversionError, ShapeError
from sttp_manifold.nn import SpectralConv2d, SpectralLinear, compress, frame_batch, together


class Reader(nn.Module):
    """A layer whose weight is read many times, as in T5."""

    def __init__(self, method: str) -> None:
        super().__init__()
        self.inner = SpectralLinear(20, 20, 2, method=method, init="random", **DOUBLE)
        self.wide = SpectralLinear(60, 60, 24, method=method, init="random", bias=False, **DOUBLE)
        self.writes = False

    def forward(self, x: Tensor) -> Tensor:
        y = sum(x @ self.inner.weight.mT for _ in range(6))
        if self.writes:
            with torch.no_grad():
                next(self.inner.spectral_weight.parameters()).mul_(1.01)
            y = y + sum(x @ self.inner.weight.mT for _ in range(6))
        return self.inner(y) + (self.wide.weight.mT @ self.wide.weight)[0, :20]


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    y = model(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), list(model.parameters()))]


@every_method
def test_a_weight_is_formed_once_a_forward_however_often_it_is_read(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = Reader(method), torch.randn(3, 20, **DOUBLE)
    wanted = gradients(model, x)
    together(model)
    calls: list[int] = []
    form = frame_batch.form
    monkeypatch.setattr(frame_batch, "form", lambda *a: calls.append(1) or form(*a))
    found = gradients(model, x)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    assert len(calls) <= 2  # each weight once more, dense
    calls.clear()
    with torch.no_grad():
        torch.testing.assert_close(model(x), wanted[0])
    assert len(calls) <= 2


@every_method
def test_reads_are_never_stale(method: str) -> None:
    model, x = Reader(method), torch.randn(3, 20, **DOUBLE)
    model.writes = True
    twin = together(copy.deepcopy(model))
    for _ in range(3):
        with torch.no_grad():
            torch.testing.assert_close(twin(x), model(x), rtol=1e-10, atol=1e-12)


@every_method
def test_losses_of_one_read_weight_are_passed_back_one_by_one(method: str) -> None:
    class Two(Reader):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([(x @ self.inner.weight.mT).sum(), self.inner.weight.sin().sum()])

    model, x = Two(method), torch.randn(3, 20, **DOUBLE)
    twin = together(copy.deepcopy(model))
    for m in (model, twin):
        first, second = m(x).unbind()
        first.backward(retain_graph=True)
        second.backward()
    for p, q in zip(model.inner.parameters(), twin.inner.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def layers(method: str) -> list[Any]:
    how: Any = {"method": method, "init": "random", **DOUBLE}
    return [SpectralLinear(12, 10, 3, **how), SpectralConv2d(4, 6, 3, rank=3, **how)]


WRITES: list[Callable[[Any, Tensor], object]] = [
    lambda layer, W: nn.init.zeros_(layer.weight),
    lambda layer, W: nn.init.kaiming_uniform_(layer.weight),
    lambda layer, W: layer.weight.data.copy_(W),
    lambda layer, W: layer.weight.data.normal_(),
    lambda layer, W: layer.weight.mul_(2),
    lambda layer, W: layer.weight.__setitem__(0, 0.0),
    lambda layer, W: torch.mul(W, 2, out=layer.weight),
    lambda layer, W: layer.weight.data.__iadd__(1),
    lambda layer, W: setattr(layer.weight, "data", W),
]


@every_method
@pytest.mark.parametrize("write", WRITES)
def test_what_would_be_lost_is_refused(method: str, write: Callable[[Any, Tensor], object]) -> None:
    for layer in layers(method):
        before = layer.weight.detach().clone()
        with torch.no_grad(), pytest.raises(ConversionError, match="encode_"):
            write(layer, before)
        for value in (nn.Parameter(before), None, nn.Linear(3, 3)):
            with pytest.raises(ConversionError, match="decompress"):
                layer.weight = value
        assert torch.equal(layer.weight, before)


@every_method
def test_what_is_read_may_be_used(method: str) -> None:
    for layer in layers(method):
        W = layer.weight
        assert type(W + 1) is type(W.sum()) is type(W.detach().clone()) is Tensor
        assert W.requires_grad
        W.retain_grad()
        W.square().sum().backward()
        torch.testing.assert_close(W.grad, 2 * W)
        parameter = nn.Parameter(layer.weight)
        parameter.data.zero_()
        torch.nn.init.ones_(parameter)
        assert bool((parameter == 1).all())
        layer.weight.detach().requires_grad_()
        for made in (parameter, layer.weight.detach()):
            twins = copy.deepcopy(made), pickle.loads(pickle.dumps(made))
            assert all(type(twin) in (Tensor, nn.Parameter) for twin in twins)
            assert all(torch.equal(twin, made) for twin in twins)


@every_method
def test_tensors_are_taken_over_if_the_ranks_carry_them(method: str) -> None:
    for layer, other in zip(layers(method), layers(method), strict=True):
        W = other.weight.detach().clone()
        layer.weight = W
        torch.testing.assert_close(layer.weight.detach(), W, rtol=1e-9, atol=1e-11)
        before = layer.weight.detach().clone()
        with pytest.raises(ConversionError, match="would be lost"):
            layer.weight = torch.randn_like(W)
        with pytest.raises(ShapeError, match="shape"):
            layer.weight = W[:2]
        torch.testing.assert_close(layer.weight.detach(), before)
        weight = layer.spectral_weight
        weight.encode_(tt_svd(torch.randn_like(W).flatten(1), weight.shape))


@every_method
def test_tying_by_assignment(method: str) -> None:
    for a, b in zip(layers(method), layers(method), strict=True):
        a.weight = b.weight
        assert a.spectral_weight is b.spectral_weight
    linear, conv = layers(method)
    with pytest.raises((ConversionError, ShapeError)):
        linear.weight = conv.weight


def test_the_weight_is_plain_inside_of_a_forward() -> None:
    """Fast paths of torch, as that of its transformers, are for plain tensors."""

    class Watcher(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(type(model[0].weight))
            return super().forward(x)

    seen: list[type] = []
    model = nn.Sequential(nn.Linear(12, 10), Watcher(10, 10))
    compress(model, 2, skip=["1"])
    model(torch.randn(2, 12))
    torch.func.functional_call(model, dict(model.named_parameters()), (torch.randn(2, 12),))
    assert set(seen) == {Tensor}
