"""No layer uses a kept weight that its parameters no longer give, however they were changed."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch
from networks_together import (
    DOUBLE,
    Net,
    alone,
    every_method,
    fresh,
    image,
    keeping_nothing,
    made,
    snapshots,
)
from parameter_changes import (
    CHANGES,
    MORE_CHANGES,
    by_freezing,
    by_negative_view,
    by_new_weight,
    by_same_memory,
    first_weight,
    parameter,
)
from torch import nn

from sttp_manifold.nn import SpectralLinear
from sttp_manifold.nn.kept import Bytes, Snapshot

MODES = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


def kept_model(method: str, together: bool, mode: str = "no_grad") -> Net:
    model = made(method).eval()
    model = model if together else alone(model)
    for _ in range(3):
        with MODES[mode]():
            model(image())
    assert all(snapshots(model))
    return model


@every_method
@pytest.mark.parametrize(
    ("mode", "together"), [("no_grad", False), ("no_grad", True), ("inference_mode", True)]
)
@pytest.mark.parametrize("change", CHANGES + MORE_CHANGES, ids=lambda change: change.__name__)
def test_no_stale_weight_is_used(
    method: str, mode: str, together: bool, change: Callable[[Net], None]
) -> None:
    model, x = kept_model(method, together, mode), image()
    other = alone(model)
    before = fresh(other, x)
    for m in (model, other):
        torch.manual_seed(5)
        change(m)
    wanted = fresh(other, x)
    if change not in (by_same_memory, by_freezing, by_new_weight, by_negative_view):
        assert not torch.allclose(before, wanted, rtol=1e-9, atol=1e-11)
    for _ in range(5):
        with MODES[mode]():
            y = model(x)
        torch.testing.assert_close(y.clone(), wanted, rtol=1e-10, atol=1e-12)
    if change is not by_negative_view:  # such a parameter is read by nobody but torch
        assert all(snapshots(model))


@every_method
@pytest.mark.parametrize("together", [False, True], ids=["alone", "together"])
@pytest.mark.parametrize("change", CHANGES + MORE_CHANGES, ids=lambda change: change.__name__)
def test_no_stale_weight_is_used_in_the_middle_of_a_forward(
    method: str, together: bool, change: Callable[[Net], None]
) -> None:
    model, x = kept_model(method, together), image()
    other = alone(model)
    for m in (model, other):
        m.middle = lambda m=m: change(m)
    for seed in range(4):
        torch.manual_seed(seed)
        wanted = fresh(other, x)
        torch.manual_seed(seed)
        with torch.no_grad():
            y = model(x)
        torch.testing.assert_close(y, wanted, rtol=1e-10, atol=1e-12)


@every_method
def test_functional_call_sees_its_own_parameters(method: str) -> None:
    model, x = kept_model(method, together=True), image()
    base = fresh(model, x)
    new = {k: v.detach() * 1.5 for k, v in model.named_parameters()}
    for _ in range(4):
        with torch.no_grad():
            y = torch.func.functional_call(model, new, (x,))
            with keeping_nothing():
                wanted = torch.func.functional_call(alone(model), new, (x,))
            torch.testing.assert_close(y, wanted, rtol=1e-10, atol=1e-12)
            assert not torch.allclose(y, base)
            torch.testing.assert_close(model(x), base, rtol=1e-10, atol=1e-12)


def test_parametrizations_come_and_go() -> None:
    class Double(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    model, x = kept_model("householder", together=False), image()
    base = fresh(model, x)
    for module, name in ((first_weight(model), "coordinates"), (first_weight(model).frames, "0")):
        nn.utils.parametrize.register_parametrization(module, name, Double())
        wanted = fresh(model, x)
        assert not torch.allclose(base, wanted)
        for _ in range(4):
            with torch.no_grad():
                torch.testing.assert_close(model(x), wanted)
        nn.utils.parametrize.remove_parametrizations(module, name, leave_parametrized=False)
        for _ in range(4):
            with torch.no_grad():
                torch.testing.assert_close(model(x), base)


class Other(torch.Tensor):
    """What it is worth, its own operations say."""


@every_method
@pytest.mark.parametrize("at", [0, -1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_bit_counts(method: str, at: int, dtype: torch.dtype) -> None:
    weight = SpectralLinear(12, 20, 4, method=method, init="random", dtype=dtype).spectral_weight
    tensors = weight._tensors()
    snapshot = Snapshot(tuple(map(Bytes.of, tensors)), {})
    assert snapshot.fits(tensors)
    for tensor in tensors:
        memory = (ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())
        for bit in (0, 7):
            memory[at] ^= 1 << bit
            assert not snapshot.fits(tensors)
            memory[at] ^= 1 << bit
        assert snapshot.fits(tensors)
    assert not snapshot.fits(tensors[:-1])
    assert not snapshot.fits((*tensors, tensors[0]))
    other = [t.view(torch.int16) if t.itemsize == 2 else t.view(torch.int32) for t in tensors]
    assert not snapshot.fits(other)
    assert not snapshot.fits([t.unsqueeze(0) for t in tensors])
    assert not snapshot.fits([t.detach().to("meta") for t in tensors])
    assert not snapshot.fits([t.detach().as_subclass(Other) for t in tensors])


def test_memory_that_is_not_there_is_not_read() -> None:
    """As in sharded training, which frees parameters between forwards."""
    for offset in (0, 3):
        flat = torch.randn(20, **DOUBLE)
        tensor = nn.Parameter(flat[offset : offset + 8])
        snapshot = Snapshot((Bytes.of(tensor),), {})
        assert snapshot.fits([tensor])
        content = flat.clone()
        flat.untyped_storage().resize_(0)
        assert not snapshot.fits([tensor])
        flat.untyped_storage().resize_(content.nbytes)
        flat.copy_(content)
        assert snapshot.fits([tensor])
    zero = torch._efficientzerotensor(8, **DOUBLE)
    assert not snapshot.fits([zero])


def test_not_a_number_is_a_value_like_others() -> None:
    model, x = kept_model("householder", together=False), image()
    base = fresh(model, x)
    p = parameter(model)
    old = p.detach().clone()
    with torch.no_grad():
        p[0] = float("nan")
        for _ in range(4):
            assert model(x).isnan().any()
        p.copy_(old)
        for _ in range(4):
            torch.testing.assert_close(model(x), base, rtol=1e-10, atol=1e-12)
