"""Spectral weights behind the tensors of modules that keep their forward."""

from __future__ import annotations

import copy
import pickle
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from closeness import close
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sttp_manifold import tt_svd
from sttp_manifold.errors import ConversionError, ShapeError
from sttp_manifold.nn import (
    compress,
    decompress,
    frame_batch,
    hold,
    recurrent,
    summary,
    switch,
    weights_of,
)
from sttp_manifold.nn.held import held_in
from sttp_manifold.nn.stack import MatrixView
from sttp_manifold.nn.stock import TABLE, Row
from sttp_manifold.optim import RiemannianAdam, check_points

DOUBLE: Any = {"dtype": torch.float64}


class Experts(nn.Module):
    """Three matrices in one tensor, and a transposed one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(3, 6, 4, **DOUBLE))
        self.scale = nn.Parameter(torch.ones(6, **DOUBLE))
        self.back = nn.Parameter(torch.randn(6, 5, **DOUBLE))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.first.mT * self.scale).sum(0) @ self.back


def views(module: nn.Module) -> dict[str, MatrixView]:
    how: dict[str, Any] = {"first": {"count": 3, "stacked": True}, "back": {"order": (1, 0)}}
    return {
        n: MatrixView(tuple(p.shape), **how[n])
        for n, p in module._parameters.items()
        if n in how and p is not None
    }


@pytest.fixture(autouse=True)
def row() -> Iterator[Row]:
    row = Row(Experts, None, views=views)
    TABLE.append(row)
    yield row
    TABLE.remove(row)


def made(rank: int = 100, **how: Any) -> tuple[nn.Module, Any, Tensor, Tensor]:
    torch.manual_seed(3)
    model, x = nn.Sequential(Experts()), torch.randn(3, 7, 4, **DOUBLE)
    y = model(x).detach()
    return compress(model, rank=rank, grow="allow", **how), model[0], x, y


def test_compress_and_back() -> None:
    model, experts, x, y = made()
    close(model(x), y)
    assert list(weights_of(experts)) == ["first.0", "first.1", "first.2", "back"]
    table = summary(model)
    assert [(r.layer, r.shape) for r in table.rows] == [("0.first", (3, 6, 4)), ("0.back", (6, 5))]
    assert table.total.dense == 3 * 24 + 6 + 30
    switch(model, "riemannian")
    close(model(x), y)
    decompress(model)
    assert list(model) == [experts]
    assert type(experts) is Experts
    assert list(experts._parameters) == ["first", "scale", "back"]
    close(model(x), y)


def test_copies_are_on_their_own() -> None:
    model, experts, x, y = made()
    twins = [copy.deepcopy(experts), pickle.loads(pickle.dumps(experts)), copy.copy(experts)]
    for twin in twins[:2]:
        close(twin(x), y)
        parametrize.remove_parametrizations(twin, "back")
        close(twin(x), y)
    close(twins[2](x), y)
    close(model(x), y)
    decompress(twins[0])
    close(twins[0](x), y)
    close(model(x), y)
    assert set(held_in(experts)) == {"first", "back"}


def test_states_and_assignments() -> None:
    model, experts, x, _ = made(2)
    other, *_ = made(2)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    low = experts.first.detach().flip(0)
    experts.first = low
    close(experts.first, low)
    with pytest.raises(ShapeError, match=r"\(3, 6, 4\)"):
        experts.first = low[0]
    # One rule with layer.weight = W: what the ranks do not carry is refused, with what works.
    wide = torch.randn_like(low)
    with pytest.raises(ConversionError, match=r"rank 2 does not carry.*\[0\]\.encode_\(W\)"):
        experts.first = wide
    close(experts.first, low)
    experts.parametrizations["first"][0].encode_(wide)
    nearest = torch.stack(
        [tt_svd(W, weights_of(experts)["first.0"].shape).to_matrix() for W in wide]
    )
    close(experts.first, nearest)
    experts.first = nearest
    with pytest.raises(ShapeError, match=r"\(3, 6, 4\)"):
        experts.parametrizations["first"][0].encode_(low[0])
    stock = {"first": wide, "back": experts.back.detach()}
    with pytest.raises(RuntimeError, match=r"parametrizations\.first\[0\]\.encode_\(state"):
        experts.load_state_dict(stock)


def test_writing_into_a_tensor_is_refused() -> None:
    """It would be lost: the tensor is computed at each read, in or out of a forward."""
    for module, name in (
        (nn.MultiheadAttention(8, 2), "in_proj_weight"),
        (nn.LSTM(8, 8), "weight_hh_l0"),
    ):
        compress(module, rank=2, grow="allow", together=False)
        before = getattr(module, name).detach().clone()
        with pytest.raises(ConversionError, match=r"would be lost.*encode_\(W\)"), torch.no_grad():
            getattr(module, name).zero_()
        with pytest.raises(ConversionError, match="would be lost"):
            nn.init.xavier_uniform_(getattr(module, name))
        assert torch.equal(getattr(module, name), before)
        x = torch.randn(3, 2, 8)
        output = module(x, x, x)[0] if isinstance(module, nn.MultiheadAttention) else module(x)[0]
        assert type(output) is Tensor
        output.sum().backward()
        assert all(p.grad is not None for w in weights_of(module).values() for p in w.parameters())


def test_sharing() -> None:
    torch.manual_seed(0)
    model: Any = nn.ModuleList([Experts(), Experts()])
    model[1].first = model[0].first
    compress(model, rank=2, grow="allow")
    one, two = (held_in(m)["first"].weight for m in model)
    assert one is two
    decompress(model)
    assert model[0].first is model[1].first
    assert model[0].back is not model[1].back


def test_what_was_held_stays_so() -> None:
    model, experts, x, y = made()
    parametrize.remove_parametrizations(experts, "back")
    assert list(weights_of(experts)) == ["first.0", "first.1", "first.2"]
    before = held_in(experts)["first"]
    compress(model, rank=100, grow="allow")
    assert held_in(experts)["first"] is before
    assert "back" in weights_of(experts)
    close(model(x), y)


def test_torchs_own_parametrizations_beside_it() -> None:
    model, experts, x, y = made()
    parametrize.register_parametrization(experts, "scale", nn.Identity())
    close(model(x), y)
    close(copy.deepcopy(model)(x), y)
    decompress(model)
    close(model(x), y)
    parametrize.remove_parametrizations(experts, "scale")
    assert type(experts) is Experts


# -- torch's modules ---------------------------------------------------------------------------


def sequence(*size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(1), **DOUBLE)


def test_packed_sequences_and_states_of_a_recurrent_layer() -> None:
    torch.manual_seed(0)
    stock = nn.LSTM(6, 5, 2, dropout=0.0, **DOUBLE)
    layer = compress(copy.deepcopy(stock), rank=100, grow="allow")
    packed = nn.utils.rnn.pack_padded_sequence(sequence(7, 3, 6), torch.tensor([7, 5, 2]))
    states = (sequence(2, 3, 5), sequence(2, 3, 5))
    found, wanted = layer(packed, states), stock(packed, states)
    close(found[0].data, wanted[0].data)
    close(found[1][1], wanted[1][1])
    assert [len(some) for some in layer.all_weights] == [4, 4]
    layer.flatten_parameters()
    copied = copy.deepcopy(layer).float()
    assert copied(sequence(7, 3, 6).float())[0].dtype == torch.float32
    decompress(layer)
    assert layer._flat_weights[0] is layer.weight_ih_l0
    close(layer(packed, states)[0].data, wanted[0].data)
    copy.deepcopy(layer)


def test_a_parametrization_of_a_recurrent_layer_can_be_removed_by_torch() -> None:
    torch.manual_seed(0)
    stock, x = nn.GRU(6, 5, **DOUBLE), sequence(4, 3, 6)
    layer = compress(copy.deepcopy(stock), rank=100, grow="allow")
    for name in ("weight_hh_l0", "weight_ih_l0"):
        parametrize.remove_parametrizations(layer, name)
        close(layer(x)[0], stock(x)[0])
    assert type(layer) is nn.GRU


def test_weights_of_a_recurrent_layer_lie_in_one_buffer_on_cuda(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """There torch lays tensors in a buffer; here its code is asked what it would lay."""
    laid: list[Any] = []
    monkeypatch.setattr(recurrent, "_is_on_cuda", lambda weight: isinstance(weight, Tensor))
    monkeypatch.setattr(nn.RNNBase, "flatten_parameters", lambda self: laid.append(self))
    torch.manual_seed(0)
    stock, x = nn.LSTM(6, 5, proj_size=3, **DOUBLE), sequence(4, 2, 6)
    layer = compress(copy.deepcopy(stock), rank=100, grow="allow")
    wanted = stock(x)[0]
    laid.clear()
    close(layer(x)[0], wanted)
    settings = laid[-1]
    assert len(settings._flat_weights) == len(settings._flat_weights_names) == 5
    for name in ("bias", "proj_size", "input_size", "mode", "hidden_size", "num_layers",
                 "batch_first", "bidirectional"):  # fmt: skip
        assert getattr(settings, name) == getattr(stock, name)
    layer(x)[0].square().sum().backward()
    stock(x)[0].square().sum().backward()
    close(layer.bias_hh_l0.grad, stock.bias_hh_l0.grad)
    assert all(p.grad is not None for p in layer.parameters())


class Counted(nn.Module):
    """Reads a weight many times."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.RNNCell(6, 5, **DOUBLE)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[1], 5)
        for step in x:
            h = self.cell(step, h)
        return h


def test_a_weight_is_formed_once_in_a_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    model = compress(Counted(), rank=2, grow="allow")
    formed: list[int] = []
    form = frame_batch.form
    monkeypatch.setattr(
        frame_batch, "form", lambda *args: formed.append(len(args[1])) or form(*args)
    )
    monkeypatch.setattr(sys.modules["sttp_manifold.nn.together"], "form", frame_batch.form)
    model(sequence(9, 3, 6)).sum().backward()
    assert formed == [2]


def encoder() -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, **DOUBLE)
    return nn.TransformerEncoder(layer, 2)


@pytest.mark.filterwarnings("ignore:.*nested tensors.*prototype")
@pytest.mark.parametrize("padded", [False, True])
def test_the_fast_path_of_transformers_is_left_and_taken_again(padded: bool) -> None:
    stock, x = encoder(), sequence(3, 5, 8)
    mask = torch.arange(5) >= torch.tensor([[5], [4], [2]]) if padded else None
    model = compress(copy.deepcopy(stock), rank=100, grow="allow")
    assert len(weights_of(model.layers[0].self_attn)) == 3
    seen = ~mask if mask is not None else torch.ones(3, 5, dtype=torch.bool)
    close(model(x, src_key_padding_mask=mask)[seen], stock(x, src_key_padding_mask=mask)[seen])
    with torch.no_grad():
        model.eval()
        stock.eval()
        wanted = stock(x, src_key_padding_mask=mask)[seen]
        close(model(x, src_key_padding_mask=mask)[seen], wanted)
        assert not model.use_nested_tensor
        copied = decompress(copy.deepcopy(model))
        close(copied(x, src_key_padding_mask=mask)[seen], wanted)
    assert copied.use_nested_tensor
    assert copied.layers[0].activation_relu_or_gelu == 1
    assert [type(m) for m in copied.modules()] == [type(m) for m in stock.modules()]


# -- by name -----------------------------------------------------------------------------------


def test_any_tensor_by_its_name() -> None:
    torch.manual_seed(2)
    stock = nn.Sequential(nn.Bilinear(6, 6, 4, **DOUBLE), nn.LayerNorm(4, **DOUBLE))
    x = sequence(3, 6)
    y = stock[0](x, x)
    model = hold(stock, "0.weight", rank=100, count=4, stacked=True)
    assert model is stock
    close(model[0](x, x), y)
    assert list(weights_of(model[0])) == ["weight.0", "weight.1", "weight.2", "weight.3"]
    with pytest.raises(ConversionError, match="already"):
        hold(model, "0.weight", rank=2)
    with pytest.raises(ConversionError, match=r"'0.nothing'.*no such parameter"):
        hold(model, "0.nothing", rank=2)
    with pytest.raises(ShapeError, match="d_out"):
        hold(model, "0.bias", rank=2)
    switch(model, "riemannian")
    close(model[0](x, x), y)
    decompress(model)
    assert type(model[0]) is nn.Bilinear
    close(model[0](x, x), y)


def test_what_is_shared_by_name_stays_shared() -> None:
    model = nn.ModuleList([nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(6, 8)])
    model[1].weight = model[0].weight
    hold(model, "1.weight", rank=2)
    assert held_in(model[0])["weight"].weight is held_in(model[1])["weight"].weight
    assert not held_in(model[2])
    decompress(model)
    assert model[0].weight is model[1].weight
    model[0].aside = [model[0].weight]
    with pytest.raises(ConversionError, match="aside"):
        hold(model, "0.weight", rank=2)


def test_what_computes_a_tensor_already_is_named() -> None:
    layer = nn.LSTM(6, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(layer, "weight_hh_l0")
    with pytest.raises(ConversionError, match="remove_weight_norm"):
        compress(layer, rank=2)
    cell = nn.RNNCell(6, 5)
    parametrize.register_parametrization(cell, "weight_hh", nn.Identity())
    with pytest.raises(ConversionError, match="remove_parametrizations"):
        compress(cell, rank=2)


def test_optimizers_and_training() -> None:
    torch.manual_seed(0)
    model = compress(encoder(), rank=3, method="riemannian", grow="allow")
    optimizer = RiemannianAdam(model.parameters(), lr=1e-2)
    x, target = sequence(3, 5, 8), sequence(3, 5, 8)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    check_points(model)
