"""Convolutions of all dimensions, transposed and grouped, against torch's own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from sttp_manifold import TTShape
from sttp_manifold.errors import ShapeError
from sttp_manifold.nn import SpectralConvTranspose2d, compress, decompress, summary
from sttp_manifold.nn.stack import WeightStack

DOUBLE: Any = {"dtype": torch.float64}
SIZES = (5, 4, 3)

# Settings of transposed convolutions; those of others are in test_layers.py.
TRANSPOSED: dict[str, dict[str, Any]] = {
    "plain": {"bias": False},
    "stride": {"stride": 2, "padding": 1, "output_padding": 1},
    "dilation": {"stride": 3, "dilation": 2, "output_padding": 2},
    "wide groups": {"groups": 2, "stride": 2},
    "depthwise": {"groups": 32},
}


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("settings", TRANSPOSED.values(), ids=TRANSPOSED)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_transposed_convolutions_are_those_of_torch(
    dims: int, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = (3, 2, 3)[:dims]
    stock = getattr(nn, f"ConvTranspose{dims}d")(32, 32, kernel, **settings, **DOUBLE)
    layer: Any = compress(copy.deepcopy(stock), rank=3, grow="allow")
    bias = {} if layer.bias is None else {"bias": layer.bias}
    forms = ["dense", "factors"] if layer._has_factors else ["dense"]
    for size in ((2, 32, *SIZES[:dims]), (32, *SIZES[:dims])):
        x = torch.randn(size, **DOUBLE)
        stride = settings.get("stride", 1)
        least = [n - settings.get("output_padding", 0) for n in stock(x).shape[-dims:]]
        for wanted in (None, [n + stride - 1 for n in least]):
            given = {"weight": layer.weight} | bias
            right = torch.func.functional_call(stock, given, (x, wanted))
            for form in forms:
                monkeypatch.setattr(layer, "_form", lambda x, form=form: form)
                close(layer(x, wanted), right)
        monkeypatch.delattr(layer, "_form")
        for form in forms:
            close(decompress(copy.deepcopy(layer), form=form)(x), layer(x))


def test_sizes_that_a_stride_cannot_give_are_named() -> None:
    layer = SpectralConvTranspose2d(4, 4, 3, rank=2, stride=2)
    x = torch.randn(1, 4, 3, 3)
    for size, named in (((6, 7), "7 to 8"), ((7,), "output_size has 2 numbers, or 4")):
        with pytest.raises(ShapeError, match=named):
            layer(x, size)
        with pytest.raises(ValueError, match=r"output_size|output size"):
            nn.ConvTranspose2d(4, 4, 3, stride=2)(x, size)


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_each_wide_group_has_a_weight_of_its_own(kind: Any) -> None:
    stock = kind(64, 64, 3, groups=4, **DOUBLE)
    x = torch.randn(2, 64, 5, 5, **DOUBLE)
    layer = compress(copy.deepcopy(stock), rank=4)
    assert isinstance(layer.spectral_weight, WeightStack)
    plan = TTShape.for_conv((16, 16, 3, 3), rank=4)
    assert [w.shape for w in layer.spectral_weight.parts] == [plan] * 4
    assert summary(layer).rows[0].dimension == 4 * plan.dim()
    for part, group in zip(layer.weight.split(16), stock.weight.split(16), strict=True):
        alone = compress(nn.Conv2d(16, 16, 3, bias=False, **DOUBLE), rank=4)
        alone = compress(with_weight(alone.to_layer(), group), rank=4)
        close(part, alone.weight)  # the truncation of each group by itself
    full = compress(copy.deepcopy(stock), rank=1000, grow="allow")
    close(full(x), stock(x))


def with_weight(layer: nn.Conv2d, weight: torch.Tensor) -> nn.Conv2d:
    layer.weight.data.copy_(weight)
    return layer


def test_narrow_groups_are_one_matrix() -> None:
    for kind, groups in ((nn.Conv2d, 8), (nn.Conv2d, 64), (nn.ConvTranspose2d, 64)):
        layer = compress(kind(64, 64, 3, groups=groups), rank=3)
        assert not isinstance(layer.spectral_weight, WeightStack)
        assert layer.spectral_weight.shape.d_out == 64
