"""Weights in half precision: conversions lose no more than the rounding."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from ways_to_hold import METHODS, every_method

from sttp_manifold import TTShape
from sttp_manifold.errors import ShapeError
from sttp_manifold.nn import (
    SpectralLinear,
    compress,
    decompress,
    make_weight,
    spectral_penalty,
    switch,
)
from sttp_manifold.spectrum import PENALTIES
from sttp_manifold.tt import SPECTRA

HALF = {torch.bfloat16: 2e-2, torch.float16: 3e-3}

every_half = pytest.mark.parametrize(("dtype", "rtol"), HALF.items(), ids=map(str, HALF))
every_spectrum = pytest.mark.parametrize("spectrum", SPECTRA)


def network(dtype: torch.dtype) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(16, 32, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 64)
    ).to(dtype)


def dense(model: nn.Module) -> list[torch.Tensor]:
    return [model[i].weight.detach().float() for i in (0, 3)]


def close(model: nn.Module, wanted: list[torch.Tensor], rtol: float) -> None:
    for W, was in zip(dense(model), wanted, strict=True):
        assert float((W - was).norm() / was.norm()) < rtol


@every_half
@every_method
@every_spectrum
def test_compress_switch_there_and_back_and_decompress(
    dtype: torch.dtype, rtol: float, method: str, spectrum: str
) -> None:
    model = network(dtype)
    compress(model, rank=8, method=method, spectrum=spectrum, project=True, grow="allow")
    assert {p.dtype for p in model.parameters()} == {dtype}
    start, other = dense(model), METHODS[1 - METHODS.index(method)]
    for name in (other, method, other):
        switch(model, name)
        assert {p.dtype for p in model.parameters()} == {dtype}
        close(model, start, rtol)
    decompress(model)
    assert {p.dtype for p in model.parameters()} == {dtype}
    close(model, start, rtol)
    assert model(torch.randn(2, 16, 4, 4, dtype=dtype)).isfinite().all()


@every_half
def test_a_compressed_half_network_is_the_compressed_network(
    dtype: torch.dtype, rtol: float
) -> None:
    torch.manual_seed(0)
    model = network(dtype)
    wide = network(torch.float32)
    wide.load_state_dict({key: value.float() for key, value in model.state_dict().items()})
    close(compress(model, rank=8), dense(compress(wide, rank=8)), rtol)


@every_half
@every_method
@every_spectrum
def test_a_half_weight_takes_over_values_of_half_precision(
    dtype: torch.dtype, rtol: float, method: str, spectrum: str
) -> None:
    shape = TTShape.for_matrix(32, 48, 6)
    for source in METHODS:
        one = make_weight(source, shape, spectrum, "random", dtype=dtype)
        for target in (dtype, torch.float32, torch.float64):
            two = make_weight(method, shape, spectrum, "random", dtype=target)
            two.encode_(one.tt())
            gap = ((two().float() - one().float()).norm() / one().float().norm()).detach()
            assert float(gap) < rtol
            error = float(two.tt().orthonormality_error().detach())
            assert error < 2 * max(torch.finfo(target).eps, 1e-6)


@every_half
def test_a_bounded_spectrum_that_rounds_onto_its_bound_is_taken_over(
    dtype: torch.dtype, rtol: float
) -> None:
    one = make_weight("householder", TTShape.for_matrix(12, 10, 3), "bounded", dtype=dtype)
    with torch.no_grad():
        for p in one.parameters():
            p.fill_(60.0 if p.shape == (3,) else 0.01)
    one.encode_(one.tt())
    assert float(one.bond().detach().abs().max()) <= 1


@every_half
def test_what_is_no_rounding_is_still_refused(dtype: torch.dtype, rtol: float) -> None:
    weight = make_weight("householder", TTShape.for_matrix(12, 10, 3), dtype=dtype)
    value = weight.tt()
    left = (value.left[0] * 1.05, *value.left[1:])
    with pytest.raises(ShapeError, match="not orthonormal"):
        weight.encode_(type(value)(left, value.spectrum, value.right, value.shape))


@every_half
@every_method
@pytest.mark.parametrize("spectrum", ["free", "normalized", "bounded", "full"])
@pytest.mark.parametrize("name", PENALTIES)
def test_penalties_and_their_gradients_are_finite(
    dtype: torch.dtype, rtol: float, method: str, spectrum: str, name: str
) -> None:
    torch.manual_seed(0)
    for init in ("eye", "noisy_eye", "random", "pretrained"):
        model = network(dtype)
        compress(model, 8, method=method, spectrum=spectrum, init=init, project=True)
        penalty = spectral_penalty(model, name)
        penalty.backward()
        assert penalty.isfinite()
        for p in model.parameters():
            assert p.grad is None or p.grad.isfinite().all()
        if name == "d_optimal":  # the other takes logarithms of gaps, cut off by dtype
            wide = spectral_penalty(model.float(), name)
            torch.testing.assert_close(penalty, wide, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("kind", ["svdp", "sttp"])
def test_autocast_does_not_take_a_point_for_one_off_its_manifold(kind):
    layer = SpectralLinear(64, 48, rank=4, kind=kind, method="riemannian").eval()
    x = torch.randn(3, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        mixed = layer(x)
    torch.testing.assert_close(mixed.float(), layer(x).detach(), rtol=0.05, atol=0.02)
