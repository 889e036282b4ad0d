"""`torch.func` over compressed layers: per sample, per network of an ensemble, and derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, stack_module_state, vmap

from sttp_manifold.nn import compress

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4)), (5, 12)),
    "conv": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(128, 4)),
        (5, 3, 4, 4),
    ),
    "groups": (lambda: nn.Sequential(nn.Conv1d(32, 32, 3, groups=2), nn.Flatten()), (5, 32, 4)),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose1d(6, 4, 3), nn.Flatten()), (5, 6, 4)),
    "attention": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
        (5, 3, 8),
    ),
}

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")


def made(name: str, method: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    make, size = NETWORKS[name]
    model = compress(make().double(), 3, method=method, grow="allow")
    return model, torch.randn(size, dtype=torch.float64)


def one(model: nn.Module) -> Callable[[Any, Tensor], Tensor]:
    """Parameters and one sample to its output."""
    buffers = dict(model.named_buffers())

    def output(parameters: Any, x: Tensor) -> Tensor:
        y: Tensor = functional_call(model, (parameters, buffers), (x.unsqueeze(0),))
        return y.squeeze(0)

    return output


@pytest.mark.parametrize("method", ["householder", "riemannian"])
@pytest.mark.parametrize("name", NETWORKS)
def test_samples_one_by_one(name: str, method: str) -> None:
    """Outputs and gradients of samples, whose sum is the gradient of the batch."""
    model, x = made(name, method)
    parameters = {key: p.detach() for key, p in model.named_parameters()}
    torch.testing.assert_close(vmap(one(model), (None, 0))(parameters, x), model(x))
    loss = grad(lambda p, sample: one(model)(p, sample).square().sum())
    each = vmap(loss, (None, 0))(parameters, x)
    model(x).square().sum().backward()
    for key, p in model.named_parameters():
        assert each[key].shape == (len(x), *p.shape)
        torch.testing.assert_close(each[key].sum(0), p.grad)


@pytest.mark.parametrize("method", ["householder", "riemannian"])
@pytest.mark.parametrize("name", NETWORKS)
def test_jacobians(name: str, method: str) -> None:
    model, x = made(name, method)
    parameters = {key: p.detach() for key, p in model.named_parameters()}
    jacobian = jacrev(one(model))(parameters, x[0])
    y = model(x[:1]).squeeze(0).flatten()
    for k in (0, len(y) - 1):
        gradients = torch.autograd.grad(y[k], list(model.parameters()), retain_graph=True)
        for key, gradient in zip(parameters, gradients, strict=True):
            torch.testing.assert_close(jacobian[key].flatten(0, -2)[k], gradient)


def test_hessian_of_a_layer() -> None:
    """Symmetric, and the derivative of the gradient."""
    layer = compress(nn.Linear(5, 4).double(), 2, kind="svdp", grow="allow")
    x = torch.randn(7, 5, dtype=torch.float64)
    name = "spectral_weight.coordinates"
    at = dict(layer.named_parameters())[name].detach()

    def loss(w: Tensor) -> Tensor:
        return functional_call(layer, {name: w}, (x,)).pow(3).sum()

    H, v = jacrev(grad(loss))(at), torch.randn_like(at)
    torch.testing.assert_close(H, H.mT)
    step = 1e-6 * v
    slope = (grad(loss)(at + step) - grad(loss)(at - step)) / 2e-6
    torch.testing.assert_close(H @ v, slope, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", ["householder", "riemannian"])
def test_an_ensemble_in_one_call(method: str) -> None:
    models = [made("linear", method, seed)[0] for seed in range(3)]
    x = made("linear", method)[1]
    parameters, buffers = stack_module_state(models)
    outputs = vmap(lambda p, b: functional_call(models[0], (p, b), (x,)))(parameters, buffers)
    assert not torch.allclose(outputs[0], outputs[1])
    for model, y in zip(models, outputs, strict=True):
        torch.testing.assert_close(y, model(x))
