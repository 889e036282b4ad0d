"""Adapters of modules that keep their forward: attention, recurrent layers, any matrix."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import close
from torch import Tensor, nn
from ways_to_hold import METHODS, every_method

from sttp_manifold.errors import ConversionError
from sttp_manifold.nn import (
    AdaptedTensor,
    SkippedLayerWarning,
    SpectralWeight,
    adapt,
    adapters,
    align_adapters,
    compress,
    decompress,
    hold,
    load,
    load_adapter,
    merge,
    remove_adapter,
    save,
    save_adapter,
    set_adapter,
    summary,
    switch,
    unmerge,
    without_adapters,
)
from sttp_manifold.nn.held import HeldWeight
from sttp_manifold.optim import RiemannianAdam, RiemannianMuon, check_points


def encoder(dtype: torch.dtype = torch.float64, layers: int = 2) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    made = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
    for p in made.parameters():  # torch gives all layers the same numbers, and zeros as biases
        if p.ndim > 1:
            nn.init.xavier_normal_(p)
    return made.to(dtype)


def tokens(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1)).to(dtype)


def fit(
    model: nn.Module, x: Tensor, y: Tensor, steps: int = 5, make: Any = RiemannianAdam
) -> list[float]:
    optimizer = make([p for p in model.parameters() if p.requires_grad], lr=0.03)
    seen = []
    for _ in range(steps):
        optimizer.zero_grad()
        found = model(x)
        loss = ((found[0] if isinstance(found, tuple) else found) - y).square().mean()
        loss.backward()
        optimizer.step()
        seen.append(float(loss.detach()))
    return seen


def trained(model: nn.Module, x: Tensor, steps: int = 4) -> nn.Module:
    found = model(x)
    wanted = found[0] if isinstance(found, tuple) else found
    fit(model, x, wanted.detach().roll(1, -1), steps)
    return model


# -- real ones ---------------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("make", [RiemannianAdam, RiemannianMuon])
def test_an_encoder_learns_by_its_attention_alone(method: str, make: Any) -> None:
    """A teacher whose attention differs by a low rank; the student has it beside its own."""
    teacher, x = encoder(), tokens()
    student = copy.deepcopy(teacher)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in teacher.layers:
            for part in layer.self_attn.in_proj_weight.chunk(3):
                a, b = (torch.randn(16, 2, generator=generator).double() for _ in range(2))
                part += 0.05 * a @ b.T
    y = teacher(x).detach()
    adapt(student, 2, ["self_attn"], method=method, kind="svdp")
    assert adapters(student)["default"] == tuple(
        f"layers.{k}.self_attn.{name}"
        for k, name in itertools.product((0, 1), ("in_proj_weight", "out_proj.weight"))
    )
    before = {n: p.clone() for n, p in student.named_parameters() if not p.requires_grad}
    align_adapters(student, lambda: (student(x) - y).square().mean())
    seen = fit(student, x, y, 60, make)
    assert seen[-1] < 0.2 * seen[0]
    check_points(student)
    assert all(torch.equal(p, before[n]) for n, p in student.named_parameters() if n in before)
    student.eval()
    slow = student(x)
    with torch.no_grad():  # the kernel that torch has for all of an encoder layer
        close(student(x), slow)
    plain = remove_adapter(merge(student))
    close(plain(x), slow)
    assert {type(m).__module__.partition(".")[0] for m in plain.modules()} == {"torch"}


@every_method
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_recurrent_layer_learns(method: str, kind: type[nn.RNNBase]) -> None:
    torch.manual_seed(0)
    model = kind(6, 8, 2, bidirectional=True, batch_first=True).double()
    x = torch.randn(4, 7, 6).double()
    y = copy.deepcopy(model)(x)[0].detach().flip(0)
    adapt(model, 3, method=method)
    assert len(adapters(model)["default"]) == 8
    seen = fit(model, x, y, 60)
    assert seen[-1] < 0.7 * seen[0]
    check_points(model)
    z = model(x)[0]
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([7, 5, 5, 2]), batch_first=True)
    dense = remove_adapter(merge(copy.deepcopy(model)))
    assert type(dense) is kind
    close(dense(x)[0], z)
    close(dense(packed)[0].data, model(packed)[0].data)
    assert all(a is b for a, b in zip(dense._flat_weights, dense.parameters(), strict=True))


# -- targets -----------------------------------------------------------------------------------


class Mixed(nn.Module):
    """A matrix of its own, a layer, an attention and a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(8, 8) / 3)
        self.scale = nn.Parameter(torch.ones(8))
        self.lin = nn.Linear(8, 8)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.rnn = nn.LSTM(8, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.lin(x @ self.table) * self.scale
        x = x + self.attn(x, x, x)[0]
        return self.rnn(x)[0]


@pytest.mark.parametrize(
    ("targets", "found"),
    [
        (None, "lin attn.in_proj_weight attn.out_proj.weight rnn.weight_ih_l0 rnn.weight_hh_l0"),
        ("attn", "attn.in_proj_weight attn.out_proj.weight"),
        ("attn.in_proj_weight", "attn.in_proj_weight"),
        ("out_proj", "attn.out_proj.weight"),
        ("weight_hh_l0", "rnn.weight_hh_l0"),
        (["*.weight_ih_*", "lin"], "lin rnn.weight_ih_l0"),
        (nn.LSTM, "rnn.weight_ih_l0 rnn.weight_hh_l0"),
        (lambda _, m: isinstance(m, nn.RNNBase), "rnn.weight_ih_l0 rnn.weight_hh_l0"),
        ("table", "table"),
        (["rnn", "table"], "table rnn.weight_ih_l0 rnn.weight_hh_l0"),
    ],
)
def test_targets(targets: Any, found: str) -> None:
    torch.manual_seed(0)
    model, x = Mixed().double(), torch.randn(2, 3, 8).double()
    y = model(x)
    adapt(model, 2, targets)
    assert adapters(model) == {"default": tuple(found.split())}
    close(model(x), y)  # torch computes attention otherwise where nothing is trained
    z = trained(model, x)(x)
    assert not torch.allclose(z, y)
    close(remove_adapter(merge(model))(x), z)
    assert list(model.state_dict()) == list(Mixed().state_dict())


def test_targets_that_mean_nothing() -> None:
    model = Mixed()
    for target, words in (
        ("scale", "'scale'"),
        ("rnn.weight_ih_l7", "weight_ih_l7"),
        ([nn.Conv2d], "Conv2d.*'attn.in_proj_weight'"),
    ):
        with pytest.raises(ConversionError, match=words):
            adapt(model, 2, target)
        assert all(p.requires_grad for p in model.parameters())
    own = nn.Module()
    own.table = nn.Parameter(torch.randn(3, 3))
    with pytest.raises(ConversionError, match=r"its table itself.*targets=\['table'\]"):
        adapt(own, 2)
    assert adapters(adapt(own, 2, ["table"])) == {"default": ("table",)}


def test_a_second_adapter_by_class_beside_a_first_one() -> None:
    model = adapt(Mixed(), 2, [nn.Linear, nn.LSTM])
    adapt(model, 2, [nn.Linear, nn.LSTM], name="second")
    assert adapters(model)["second"] == adapters(model)["default"]


# -- several, merged, saved --------------------------------------------------------------------


@every_method
def test_several_adapters_are_switched_added_up_and_merged(method: str) -> None:
    model, x = encoder(), tokens()
    plain = model(x)
    one = trained(adapt(model, 2, ["self_attn"], name="one", method=method), x)(x)
    two = trained(adapt(model, 3, ["in_proj_weight", "linear1"], name="two", alpha=0.5), x)(x)
    assert adapters(model)["two"][0] == "layers.0.self_attn.in_proj_weight"
    both = set_adapter(model, ["one", "two"])(x)
    close(set_adapter(model, "one")(x), one)
    close(set_adapter(model, "two")(x), two)
    close(set_adapter(model, None)(x), plain)
    set_adapter(model, ["two", "one"])
    with without_adapters(model):
        close(model(x), plain)
    close(model(x), both)
    attention = model.layers[0].self_attn
    adapted = attention.parametrizations.in_proj_weight[0]
    assert isinstance(adapted, AdaptedTensor)
    assert adapted.place == (torch.float64, torch.device("cpu"))
    first, second = (adapted.updates[n].weight.parts for n in ("one", "two"))
    parts = [a() + 0.5 * b() for a, b in zip(first, second, strict=True)]  # query, key, value
    close(attention.in_proj_weight, adapted.base + torch.cat(parts))
    merge(model)
    close(model(x), both)
    assert attention.in_proj_weight is adapted.base  # nothing is added any more
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.requires_grad):
            p.add_(0.1)  # trained further, or loaded anew
    close(model(x), both)
    unmerge(model)
    close(set_adapter(model, None)(x), plain)
    remove_adapter(model, "two")
    assert set(adapters(model)) == {"one"}
    remove_adapter(model)
    assert str(model) == str(encoder())
    close(model(x), plain)
    with pytest.raises(ConversionError, match="already"):
        adapt(adapt(model, 2), 2)


@every_method
def test_an_adapter_alone_and_the_whole_network_in_files(tmp_path: Path, method: str) -> None:
    x = tokens()
    model = trained(adapt(encoder(), 2, method=method), x)
    y = model(x)
    save_adapter(model, tmp_path / "a")
    close(load_adapter(tmp_path / "a", into=encoder())(x), y)
    other = trained(adapt(encoder(), 3, name="first"), x)
    close(load_adapter(tmp_path / "a", into=other, name="second")(x), y)
    with pytest.raises(ConversionError, match=r"self_attn.in_proj_weight.*'second' already"):
        load_adapter(tmp_path / "a", into=other, name="second")
    fewer = encoder(layers=1)
    with pytest.raises(ConversionError, match=r"layers\.1.*has not"):
        load_adapter(tmp_path / "a", into=fewer)
    assert str(fewer) == str(encoder(layers=1))
    save(model, tmp_path / "b")
    close(load(tmp_path / "b", into=adapt(encoder(), 2, method=method))(x), y)


def test_a_shared_tensor_is_not_merged_into() -> None:
    model = nn.ModuleList([nn.LSTMCell(4, 4), nn.LSTMCell(4, 4)])
    model[1].weight_ih = model[0].weight_ih
    adapt(model, 2, ["1.weight_ih"])
    with pytest.raises(ConversionError, match=r"'1.weight_ih'.*0\.weight_ih.*parametrizations"):
        merge(model)


# -- beside compression ------------------------------------------------------------------------


@every_method
def test_compressed_modules_are_adapted_and_made_dense(tmp_path: Path, method: str) -> None:
    x = tokens()
    model = compress(encoder(), rank=4, grow="allow", method=method)
    y = model(x)
    frozen = [w for w in model.modules() if isinstance(w, SpectralWeight)]
    trained(adapt(model, 2, method=method), x)
    assert not any(w.trainable for w in frozen)
    z = model(x)
    assert not torch.allclose(z, y)
    with without_adapters(model):
        close(model(x), y)
    held = model.layers[0].self_attn.parametrizations.in_proj_weight[0].base
    assert isinstance(held, HeldWeight)
    assert "layers.0.self_attn" in {row.layer for row in summary(model).rows if row.kind != "dense"}
    with pytest.raises(ConversionError, match="decompress"):
        merge(model)
    close(switch(copy.deepcopy(model), METHODS[method == "householder"])(x), z)
    save(model, tmp_path / "a")
    again = adapt(compress(encoder(), rank=4, grow="allow", method=method), 2, method=method)
    close(load(tmp_path / "a", into=again)(x), z)
    bare = remove_adapter(copy.deepcopy(model))
    close(bare(x), y)
    assert bare.layers[0].self_attn.parametrizations.in_proj_weight[0].held is not None
    close(decompress(copy.deepcopy(bare))(x), y)
    decompress(model)
    close(model(x), z)
    close(remove_adapter(merge(model))(x), z)
    assert str(model) == str(encoder())


def test_what_was_held_by_name_is_adapted() -> None:
    torch.manual_seed(0)
    model, x = Mixed().double(), torch.randn(2, 3, 8).double()
    hold(model, "table", 3, kind="svdp")
    y = model(x)
    adapt(model, 2, ["table"])
    close(model(x), y)
    z = trained(model, x)(x)
    close(remove_adapter(merge(decompress(model)))(x), z)


def test_adapted_modules_are_not_compressed_and_say_so() -> None:
    model = adapt(encoder(), 2, ["self_attn"])
    with pytest.warns(SkippedLayerWarning, match=r"self_attn.*has adapters beside it.*merge"):
        compress(model, rank=4, grow="allow")
    with pytest.raises(ConversionError, match="has adapters beside it"):
        compress(adapt(nn.LSTM(8, 8), 2), rank=2, grow="allow")


# -- reads, writes, dtypes, torch's machinery --------------------------------------------------


def test_the_sum_is_formed_once_in_a_forward_and_refuses_to_be_written_into(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = tokens()
    model = trained(adapt(encoder(), 2, ["self_attn"]), x).eval()
    count = []
    summed = AdaptedTensor._sum
    monkeypatch.setattr(
        AdaptedTensor, "_sum", lambda self, updates: count.append(0) or summed(self, updates)
    )
    with torch.no_grad():
        model(x)
    assert len(count) == 4
    attention = model.layers[0].self_attn
    with pytest.raises(ConversionError, match="remove_adapter"):
        nn.init.zeros_(attention.in_proj_weight)
    with pytest.raises(ConversionError, match=r"base\.copy_"):
        attention.in_proj_weight = torch.zeros(48, 16).double()
    assert attention.in_proj_weight.requires_grad
    set_adapter(model, None)
    assert isinstance(attention.in_proj_weight, nn.Parameter)


def test_half_precision_rounds_the_sum_once() -> None:
    x = tokens(torch.bfloat16)
    model = encoder(torch.bfloat16)
    adapt(model, 2, ["self_attn"])
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    trained(model, x)
    for layer in model.layers:
        adapted = layer.self_attn.parametrizations.in_proj_weight[0]
        wide = adapted.base.float() + adapted.delta(adapted.updates["default"])
        assert torch.equal(layer.self_attn.in_proj_weight.detach(), wide.detach().bfloat16())
    y = model(x)
    merge(model)
    torch.testing.assert_close(model(x), y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        adapt(encoder(torch.float32), 2)(tokens(torch.float32)).float().sum().backward()


def test_an_attention_alone_compiles_and_is_exported() -> None:
    torch.manual_seed(0)
    model, x = nn.MultiheadAttention(8, 2, batch_first=True).double(), torch.randn(2, 3, 8).double()
    adapt(model, 2)
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.requires_grad):
            p.add_(0.1)
    wanted = model(x, x, x)[0]
    close(torch.compile(model, fullgraph=True, backend="eager")(x, x, x)[0], wanted)
    close(torch.export.export(model, (x, x, x)).module()(x, x, x)[0], wanted)
    values = dict(model.named_parameters())
    close(torch.func.functional_call(model, values, (x, x, x))[0], wanted)
    with torch.device("meta"):
        meta = adapt(nn.LSTM(8, 8), 2)
    assert all(p.is_meta for p in meta.parameters())


def test_an_aligned_start_sees_the_gradient_of_each_matrix() -> None:
    """Against LAPACK: query, key and value have singular subspaces of their own."""
    model, x = encoder(), tokens()
    dense = encoder()
    loss = dense(x).sin().sum()
    gradient = torch.autograd.grad(loss, dense.layers[0].self_attn.in_proj_weight)[0]
    adapt(model, 2, ["in_proj_weight"], kind="svdp")
    align_adapters(model, lambda: model(x).sin().sum())
    update = model.layers[0].self_attn.parametrizations.in_proj_weight[0].updates["default"]
    for weight, part in zip(update.weight.parts, gradient.chunk(3), strict=True):
        U, V = weight.tt().detach().frames()
        close(torch.linalg.svdvals(U.mT @ part @ V), torch.linalg.svdvals(part)[:2], 1e-9)
