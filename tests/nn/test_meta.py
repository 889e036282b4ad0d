"""Networks without numbers: on ``meta``, fake, lazy, and with entries that are not finite."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from ways_to_hold import METHODS, every_method

from sttp_manifold.errors import ConversionError, ShapeError, SpectrumError
from sttp_manifold.nn import (
    SpectralConv2d,
    SpectralLinear,
    compress,
    decompress,
    spectral_penalty,
    summary,
    switch,
)
from sttp_manifold.tt import SPECTRA

WITHOUT: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "meta": lambda: torch.device("meta"),
    "fake": FakeTensorMode,
}

every_spectrum = pytest.mark.parametrize("spectrum", SPECTRA)
every_way = pytest.mark.parametrize("without", WITHOUT.values(), ids=WITHOUT)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(16, 12))


def compressed(method: str = "householder", spectrum: str = "free") -> nn.Sequential:
    model = network()
    compress(model, rank=4, method=method, spectrum=spectrum, project=True, grow="allow")
    return model


@every_way
@every_method
def test_pretrained_weights_without_numbers_are_refused(
    without: Callable[[], AbstractContextManager[Any]], method: str
) -> None:
    with without():
        model = network()
        before = list(model.modules())
        with pytest.raises(ConversionError, match=r"'0'.*holds no numbers.*init=") as caught:
            compress(model, rank=4, method=method)
        with pytest.raises(ConversionError, match="holds no numbers"):
            SpectralLinear.from_layer(model[2], 4)
        with pytest.raises(ConversionError, match="holds no numbers"):
            SpectralConv2d.from_layer(model[0], 4)
    assert caught.value.layer == "0"
    assert list(model.modules()) == before


@every_method
@every_spectrum
def test_networks_on_meta(method: str, spectrum: str) -> None:
    here, meta = compressed(method, spectrum), compressed(method, spectrum).to("meta")
    assert summary(meta).total == summary(here).total
    assert all(row.top != row.top for row in summary(meta).rows)
    assert spectral_penalty(meta, "d_optimal").device.type == "meta"
    other = METHODS[1 - METHODS.index(method)]
    for change in (lambda m: switch(m, other), decompress):
        change(here)
        change(meta)
        sizes = {name: p.shape for name, p in here.named_parameters()}
        assert {name: p.shape for name, p in meta.named_parameters()} == sizes
        assert {p.device.type for p in meta.parameters()} == {"meta"}


@every_method
@every_spectrum
@pytest.mark.parametrize("init", ["eye", "noisy_eye", "random"])
def test_to_empty_and_a_loaded_state_give_the_same_network(
    method: str, spectrum: str, init: str
) -> None:
    here = compressed(method, spectrum)
    with torch.device("meta"):
        model = network()
        compress(model, rank=4, method=method, spectrum=spectrum, init=init, grow="allow")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    model.to_empty(device="cpu").load_state_dict(here.state_dict())
    x = torch.randn(2, 8, 3, 3)
    assert torch.equal(model(x), here(x))


@every_method
def test_networks_of_fake_tensors(method: str) -> None:
    with FakeTensorMode():
        model = network()
        compress(model, rank=4, method=method, init="eye", grow="allow")
        assert summary(model).total.dense == summary(network()).total.dense
        assert spectral_penalty(model, "d_optimal").shape == ()
        assert model(torch.randn(2, 8, 3, 3)).shape == (2, 12)
        switch(model, METHODS[1 - METHODS.index(method)])
        assert model(torch.randn(2, 8, 3, 3)).shape == (2, 12)
        decompress(model)
        assert model(torch.randn(2, 8, 3, 3)).shape == (2, 12)


@every_method
def test_skip_init(method: str) -> None:
    layer = nn.utils.skip_init(SpectralLinear, 12, 8, 3, method=method)
    assert {p.device.type for p in layer.parameters()} == {"cpu"}
    source = SpectralLinear(12, 8, 3, method=method, init="random")
    layer.load_state_dict(source.state_dict())
    x = torch.randn(4, 12)
    assert torch.equal(layer(x), source(x))
    made = compress(nn.Sequential(nn.utils.skip_init(nn.Linear, 12, 8)), 3, init="eye")
    assert isinstance(made[0], SpectralLinear)


def test_lazy_layers_are_named_and_count_as_nothing() -> None:
    model = nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyLinear(4))
    assert summary(model).rows == ()
    assert decompress(model) is model
    with pytest.raises(ConversionError, match=r"'0'.*first input") as caught:
        compress(model, rank=2)
    assert caught.value.layer == "0"


@every_method
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_entries_that_are_not_finite_are_named(method: str, value: float) -> None:
    model = network()
    with torch.no_grad():
        model[2].weight[1, 2] = value
    with pytest.raises(ShapeError, match=r"'2'.*not finite"):
        compress(model, rank=2, method=method)
    made = compressed(method)
    name, parameter = next(made[2].spectral_weight.named_parameters())
    with torch.no_grad():
        parameter.view(-1)[0] = value
    kept = list(made.modules())
    with pytest.raises((ShapeError, SpectrumError), match=rf"'2\.spectral.*{name} .*not finite"):
        switch(made, METHODS[1 - METHODS.index(method)])
    assert list(made.modules()) == kept
    if method == "riemannian":
        assert made[2].spectral_weight.bond().shape == (4,)
        assert summary(made).rows[1].top > 0
