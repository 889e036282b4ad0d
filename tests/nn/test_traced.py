"""Layers under the tracer of TorchScript, with gradients on and off."""

from __future__ import annotations

import pytest
import torch
from networks_together import DOUBLE, every_spectrum
from torch import nn
from ways_to_hold import every_method

from sttp_manifold.nn import SpectralConv2d, SpectralLinear, compress

# The second says that sizes become constants, which those of a weight are.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


@every_method
@every_spectrum
@pytest.mark.parametrize("gradient", [True, False])
def test_a_traced_layer_is_the_layer(method: str, spectrum: str, gradient: bool) -> None:
    how = {"method": method, "spectrum": spectrum, "init": "random", **DOUBLE}
    cases = [
        (SpectralLinear(12, 10, 3, **how), (4, 12)),
        (SpectralLinear(60, 60, 6, **how), (1, 60)),
        (SpectralLinear(8, 8, 8, **how), (70, 8)),
        (SpectralConv2d(8, 16, 3, 4, padding=1, **how), (2, 8, 5, 5)),
        (SpectralConv2d(8, 8, 3, 8, groups=2, **how), (2, 8, 5, 5)),
    ]
    for layer, size in cases:
        x = torch.randn(size, **DOUBLE)
        with torch.set_grad_enabled(gradient):
            traced = torch.jit.trace(layer, x)
        other = torch.randn(size[0] + 3, *size[1:], **DOUBLE)
        torch.testing.assert_close(traced(other), layer(other))
        with torch.no_grad():  # parameters stay parameters of what was traced
            for parameter in layer.parameters():
                parameter.mul_(1.01)
        torch.testing.assert_close(traced(other), layer(other))
        if gradient:
            (mine,) = torch.autograd.grad(traced(other).square().sum(), layer.bias)
            (wanted,) = torch.autograd.grad(layer(other).square().sum(), layer.bias)
            torch.testing.assert_close(mine, wanted)
            parameter = next(layer.spectral_weight.parameters())
            (mine,) = torch.autograd.grad(traced(other).square().sum(), parameter)
            (wanted,) = torch.autograd.grad(layer(other).square().sum(), parameter)
            torch.testing.assert_close(mine, wanted, rtol=1e-8, atol=1e-10)


@every_method
def test_a_traced_network_that_forms_its_weights_together(method: str) -> None:
    stock = nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 20)).double()
    model = compress(stock, rank=4, method=method)
    x = torch.randn(5, 30, **DOUBLE)
    traced = torch.jit.trace(model, x)
    torch.testing.assert_close(traced(x), model(x))
