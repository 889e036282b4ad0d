"""Tables of vectors: padding, frequencies, bags, and the weight that an output layer shares."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from ways_to_hold import every_method

from sttp_manifold.errors import ConversionError, ShapeError
from sttp_manifold.nn import (
    SpectralEmbedding,
    SpectralEmbeddingBag,
    SpectralLinear,
    compress,
    decompress,
    load,
    save,
    summary,
)
from sttp_manifold.optim import RiemannianAdam

DOUBLE: Any = {"dtype": torch.float64}


class Tied(nn.Module):
    """A table of tokens that is the matrix of the output layer as well."""

    def __init__(self, padding_idx: int | None = None) -> None:
        super().__init__()
        self.table = nn.Embedding(48, 16, padding_idx)
        self.out = nn.Linear(16, 48, bias=False)
        self.out.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.table(x)))


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@every_method
@pytest.mark.parametrize("form", ["dense", "factors", "cores"])
def test_every_form_gives_the_rows_of_the_table(
    method: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = SpectralEmbedding(48, 20, 6, -1, True, method=method, **DOUBLE)
    monkeypatch.setattr(layer, "_form", lambda x: form)
    stock = nn.Embedding(48, 20, 47, scale_grad_by_freq=True, **DOUBLE)
    for x in (torch.tensor([[3, 3, 47], [3, 0, 1]]), torch.tensor(5), torch.zeros(2, 0).long()):
        y, wanted = layer(x), torch.func.functional_call(stock, {"weight": layer.weight}, x)
        close(y, wanted)
        if y.numel():
            target = torch.randn_like(y)
            parameters = list(layer.parameters())
            found, right = (
                torch.autograd.grad((out * target).sum(), parameters) for out in (y, wanted)
            )
            for a, b in zip(found, right, strict=True):
                close(a, b)
    with pytest.raises(IndexError):
        layer(torch.tensor([48]))


def test_a_table_is_not_formed_where_few_rows_are_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = SpectralEmbedding(32_000, 64, 16)
    monkeypatch.setattr(layer.spectral_weight, "forward", lambda: pytest.fail("W was formed"))
    assert layer(torch.randint(32_000, (2, 30))).shape == (2, 30, 64)


@every_method
def test_padding_stays_exactly_zero_through_training(method: str) -> None:
    layer = compress(nn.Embedding(30, 8, padding_idx=4), rank=3, method=method)
    x = torch.tensor([[4, 1, 2, 3, 4]])
    optimizer = RiemannianAdam(layer.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        (layer(x) - 1).square().sum().backward()
        optimizer.step()
    assert not layer(x)[0, [0, 4]].any()
    assert layer(x)[0, 1:4].all()
    assert not layer.weight[4].any()
    for form in ("dense", "factors"):
        back = decompress(copy.deepcopy(layer), form=form)
        assert not back(x)[0, [0, 4]].any()
        torch.testing.assert_close(back(x), layer(x))


def test_padding_of_a_pretrained_table_is_its_row(tmp_path: Any) -> None:
    stock = nn.Embedding(30, 8, padding_idx=4)
    nn.init.normal_(stock.weight)
    row = stock.weight[4].detach().clone()
    layer = compress(stock, rank=3)
    x = torch.tensor([4, 1])
    assert torch.equal(layer(x)[0], row)
    assert not torch.autograd.grad(layer(x)[0].sum(), list(layer.parameters()), retain_graph=True)[
        0
    ].any()
    assert torch.equal(decompress(copy.deepcopy(layer), form="factors")(x)[0], row)
    save(layer, tmp_path / "table.safetensors")
    fresh = load(tmp_path / "table.safetensors", into=nn.Embedding(30, 8, padding_idx=4))
    assert torch.equal(fresh(x), layer(x))


@every_method
@pytest.mark.parametrize("padding_idx", [None, 0])
def test_one_weight_serves_table_and_output(
    method: str, padding_idx: int | None, tmp_path: Any
) -> None:
    x = torch.tensor([[0, 3, 47], [3, 2, 1]])
    model = compress(Tied(padding_idx).double(), rank=6, method=method)
    assert model.table.spectral_weight is model.out.spectral_weight
    assert [row.shared for row in summary(model).rows] == [None, "table"]
    optimizer = RiemannianAdam(model.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x).flatten(0, 1), x.flatten()).backward()
        optimizer.step()
    y = model(x)
    alone = model.out(torch.tanh(model.table(x)))  # each forms its own
    close(y, alone)
    dense, thin = (decompress(copy.deepcopy(model), form=form) for form in ("dense", "factors"))
    close(dense(x), y)
    close(thin(x), y)
    assert dense.table.weight is dense.out.weight
    assert thin.table[0].weight is thin.out[1].weight
    save(model, tmp_path / "tied.safetensors")
    fresh = load(tmp_path / "tied.safetensors", into=Tied(padding_idx).double())
    assert fresh.table.spectral_weight is fresh.out.spectral_weight
    close(fresh(x), y)


def test_a_row_that_one_table_cannot_hold_twice_is_refused() -> None:
    model = nn.Sequential(SpectralEmbedding(48, 16, 6, padding_idx=0), nn.Tanh())
    model.append(SpectralLinear(16, 48, bias=False, weight=model[0].spectral_weight))
    with pytest.raises(ConversionError, match="padding_row = None"):
        decompress(model)
    model[0].padding_row = None
    y = model(torch.tensor([0, 1]))
    torch.testing.assert_close(decompress(model)(torch.tensor([0, 1])), y)


@pytest.mark.parametrize("setting", [{"max_norm": 1.0}, {"sparse": True}])
@pytest.mark.parametrize("stock", [nn.Embedding, nn.EmbeddingBag])
def test_what_speaks_of_stored_rows_is_refused(stock: Any, setting: dict[str, Any]) -> None:
    name = next(iter(setting))
    layer = stock(30, 8, **setting)
    with pytest.raises(ConversionError, match=rf"set layer\.{name} = "):
        compress(layer, rank=2)
    setattr(layer, name, None if name == "max_norm" else False)
    compress(layer, rank=2)


def test_bad_settings_are_named() -> None:
    with pytest.raises(ShapeError, match="padding_idx"):
        SpectralEmbedding(8, 4, 2, padding_idx=8)
    with pytest.raises(ShapeError, match="'sum', 'mean' or 'max'"):
        SpectralEmbeddingBag(8, 4, 2, mode="median")
    with pytest.raises(ShapeError, match=r"x\.long\(\)"):
        SpectralEmbedding(8, 4, 2)(torch.zeros(2))


# -- bags --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["dense", "factors", "cores"])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding_idx", [None, 2])
def test_bags_are_those_of_torch(
    form: str, mode: str, padding_idx: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: Any = {"mode": mode, "padding_idx": padding_idx, "include_last_offset": True}
    stock = nn.EmbeddingBag(48, 16, **settings, **DOUBLE)
    layer = SpectralEmbeddingBag(48, 16, 5, **settings, **DOUBLE)
    monkeypatch.setattr(layer, "_form", lambda x: form)
    x = torch.randint(48, (4, 6))
    x[0, :3], x[1] = 2, 2
    cases: list[tuple[Any, ...]] = [(x,), (x.flatten(), torch.tensor([0, 2, 2, 9, 24]))]
    if mode == "sum":
        cases.append((x, None, torch.rand(4, 6, **DOUBLE)))
    for given in cases:
        y = layer(*given)
        wanted = torch.func.functional_call(stock, {"weight": layer.weight}, given)
        close(y, wanted)
        target = torch.randn_like(y)
        parameters = list(layer.parameters())
        found, right = (
            torch.autograd.grad((out * target).sum(), parameters) for out in (y, wanted)
        )
        for a, b in zip(found, right, strict=True):
            close(a, b)


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_gradients_in_bags_are_divided_by_frequency(mode: str) -> None:
    # By the definition: torch's own kernel for bags divides some rows by the counts of others.
    layer = SpectralEmbeddingBag(48, 16, 5, True, mode, **DOUBLE)
    x = torch.tensor([[3, 3, 5], [3, 1, 1]])
    table = layer.weight
    counts = torch.bincount(x.flatten(), minlength=48)[x].unsqueeze(-1)
    rows = table[x]
    divided = rows / counts + (rows - rows / counts).detach()
    wanted = divided.sum(1) if mode == "sum" else divided.mean(1)
    target = torch.randn_like(wanted)
    parameters = list(layer.parameters())
    found, right = (
        torch.autograd.grad((out * target).sum(), parameters) for out in (layer(x), wanted)
    )
    for a, b in zip(found, right, strict=True):
        close(a, b)
