"""`decompress` and `switch`: nothing is lost on the way back or across."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from ways_to_hold import METHODS

from sttp_manifold import TTShape
from sttp_manifold.errors import ConversionError
from sttp_manifold.nn import (
    HouseholderWeight,
    RiemannianWeight,
    SpectralConv2d,
    SpectralLinear,
    SpectralWeight,
    compress,
    decompress,
    make_weight,
    switch,
)
from sttp_manifold.optim import RiemannianAdam
from sttp_manifold.tt import SPECTRA

KINDS = ("sttp", "svdp")


class Net(nn.Module):
    """A convolution, a layer used twice, two tied layers, one without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1, padding_mode="circular")
        self.norm = nn.BatchNorm2d(8)
        self.twice = nn.Linear(12, 12)
        self.alias = self.twice
        self.a = nn.Linear(12, 10, bias=False)
        self.b = nn.Linear(12, 10)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).flatten(1).unflatten(1, (-1, 12))
        x = self.alias(self.twice(x).tanh())
        return self.a(x) * self.b(x)


def image() -> Tensor:
    return torch.randn(2, 3, 12, 12, dtype=torch.float64)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_stock_layers_come_back_with_the_same_outputs(
    method: str, kind: str, spectrum: str
) -> None:
    model, x = Net().double().eval(), image()
    plan, biases = repr(model), [model.conv.bias, model.twice.bias, model.b.bias]
    compress(model, 3, kind=kind, method=method, spectrum=spectrum, project=True)
    y = model(x)
    assert decompress(model) is model
    assert repr(model) == plan
    torch.testing.assert_close(model(x), y, rtol=0, atol=1e-12)
    assert model.alias is model.twice
    assert model.a.weight is model.b.weight
    for a, b in zip(biases, [model.conv.bias, model.twice.bias, model.b.bias], strict=True):
        assert a is b
    assert not model.conv.training
    assert all(p.is_leaf and p.requires_grad for p in model.parameters())


def test_full_rank_there_and_back_is_the_identity() -> None:
    model = Net()
    before = copy.deepcopy(model.state_dict())
    decompress(compress(model, 1000))
    after = model.state_dict()
    assert after.keys() == before.keys()
    for key, value in after.items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=1e-6)


def test_decompress_of_a_layer_and_of_a_stock_network() -> None:
    layer = SpectralConv2d(3, 4, 3, 2)
    back = decompress(layer)
    assert type(back) is nn.Conv2d
    torch.testing.assert_close(back.weight.detach(), layer.weight)
    model = Net()
    modules = list(model.modules())
    assert decompress(model) is model
    assert list(model.modules()) == modules


def test_sharing_that_stock_layers_cannot_express_is_refused() -> None:
    linear = SpectralLinear(12, 8, 3)
    conv = SpectralConv2d(3, 8, 2, 3, weight=linear.spectral_weight)
    model = nn.ModuleList([linear, conv])
    with pytest.raises(ConversionError, match=r"'1' and '0' share a weight") as caught:
        decompress(model)
    assert caught.value.layer == "1"
    assert list(model) == [linear, conv]
    model = nn.ModuleList([linear, nn.Sequential(linear.spectral_weight)])
    with pytest.raises(ConversionError, match=r"'1' shares the weight of '0'"):
        decompress(model)


# -- switch ------------------------------------------------------------------------------------


def trained(method: str, kind: str, spectrum: str, dtype: torch.dtype) -> Net:
    """A network in the middle of its training."""
    model = Net().to(dtype)
    compress(model, 3, kind=kind, method=method, spectrum=spectrum, project=True, grow="allow")
    optimizer = RiemannianAdam(model.parameters(), lr=1e-2)
    x = image().to(dtype)
    for _ in range(5):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
    return model.eval()


def weights(model: nn.Module) -> list[SpectralWeight]:
    return [m for m in model.modules() if isinstance(m, SpectralWeight)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-11), (torch.float32, 1e-5)])
def test_switch_in_the_middle_of_training_loses_nothing(
    method: str, kind: str, spectrum: str, dtype: torch.dtype, atol: float
) -> None:
    model = trained(method, kind, spectrum, dtype)
    other = METHODS[1 - METHODS.index(method)]
    x = image().to(dtype)
    y, before = model(x), [weight().detach() for weight in weights(model)]
    assert switch(model, other) is model
    assert {w.method for w in weights(model)} == {other}
    assert {w.dtype for w in weights(model)} == {dtype}
    assert {w.spectrum for w in weights(model)} == {spectrum}
    for weight, W in zip(weights(model), before, strict=True):
        torch.testing.assert_close(weight(), W, rtol=0, atol=atol)
    torch.testing.assert_close(model(x), y, rtol=0, atol=10 * atol)
    assert model.a.spectral_weight is model.b.spectral_weight
    assert model.alias is model.twice
    assert not model.conv.spectral_weight.training
    switch(model, method)
    for weight, W in zip(weights(model), before, strict=True):
        torch.testing.assert_close(weight(), W, rtol=0, atol=2 * atol)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_method_changes_nothing(method: str) -> None:
    model = compress(Net(), 3, method=method)
    before = [*model.modules(), *model.parameters()]
    switch(model, method)
    after = [*model.modules(), *model.parameters()]
    assert all(a is b for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_switch_keeps_frozen_weights_and_turns_only_the_others(method: str) -> None:
    other = METHODS[1 - METHODS.index(method)]
    model = nn.Sequential(
        SpectralLinear(8, 8, 3, method=method), SpectralLinear(8, 8, 3, method=other)
    )
    model[0].spectral_weight.requires_grad_(False)
    kept = model[1].spectral_weight
    switch(model, other)
    assert not any(p.requires_grad for p in model[0].spectral_weight.parameters())
    assert model[0].spectral_weight.method == other
    assert model[1].spectral_weight is kept


def test_switch_of_a_weight_a_layer_and_a_plain_network() -> None:
    weight = make_weight("householder", TTShape.for_matrix(8, 6, 3), init="random")
    other = switch(weight, "riemannian")
    assert isinstance(other, RiemannianWeight)
    torch.testing.assert_close(other(), weight())
    layer = SpectralLinear(8, 6, 3)
    assert switch(layer, "riemannian") is layer
    assert isinstance(layer.spectral_weight, RiemannianWeight)
    for bad in ("cayley", ""):
        with pytest.raises(ConversionError, match="'householder', 'riemannian'"):
            switch(layer, bad)
    with pytest.raises(ConversionError, match="no spectral weights"):
        switch(nn.Linear(3, 3), "riemannian")


@pytest.mark.parametrize("method", METHODS)
def test_a_spectrum_that_rounds_onto_its_bound_survives(method: str) -> None:
    """In float32, ``theta = 1e4`` is a singular value of exactly the bound."""
    how: Any = {"spectrum": "bounded", "bound": 1.5}
    weight = make_weight(method, TTShape.for_matrix(8, 6, 3), **how)
    with torch.no_grad():
        if isinstance(weight, HouseholderWeight):
            weight.coordinates.fill_(1e4)
        elif isinstance(weight, RiemannianWeight):
            weight.point[weight.manifold.spectrum_slice] = 1e4
    assert float(weight.bond().detach().abs().max()) == 1.5
    other = switch(weight, METHODS[1 - METHODS.index(method)])
    torch.testing.assert_close(other(), weight(), rtol=0, atol=1e-5)
