"""`decompress(model, form="factors")`: stock layers that hold two thin factors."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from ways_to_hold import METHODS

from sttp_manifold.errors import ConversionError
from sttp_manifold.nn import SpectralConv2d, SpectralLinear, compress, decompress, summary
from sttp_manifold.tt import SPECTRA

DOUBLE: Any = {"dtype": torch.float64}
CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "stride": {"stride": 2, "padding": 1},
    "uneven": {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)},
    "same": {"padding": "same", "dilation": 2},
    "valid": {"padding": "valid"},
    "reflect same": {"padding": "same", "padding_mode": "reflect"},
    "circular": {"padding": (2, 1), "padding_mode": "circular", "stride": 2},
    "replicate": {"padding": 2, "padding_mode": "replicate"},
    "no bias": {"bias": False},
}


def is_stock(model: nn.Module) -> bool:
    return not any(type(m).__module__.startswith("sttp") for m in model.modules())


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 16, 24)
    )


def thin_network() -> tuple[nn.Sequential, Tensor, Tensor]:
    """A network of thin layers, an input, and what it gave before."""
    model, x = compress(network().eval(), rank=3), torch.randn(2, 8, 4, 4)
    y = model(x).detach()
    decompress(model, form="factors")
    assert [type(model[i]) for i in (0, 3)] == [nn.Sequential] * 2
    return model, x, y


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["sttp", "svdp"])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_is_two(method: str, kind: str, spectrum: str, bias: bool) -> None:
    how: Any = {"kind": kind, "method": method, "spectrum": spectrum, "init": "random", **DOUBLE}
    layer = SpectralLinear(20, 12, 3, bias, **how)
    x = torch.randn(5, 20, **DOUBLE)
    made = decompress(layer, form="factors")
    assert [type(part) for part in made] == [nn.Linear, nn.Linear]
    assert made[0].bias is None
    assert made[1].bias is layer.bias
    torch.testing.assert_close(made(x), layer(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(made[1].weight @ made[0].weight, layer.weight)
    assert all(isinstance(p, nn.Parameter) and p.is_leaf for p in made.parameters())


@pytest.mark.parametrize("settings", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
@pytest.mark.parametrize("method", METHODS)
def test_a_convolution_is_two(settings: dict[str, Any], method: str) -> None:
    layer = SpectralConv2d(16, 32, (3, 2), 4, method=method, init="random", **settings, **DOUBLE)
    x = torch.randn(2, 16, 9, 8, **DOUBLE)
    made = decompress(layer, form="factors")
    assert [type(part) for part in made] == [nn.Conv2d, nn.Conv2d]
    assert made[0].weight.shape == (4, 16, 3, 2)
    assert made[1].weight.shape == (32, 4, 1, 1)
    assert (made[0].bias, made[1].bias) == (None, layer.bias)
    torch.testing.assert_close(made(x), layer(x), rtol=0, atol=1e-11)


def test_what_is_not_cheaper_stays_dense() -> None:
    pays = SpectralLinear(20, 12, 7)  # 7 (20 + 12) = 224 < 240
    assert type(decompress(pays, form="factors")) is nn.Sequential
    assert type(decompress(SpectralLinear(20, 12, 8), form="factors")) is nn.Linear
    grouped = SpectralConv2d(16, 16, 3, 2, groups=2)
    assert type(decompress(grouped, form="factors")) is nn.Conv2d
    # 14 (16 9 + 16) = 2,240 < 16 16 9 = 2,304
    assert type(decompress(SpectralConv2d(16, 16, 3, 14), form="factors")) is nn.Sequential
    assert type(decompress(SpectralConv2d(16, 16, 3, 15), form="factors")) is nn.Conv2d


def test_modes_dtypes_frozen_weights_hooks_and_attributes_are_kept() -> None:
    model = compress(network().to(torch.bfloat16), rank=3)
    model[0].eval()
    model[0].spectral_weight.requires_grad_(False)
    model[0].bias.requires_grad_(False)
    seen: list[Any] = []
    model[3].register_forward_hook(lambda m, *_: seen.append(m.name))
    model[3].name = "last"
    decompress(model, form="factors")
    assert is_stock(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(m.training for m in model[0].modules())
    assert all(m.training for m in model[3].modules())
    assert not any(p.requires_grad for p in model[0].parameters())
    assert all(p.requires_grad for p in model[3].parameters())
    model(torch.randn(2, 8, 4, 4, dtype=torch.bfloat16))
    assert seen == ["last"]


def test_tied_layers_and_modules_used_twice_share_factors() -> None:
    model = nn.ModuleList([nn.Linear(12, 12), nn.Linear(12, 12, bias=False)])
    model[1].weight = model[0].weight
    model.append(model[0])
    compress(model, rank=3)
    decompress(model, form="factors")
    assert model[2] is model[0]
    for k in (0, 1):
        assert model[0][k].weight is model[1][k].weight
    # Tied to a layer that stays dense, a layer stays dense and tied.
    model = nn.ModuleList([SpectralConv2d(4, 16, 3, 2)])
    weight = model[0].spectral_weight
    model.append(SpectralConv2d(8, 16, 3, groups=2, weight=weight))
    x = torch.randn(1, 4, 5, 5)
    y = model[0](x).detach()
    decompress(model, form="factors")
    assert [type(layer) for layer in model] == [nn.Conv2d, nn.Conv2d]
    assert model[0].weight is model[1].weight
    torch.testing.assert_close(model[0](x), y)


def test_layers_with_things_that_two_layers_cannot_hold_stay_dense() -> None:
    for change in (
        lambda m: m.add_module("gate", nn.ReLU()),
        lambda m: prune.l1_unstructured(m, "bias", 2),
    ):
        model = nn.Sequential(nn.Linear(20, 12))
        change(model[0])
        compress(model, rank=3)
        x = torch.randn(2, 20)
        y = model(x).detach()
        decompress(model, form="factors")
        assert type(model[0]) is nn.Linear
        torch.testing.assert_close(model(x), y)


def test_an_unknown_form_is_named_before_anything_has_changed() -> None:
    model = compress(network(), rank=3)
    before = list(model.modules())
    with pytest.raises(ConversionError, match="'dense' or 'factors', got 'thin'"):
        decompress(model, form="thin")
    assert list(model.modules()) == before


def test_the_numbers_stored_are_those_of_the_factors() -> None:
    model, _, _ = thin_network()
    wanted = 3 * (8 * 9 + 16) + 3 * (256 + 24)
    assert summary(model).total.stored == wanted + 16 + 24


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_a_transformer_of_torch_takes_no_fast_path(batch_first: bool, norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(
        16, 2, 64, batch_first=batch_first, norm_first=norm_first, dropout=0.0
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype
        model = nn.TransformerEncoder(layer, 2).eval()
        x, mask = torch.randn(3, 3, 16), torch.zeros(3, 3, dtype=torch.bool)
        mask[0, 2:] = True
        compress(model, rank=4)
        for arguments in ({}, {"src_key_padding_mask": mask}):
            with torch.no_grad():
                y = model(x, **arguments)
                made = decompress(copy.deepcopy(model), form="factors")
                z = made(x, **arguments)
            keep = ~mask.T if batch_first is False else ~mask
            torch.testing.assert_close(z[keep], y[keep], rtol=0, atol=1e-5)
    assert is_stock(made)


# -- on the road without this package ----------------------------------------------------------


def traced(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.*deprecated")
        return torch.jit.trace(model, x)


def scripted(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.*deprecated")
        return torch.jit.script(model)


def exported(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    return program.module()


def compiled(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    return torch.compile(model, backend="eager", fullgraph=True)


@pytest.mark.parametrize("way", [traced, scripted, exported, compiled])
def test_thin_layers_leave_torch_alone(way: Callable[[nn.Module, Tensor], Any]) -> None:
    model, x, y = thin_network()
    run = way(model, x)
    torch.testing.assert_close(run(x), y, rtol=0, atol=1e-5)
    assert run(torch.cat([x, x, x])).shape == (6, 24)


def test_thin_layers_are_quantized() -> None:
    model, x, y = thin_network()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
        z = small(x).detach()
    assert all("quantized" in type(part).__module__ for part in small[3])
    assert float((z - y).norm() / y.norm()) < 0.05


def test_thin_layers_are_saved_copied_and_moved() -> None:
    model, x, y = thin_network()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(model)
    for p in other.parameters():
        nn.init.zeros_(p)
    other.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(other(x), y)
    assert other.to("meta")(x.to("meta")).shape == y.shape


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True),
        lambda: nn.Sequential(nn.LSTM(32, 32, batch_first=True)),
    ],
    ids=["attention", "lstm"],
)
def test_what_computes_with_a_tensor_itself_is_dense_again(make: Callable[[], nn.Module]) -> None:
    """Beside layers that become thin ones; the outputs are the same."""
    model = compress(make().double(), 4, grow="allow")
    names = list(make().state_dict())
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    before = model(x)
    decompress(model, form="factors")
    for one, other in zip(flat(model(x)), flat(before), strict=True):
        torch.testing.assert_close(one, other)
    kept = [name for name in names if "linear" not in name]
    assert set(kept) <= set(model.state_dict())
    thin = [m for m in model.modules() if type(m) is nn.Sequential and len(m) == 2]
    assert len(thin) == sum("linear" in name and "weight" in name for name in names)


def flat(output: Any) -> list[Tensor]:
    """Tensors of an output, of whatever it is made."""
    return [output] if isinstance(output, Tensor) else [t for part in output for t in flat(part)]
