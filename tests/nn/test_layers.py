"""Layers against the stock ones that they stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from ways_to_hold import every_method

from sttp_manifold import TTShape, tt_svd
from sttp_manifold.errors import ConversionError, RankError, ShapeError, SpectrumError
from sttp_manifold.nn import (
    SpectralConv2d,
    SpectralLayer,
    SpectralLinear,
    make_weight,
)
from sttp_manifold.tt import SPECTRA
from sttp_manifold.tt.plans import conv_plan, linear_plan

KINDS = ("sttp", "svdp")
DOUBLE: Any = {"dtype": torch.float64}

every_kind = pytest.mark.parametrize("kind", KINDS)
every_spectrum = pytest.mark.parametrize("spectrum", SPECTRA)

# Settings of a convolution, each with those of torch.nn.Conv2d.
CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "stride": {"stride": 2, "padding": 1},
    "uneven": {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)},
    "same": {"padding": "same", "dilation": 2},
    "valid": {"padding": "valid"},
    "groups": {"groups": 4},
    "depthwise": {"groups": 16, "padding": 1},
    "reflect same": {"padding": "same", "padding_mode": "reflect"},
    "circular": {"padding": (2, 1), "padding_mode": "circular", "stride": 2},
    "replicate valid": {"padding": "valid", "padding_mode": "replicate"},
}


def gradients(layer: SpectralLayer, y: Tensor) -> list[Tensor]:
    """Of a generic function of an output, in all parameters."""
    target = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return list(torch.autograd.grad((y.sin() * target).sum(), list(layer.parameters())))


def agree(layer: SpectralLayer, y: Tensor, wanted: Tensor) -> None:
    """Same outputs, and same gradients in every parameter."""
    assert y.shape == wanted.shape
    torch.testing.assert_close(y, wanted, rtol=0, atol=1e-11)
    for a, b in zip(gradients(layer, y), gradients(layer, wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


# -- linear ------------------------------------------------------------------------------------


@every_method
@every_kind
@every_spectrum
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_its_dense_weight(method: str, kind: str, spectrum: str, bias: bool) -> None:
    layer = SpectralLinear(
        20, 12, 3, bias, kind=kind, method=method, spectrum=spectrum, init="random", **DOUBLE
    )
    assert (layer.bias is not None) == bias
    assert layer.weight.shape == layer.weight_shape == (12, 20)
    for size in ((20,), (5, 20), (2, 3, 20)):
        x = torch.randn(size, **DOUBLE)
        agree(layer, layer(x), nn.functional.linear(x, layer.weight, layer.bias))


@every_method
@pytest.mark.parametrize("bias", [True, False])
def test_every_plan_of_a_linear_layer_gives_the_same(method: str, bias: bool) -> None:
    met = set()
    for rank, count in ((6, 1), (6, 50), (40, 500)):
        layer = SpectralLinear(60, 48, rank, bias, method=method, init="random", **DOUBLE)
        met.add(linear_plan(layer.spectral_weight.shape, count))
        x = torch.randn(count, 60, **DOUBLE)
        agree(layer, layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert met == {"cores", "lowrank", "dense"}


def test_linear_takes_an_empty_batch_and_refuses_another_width() -> None:
    layer = SpectralLinear(60, 48, 6)
    assert layer(torch.randn(0, 60)).shape == (0, 48)
    assert layer(torch.randn(2, 0, 60)).shape == (2, 0, 48)
    for count in (1, 50, 5000):
        with pytest.raises((RuntimeError, ShapeError)):
            layer(torch.randn(count, 59))


def test_dense_weight_is_not_formed_where_that_costs_more(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, conv = SpectralLinear(512, 512, 4), SpectralConv2d(64, 64, 3, 4, padding=1)
    for layer in (linear, conv):
        monkeypatch.setattr(layer.spectral_weight, "forward", lambda: pytest.fail("W was formed"))
    linear(torch.randn(1, 512))
    linear(torch.randn(16, 512))
    conv(torch.randn(4, 64, 8, 8))


# -- convolution -------------------------------------------------------------------------------


@every_method
@every_kind
@pytest.mark.parametrize("settings", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
@pytest.mark.parametrize("rank", [1, 32])
def test_convolution_is_that_of_torch(
    method: str, kind: str, settings: dict[str, Any], rank: int
) -> None:
    layer = SpectralConv2d(
        16, 32, (3, 2), rank, kind=kind, method=method, init="random", **settings, **DOUBLE
    )
    stock = nn.Conv2d(16, 32, (3, 2), **settings, **DOUBLE)
    assert layer.weight_shape == layer.weight.shape == stock.weight.shape
    x = torch.randn(2, 16, 9, 8, **DOUBLE)
    wanted = torch.func.functional_call(stock, {"weight": layer.weight, "bias": layer.bias}, x)
    agree(layer, layer(x), wanted)
    torch.testing.assert_close(layer(x[0]), wanted[0], rtol=0, atol=1e-11)
    assert layer._positions(x) == wanted[:, 0].numel()
    assert layer._positions(x[0]) == wanted[0, 0].numel()


@every_spectrum
@pytest.mark.parametrize("kernel", ["flat", "factored"])
def test_convolution_over_spectra_and_kernels(spectrum: str, kernel: str) -> None:
    layer = SpectralConv2d(
        8, 16, (2, 3), 4, kernel=kernel, spectrum=spectrum, init="random", **DOUBLE
    )
    modes = (2, 2, 2, 6) if kernel == "flat" else (2, 2, 2, 2, 3)
    assert layer.spectral_weight.shape.in_modes == modes
    x = torch.randn(2, 8, 9, 8, **DOUBLE)
    agree(layer, layer(x), nn.functional.conv2d(x, layer.weight, layer.bias))


def test_convolution_is_factorized_where_that_is_cheaper() -> None:
    wide, thin = TTShape.for_conv((256, 256, 3, 3), 16), TTShape.for_conv((16, 16, 3, 3), 16)
    for positions in (1, 64, 10_000):
        assert conv_plan(wide, positions) == "factorized"
    assert conv_plan(thin, 10_000) == "dense"


def test_convolution_leaves_its_settings_to_torch() -> None:
    with pytest.raises(ValueError, match="strided"):
        SpectralConv2d(8, 8, 3, 4, stride=2, padding="same")
    with pytest.raises(ValueError, match="divisible by groups"):
        SpectralConv2d(8, 8, 3, 4, groups=3)
    with pytest.raises(ValueError, match="padding_mode"):
        SpectralConv2d(8, 8, 3, 4, padding_mode="mirror")


# -- construction ------------------------------------------------------------------------------


@every_kind
def test_plans_of_layers(kind: str) -> None:
    linear, conv = SpectralLinear(30, 12, 4, kind=kind), SpectralConv2d(6, 8, 3, 4, kind=kind)
    assert linear.spectral_weight.shape == TTShape.for_conv((12, 30), 4, kind=kind)
    assert conv.spectral_weight.shape == TTShape.for_conv((8, 6, 3, 3), 4, kind=kind)


def test_a_bias_starts_as_torchs() -> None:
    bias = SpectralLinear(100, 5000, 4).bias
    assert bias is not None
    assert 0.099 < float(bias.detach().abs().max()) <= 0.1
    assert abs(float(bias.detach().mean())) < 0.01


def test_a_value_or_a_weight_may_be_given() -> None:
    tt = tt_svd(torch.randn(12, 20, **DOUBLE), TTShape.for_matrix(12, 20, 3))
    layer = SpectralLinear(20, 12, 3, init=tt, **DOUBLE)
    torch.testing.assert_close(layer.weight, tt.to_matrix())
    shared = SpectralLinear(20, 12, weight=layer.spectral_weight)
    assert shared.spectral_weight is layer.spectral_weight
    assert shared.bias is not None
    assert shared.bias.dtype == torch.float64
    with pytest.raises(ShapeError, match="12 x 20"):
        SpectralLinear(12, 20, weight=layer.spectral_weight)
    with pytest.raises(ShapeError, match="rank=16"):
        SpectralLinear(12, 20)


def test_bad_arguments() -> None:
    with pytest.raises(ShapeError, match="rank"):
        SpectralLinear(12, 20, 0)
    with pytest.raises(ShapeError, match="'sttp' or 'svdp'"):
        SpectralLinear(12, 20, 3, kind="cp")
    with pytest.raises(ShapeError, match="'flat' or 'factored'"):
        SpectralConv2d(12, 20, 3, 3, kernel="deep")
    with pytest.raises(ConversionError, match="'householder', 'riemannian'"):
        SpectralLinear(12, 20, 3, method="cayley")
    with pytest.raises(SpectrumError, match="identity, free"):
        SpectralLinear(12, 20, 3, spectrum="learned")
    with pytest.raises(ShapeError, match="'noisy_eye'"):
        SpectralLinear(12, 20, 3, init="pretrained")


@every_method
def test_repr_adds_to_torchs(method: str) -> None:
    text = repr(SpectralLinear(20, 12, 3, bias=False, method=method))
    assert "in_features=20, out_features=12, bias=False, rank=3" in text
    assert f"method={method!r}" in text
    text = SpectralConv2d(8, 16, 3, 4, stride=2, padding=1, groups=2).extra_repr()
    assert text.startswith("8, 16, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), groups=2")
    assert "dilation" not in text
    assert "padding_mode" not in text


# -- from and to stock layers ------------------------------------------------------------------


@every_kind
def test_pretrained_is_the_tt_svd(kind: str) -> None:
    conv = nn.Conv2d(6, 8, 3, **DOUBLE)
    made = SpectralConv2d.from_layer(conv, 3, kind=kind)
    wanted = tt_svd(conv.weight.detach().flatten(1), made.spectral_weight.shape).to_matrix()
    torch.testing.assert_close(made.weight, wanted.view(8, 6, 3, 3), rtol=0, atol=1e-12)


@every_method
@pytest.mark.parametrize("init", ["eye", "noisy_eye", "random"])
def test_other_inits_do_not_look_at_the_weight(method: str, init: str) -> None:
    linear = nn.Linear(20, 12)
    made = SpectralLinear.from_layer(linear, 3, method=method, init=init)
    torch.testing.assert_close(made.spectral_weight.tt().singular_values(), torch.ones(3))


@every_method
@pytest.mark.parametrize("spectrum", ["identity", "normalized", "bounded"])
def test_pretrained_weights_need_a_spectrum_that_holds_them(method: str, spectrum: str) -> None:
    linear = nn.Linear(20, 12, **DOUBLE)
    with torch.no_grad():
        linear.weight.mul_(10)
    with pytest.raises(SpectrumError, match="project=True"):
        SpectralLinear.from_layer(linear, 3, method=method, spectrum=spectrum)
    made = SpectralLinear.from_layer(linear, 3, method=method, spectrum=spectrum, project=True)
    assert made.spectral_weight.tt().singular_values().max() <= 1 + 1e-12
    # The frames are those of the weight.
    cosine = nn.functional.cosine_similarity(made.weight.flatten(), linear.weight.flatten(), dim=0)
    assert cosine > 0.6


@every_method
def test_dtype_freeze_and_mode_are_kept(method: str) -> None:
    linear = nn.Linear(20, 12, **DOUBLE).eval()
    linear.weight.requires_grad_(False)
    made = SpectralLinear.from_layer(linear, 3, method=method)
    assert not made.training
    assert made.weight.dtype == torch.float64
    assert not any(p.requires_grad for p in made.spectral_weight.parameters())
    assert made.bias is linear.bias
    back = made.to_layer()
    assert type(back) is nn.Linear
    assert not back.training
    assert not back.weight.requires_grad
    assert back.bias is linear.bias
    half = SpectralLinear.from_layer(nn.Linear(20, 12).bfloat16(), 12, method=method)
    assert half.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("settings", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_goes_there_and_back(settings: dict[str, Any], bias: bool) -> None:
    stock = nn.Conv2d(16, 32, (3, 2), bias=bias, **settings, **DOUBLE)
    made = SpectralConv2d.from_layer(stock, 1000)
    back = made.to_layer()
    x = torch.randn(2, 16, 9, 8, **DOUBLE)
    torch.testing.assert_close(made(x), stock(x), rtol=0, atol=1e-11)
    torch.testing.assert_close(back(x), stock(x), rtol=0, atol=1e-11)
    assert repr(back) == repr(stock)
    assert isinstance(back.weight, nn.Parameter)
    assert back.weight.is_leaf


def test_what_is_no_plain_layer_is_refused() -> None:
    with pytest.raises(ConversionError, match=r"torch\.nn\.Linear, got a Conv2d"):
        SpectralLinear.from_layer(nn.Conv2d(3, 4, 1), 2)  # type: ignore[arg-type]
    with pytest.raises(ConversionError, match="first input"):
        SpectralLinear.from_layer(nn.LazyLinear(3), 2)
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
    with pytest.raises(ConversionError, match="remove_parametrizations"):
        SpectralLinear.from_layer(normed, 2)
    with pytest.raises(ShapeError, match="'pretrained', 'eye'"):
        SpectralLinear.from_layer(nn.Linear(4, 3), 2, init="zeros")
    broken = nn.Linear(4, 3)
    with torch.no_grad():
        broken.weight[0, 0] = float("nan")
    with pytest.raises(ShapeError, match="not finite"):
        SpectralLinear.from_layer(broken, 2)


# -- as modules --------------------------------------------------------------------------------


@every_method
@every_kind
@every_spectrum
def test_autocast_trains_on_the_cpu(method: str, kind: str, spectrum: str) -> None:
    how: Any = {"kind": kind, "method": method, "spectrum": spectrum, "init": "random"}
    for layer, sizes in (
        (SpectralLinear(60, 48, 6, **how), [(1, 60), (50, 60)]),
        (SpectralConv2d(64, 64, 3, 2, **how), [(2, 64, 5, 5)]),
        (SpectralConv2d(4, 4, 3, 4, **how), [(2, 4, 5, 5)]),
    ):
        for size in sizes:
            x = torch.randn(size)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = layer(x)
            assert y.dtype == torch.bfloat16
            torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)
            y.float().square().sum().backward()
            for p in layer.parameters():
                assert p.grad is not None
                assert p.grad.dtype == torch.float32
                assert p.grad.isfinite().all()


def test_a_layer_of_rank_over_the_bound_is_lowered() -> None:
    assert SpectralLinear(128, 1, 64).spectral_weight.shape.rank == 1
    with pytest.raises(RankError):
        TTShape((2, 2), (2, 2), ranks=(1, 3, 2, 2, 1))


@every_method
def test_layers_without_a_parameter_of_the_weight_work(method: str) -> None:
    """A 1 x 1 weight of identity spectrum is a sign."""
    layer = SpectralLinear(1, 1, 1, method=method, spectrum="identity", bias=False)
    x = torch.randn(3, 1)
    torch.testing.assert_close(layer(x).abs(), x.abs())
    assert layer.spectral_weight.dtype == torch.float32
    weight = make_weight(method, TTShape.svd(1, 1, 1), "identity").double()
    assert weight().dtype == torch.float64
