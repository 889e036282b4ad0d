"""Types of layers that are treated because somebody has said so."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator

import pytest
import torch
from gpt2_layer import conv1d
from torch import Tensor, nn

from sttp_manifold.errors import ConversionError
from sttp_manifold.nn import (
    SkippedLayerWarning,
    SpectralLinear,
    SpectralTransposedLinear,
    compress,
    decompress,
    register,
    summary,
    unregister,
)
from sttp_manifold.nn.stock import TABLE


class Named(nn.Linear):
    """A linear layer that knows more about itself, and computes as ever."""

    def __init__(self, name: str, size: int) -> None:
        super().__init__(size, size)
        self.name = name
        self.register_buffer("calls", torch.zeros(()))

    def title(self) -> str:
        return self.name.upper()


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class SpectralDoubled(SpectralLinear):
    stock = Doubled

    def _stock(self) -> Doubled:
        return Doubled(self.in_features, self.out_features, bias=False, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.fixture(autouse=True)
def _same_table() -> Iterator[None]:
    rows = list(TABLE)
    yield
    TABLE[:] = rows


def test_a_subclass_comes_back_as_what_it_was() -> None:
    model, x = nn.Sequential(Named("first", 20), nn.Linear(20, 20)), torch.randn(3, 20)
    with pytest.warns(SkippedLayerWarning, match="Named"):
        assert type(compress(copy.deepcopy(model), rank=2)[0]) is Named
    assert register(Named) is Named
    whole = compress(copy.deepcopy(model), rank=100, grow="allow")
    torch.testing.assert_close(whole(x), model(x))
    assert type(whole[0]) is SpectralLinear
    assert whole[0].name == "first"
    for layer in (whole, copy.deepcopy(whole), pickle.loads(pickle.dumps(whole))):
        back = decompress(layer)[0]
        assert type(back) is Named
        assert back.title() == "FIRST"
        assert set(back.state_dict()) == {"weight", "bias", "calls"}
        assert set(vars(back)) == set(vars(model[0]))
    thin = decompress(compress(copy.deepcopy(model), rank=2), form="factors")
    assert [type(m) for m in thin[0]] == [nn.Linear, nn.Linear]
    unregister(Named)
    with pytest.warns(SkippedLayerWarning, match="Named"):
        assert type(compress(copy.deepcopy(model), rank=2)[0]) is Named


def test_a_forward_of_its_own_needs_a_layer_of_its_own() -> None:
    with pytest.raises(ConversionError, match="a forward of its own"):
        register(Doubled)
    with pytest.raises(ConversionError, match="stands for a Linear"):
        register(Doubled, SpectralLinear)
    with pytest.raises(ConversionError, match="inherits from none of"):
        register(nn.ReLU)
    with pytest.raises(ConversionError, match="takes a type"):
        register(Doubled(2, 2))  # type: ignore[type-var]
    with pytest.raises(ConversionError, match="subclass of SpectralLayer"):
        register(Doubled, nn.Linear)  # type: ignore[arg-type]
    register(Doubled, SpectralDoubled)
    model, x = nn.Sequential(Doubled(20, 20)), torch.randn(3, 20)
    y = model(x)
    whole = compress(copy.deepcopy(model), rank=100, grow="allow")
    torch.testing.assert_close(whole(x), y)
    assert type(decompress(whole)[0]) is Doubled


def test_gpt2_layers_are_linear_layers_of_the_other_orientation() -> None:
    model = nn.Sequential(conv1d(36, 12), nn.GELU(), conv1d(12, 36))
    wide = nn.Sequential(nn.Linear(12, 36), nn.GELU(), nn.Linear(36, 12))
    compress(model, rank=4)
    assert type(model[0]) is SpectralTransposedLinear
    assert summary(model).Z == summary(compress(wide, rank=4)).Z
    assert model[0].spectral_weight.shape.d_out == 36
    layer = SpectralTransposedLinear(12, 36, 3, bias=False)
    with pytest.raises(ConversionError, match="no forward without bias"):
        decompress(layer)
    x = torch.randn(2, 12)
    torch.testing.assert_close(decompress(layer, form="factors")(x), x @ layer.weight)
