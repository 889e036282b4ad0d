"""A plain optimizer on weights on their manifold is noticed where it shows: in the forward."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import sttp_manifold as sm
from sttp_manifold.errors import OffManifoldError
from sttp_manifold.nn import OffManifoldWarning, SpectralLinear, compress
from sttp_manifold.nn.riemannian import RiemannianWeight


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 10)).to(dtype)
    return compress(model, 4, method="riemannian", grow="allow")


def warned(model: nn.Module, optimizer: Any, steps: int, half: bool = False) -> list[int]:
    """Steps after which there was a warning."""
    at = []
    dtype = next(model.parameters()).dtype
    for step in range(steps):
        with warnings.catch_warnings(record=True) as caught, torch.autocast("cpu", enabled=half):
            warnings.simplefilter("always")
            model(torch.randn(8, 20, dtype=dtype)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if caught:
            assert {w.category for w in caught} == {OffManifoldWarning}
            assert len({str(w.message) for w in caught}) == 1
            at.append(step)
    return at


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=1e-3),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.Adam(p, lr=1e-4),
    ],
)
def test_a_plain_optimizer_is_noticed_once(make: Callable[[Iterable[Tensor]], Any]) -> None:
    model = network()
    found = warned(model, make(model.parameters()), 80)
    assert len(found) == 1
    assert found[0] <= 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("retraction", ["newton_schulz", "pogo"])
def test_a_riemannian_one_is_not(dtype: torch.dtype, retraction: str) -> None:
    model = network(dtype)
    optimizer = sm.optim.RiemannianAdam(model.parameters(), lr=1e-2, retraction=retraction)
    assert warned(model, optimizer, 70) == []
    assert warned(model, optimizer, 70, half=dtype == torch.float32) == []


def test_looks_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    error = RiemannianWeight._error
    monkeypatch.setattr(RiemannianWeight, "_error", lambda w: looks.append(w) or error(w))
    layer = SpectralLinear(8, 6, rank=2, method="riemannian")
    x = torch.randn(2, 8)
    for _ in range(50):
        layer(x)
    assert not looks  # nothing has changed
    for step in range(1, 301):
        with torch.no_grad():
            layer.spectral_weight.point.mul_(1)
        layer(x)
        layer(x)
        assert len(looks) == (step >= 3) + (step >= 15) + (step >= 63) + (step >= 255)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        twin(x)


def test_what_is_no_point_is_refused() -> None:
    layer = SpectralLinear(8, 6, rank=2, method="riemannian")
    weight = layer.spectral_weight
    for value in (nn.Parameter(weight.point.detach().clone()), weight.point.detach().clone()):
        with pytest.raises(OffManifoldError, match=r"weight\.point\.copy_"):
            weight.point = value
    with pytest.raises(OffManifoldError, match="ManifoldParameter"):
        prune.l1_unstructured(weight, "point", 0.3)


def test_pruned_coordinates_follow_their_parameter() -> None:
    torch.manual_seed(0)
    layer = SpectralLinear(8, 6, rank=2, init="random")
    weight = layer.spectral_weight
    prune.l1_unstructured(weight, "coordinates", 4)
    for _ in range(2):
        layer.zero_grad()
        layer(torch.randn(3, 8)).square().sum().backward()
        gradient = weight.coordinates_orig.grad
        assert int((gradient == 0).sum()) >= 4
        with torch.no_grad():
            weight.coordinates_orig.add_(1)
        twin = SpectralLinear(8, 6, rank=2)
        with torch.no_grad():
            masked = weight.coordinates_orig * weight.coordinates_mask
            twin.spectral_weight.coordinates.copy_(masked)
        torch.testing.assert_close(layer.weight, twin.weight)
