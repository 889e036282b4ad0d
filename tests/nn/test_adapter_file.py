"""Adapters in files of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import close
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from ways_to_hold import every_method

from sttp_manifold.errors import ConversionError
from sttp_manifold.nn import (
    SpectralWeight,
    adapt,
    adapters,
    compress,
    load,
    load_adapter,
    save,
    save_adapter,
    set_adapter,
)
from sttp_manifold.nn.adapter_file import KEY
from sttp_manifold.optim import RiemannianAdam


def net(dtype: torch.dtype = torch.float64, width: int = 12) -> nn.Sequential:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, padding=1, groups=2)
    return nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.Linear(54, width)).to(dtype)


def image() -> Tensor:
    return torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(1)).double()


def trained(**how: Any) -> nn.Module:
    model = adapt(net(), **{"rank": 3, **how})
    optimizer = RiemannianAdam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(4):
        optimizer.zero_grad()
        model(image()).square().mean().backward()
        optimizer.step()
    return model


@every_method
@pytest.mark.parametrize("spectrum", ["full", "free", "bounded"])
@pytest.mark.parametrize("exact", [False, True])
def test_an_adapter_comes_back_alone(
    tmp_path: Path, method: str, spectrum: str, exact: bool
) -> None:
    path = tmp_path / "deep" / "a.safetensors"
    model = trained(method=method, spectrum=spectrum, alpha=0.5)
    save_adapter(model, path, exact=exact)
    other = load_adapter(path, into=net())
    close(other(image()), model(image()))
    assert adapters(other) == adapters(model)
    assert [n for n, p in other.named_parameters() if p.requires_grad] == [
        n for n, p in model.named_parameters() if p.requires_grad
    ]
    weights = [m for m in model.modules() if isinstance(m, SpectralWeight)]
    if not exact:
        numbers = sum(t.numel() for t in load_file(path).values())
        assert numbers == sum(w.shape.dim(spectrum) for w in weights)


def test_beside_others_and_on_a_compressed_network(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    model = trained()
    y = model(image())
    save_adapter(model, path)
    other = trained(method="riemannian", kind="svdp", name="first")
    z = other(image())
    load_adapter(path, into=other, name="second")
    close(other(image()), y)
    close(set_adapter(other, "first")(image()), z)
    with pytest.raises(ConversionError, match=r"'0': there is an adapter 'second' already"):
        load_adapter(path, into=other, name="second")
    small = compress(net(), rank=3, grow="allow")
    before = small(image())
    assert not torch.allclose(load_adapter(path, into=small)(image()), before)


@every_method
def test_a_whole_network_with_adapters(tmp_path: Path, method: str) -> None:
    path = tmp_path / "a.safetensors"
    model = trained(method=method)
    save(model, path)
    close(load(path, into=adapt(net(), 3, method=method))(image()), model(image()))
    with pytest.raises(ConversionError, match="adapt"):
        load(path, into=net())


def header(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()[KEY])


def test_what_does_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_adapter(trained(), path)
    no_layer, no_update = net()[:3], net()
    no_update[3] = nn.Tanh()
    for model, words in (
        (net(width=8), r"'3'.*\(8, 54\).*\(12, 54\)"),
        (no_layer, "'3'.*has not"),
        (no_update, "'3'.*Tanh"),
    ):
        before = str(model)
        with pytest.raises(ConversionError, match=words):
            load_adapter(path, into=model)
        assert str(model) == before
        assert all(p.requires_grad for p in model.parameters())
    for name in ("a.b", ""):
        with pytest.raises(ConversionError, match="without dots"):
            load_adapter(path, into=net(), name=name)
    with pytest.raises(ConversionError, match=r"'other'.*'default'"):
        save_adapter(trained(), path, "other")
    with pytest.raises(ConversionError, match="none"):
        save_adapter(net(), path)
    said, tensors = header(path), load_file(path)
    for change, words in (
        ({"format": 9}, "update the package"),
        ({"layers": {"0": {}}}, "cannot be read"),
        ({"layers": {"0": {**said["layers"]["0"], "weights": []}}}, "cannot be read"),
    ):
        save_file(tensors, path, {KEY: json.dumps(said | change)})
        with pytest.raises(ConversionError, match=words):
            load_adapter(path, into=net())
    save_file(dict(list(tensors.items())[:1]), path, {KEY: json.dumps(said)})
    with pytest.raises(ConversionError, match="damaged"):
        load_adapter(path, into=net())
    save(net(), path)
    with pytest.raises(ConversionError, match=r"load\(path, into=model\)"):
        load_adapter(path, into=net())
