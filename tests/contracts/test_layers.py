"""Every layer of the table keeps every law.

A new layer is a row of `sttp_manifold.nn.stock.TABLE`, and one or more rows here: a stock layer and
an input. What belongs to one layer alone is in `tests/nn`.
"""

from __future__ import annotations

import contextlib
import copy
import io
import os
import pickle
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import close
from gpt2_layer import conv1d
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from ways_to_hold import METHODS, every_method

from sttp_manifold.errors import ConversionError
from sttp_manifold.nn import (
    SpectralUpdate,
    SpectralWeight,
    adapt,
    compress,
    decompress,
    load,
    load_adapter,
    merge,
    remove_adapter,
    save,
    save_adapter,
    spectral_penalty,
    summary,
    switch,
    unmerge,
    weights_of,
)
from sttp_manifold.nn.stock import TABLE, row_of, stock_weights
from sttp_manifold.nn.weights_of import held_of, views_of
from sttp_manifold.optim import RiemannianSGD
from sttp_manifold.tt import SPECTRA, tt_svd

DOUBLE: Any = {"dtype": torch.float64}
FULL, LOW = 10_000, 2


@dataclass(frozen=True)
class Row:
    """A stock layer, and the input that it takes.

    Attributes:
        make: makes the stock layer, of a dtype.
        size: of an input.
        has_factors: whether ``form="factors"`` has two thin layers for it.
        indices: for a layer that takes indices, how many there are.
        has_curvature: whether torch has second derivatives of the stock layer.
        compiles: whether torch compiles the stock layer in one graph, and exports it.
        is_like_another: whether its weights are held as those of another row, so that one spectrum
            is enough.
    """

    make: Callable[..., nn.Module]
    size: tuple[int, ...]
    has_factors: bool = True
    indices: int | None = None
    has_curvature: bool = True
    compiles: bool = True
    is_like_another: bool = False

    def input(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """An input, the same at each call."""
        generator = torch.Generator().manual_seed(7)
        if self.indices is None:
            return torch.randn(self.size, generator=generator).to(dtype)
        x = torch.randint(self.indices, self.size, generator=generator)
        x[..., 0] = 0  # which is padding
        return x

    def spectral(self, rank: int = LOW, dtype: torch.dtype = torch.float64, **how: Any) -> Any:
        """The spectral layer of a stock one."""
        how = {"grow": "allow", "project": True, **how}
        return compress(self.make(dtype=dtype), rank=rank, **how)


ROWS: dict[str, Row] = {
    "linear": Row(lambda **k: nn.Linear(20, 12, **k), (5, 20)),
    "linear, no bias": Row(lambda **k: nn.Linear(20, 12, bias=False, **k), (2, 3, 20)),
    "linear, a vector": Row(lambda **k: nn.Linear(9, 16, **k), (9,)),
    "conv": Row(lambda **k: nn.Conv2d(8, 12, (3, 2), 2, 1, **k), (2, 8, 7, 6)),
    "conv, no bias": Row(lambda **k: nn.Conv2d(8, 12, 3, bias=False, **k), (8, 5, 6)),
    "conv, same": Row(
        lambda **k: nn.Conv2d(8, 12, 3, padding="same", dilation=2, padding_mode="circular", **k),
        (2, 8, 7, 6),
    ),
    "conv 1d": Row(
        lambda **k: nn.Conv1d(6, 8, 3, 2, "valid", 2, padding_mode="reflect", **k), (2, 6, 9)
    ),
    "conv 3d": Row(
        lambda **k: nn.Conv3d(4, 6, (2, 1, 3), padding=(1, 0, 2), padding_mode="replicate", **k),
        (4, 3, 3, 4),
    ),
    "transposed 1d": Row(
        lambda **k: nn.ConvTranspose1d(6, 8, 3, bias=False, dilation=2, **k), (6, 5)
    ),
    "transposed 2d": Row(
        lambda **k: nn.ConvTranspose2d(6, 8, (3, 2), 2, 1, (1, 0), **k), (2, 6, 4, 3)
    ),
    "transposed 3d": Row(
        lambda **k: nn.ConvTranspose3d(4, 6, (2, 1, 3), (2, 1, 1), groups=2, **k),
        (1, 4, 3, 2, 2),
        False,
    ),
    "transposed linear": Row(lambda **k: conv1d(12, 20, **k), (2, 3, 20)),
    "embedding": Row(lambda **k: nn.Embedding(30, 8, padding_idx=0, **k), (3, 4), indices=30),
    "bag": Row(
        lambda **k: nn.EmbeddingBag(30, 8, padding_idx=0, **k),
        (3, 4),
        has_factors=False,
        indices=30,
        has_curvature=False,
    ),
    "conv, wide groups": Row(
        lambda **k: nn.Conv1d(32, 32, 2, groups=2, bias=False, **k), (2, 32, 5)
    ),
    "conv, groups": Row(lambda **k: nn.Conv2d(8, 12, 3, groups=4, **k), (2, 8, 5, 5), False),
}


# -- modules that keep their forward, each made one of one tensor ------------------------------


def joined(outputs: Any) -> Tensor:
    """All tensors of an output as one."""
    if isinstance(outputs, Tensor):
        return outputs.flatten()
    return torch.cat([joined(one) for one in outputs if one is not None])


class OneLSTM(nn.LSTM):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return joined(super().forward(x))


class OneGRU(nn.GRU):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return joined(super().forward(x))


class OneRNN(nn.RNN):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return joined(super().forward(x))


class OneLSTMCell(nn.LSTMCell):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        h, c = super().forward(x[0])
        return joined(super().forward(x[1], (h, c)))


class OneAttention(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        y, weights = super().forward(x, x[..., : self.kdim], x[..., : self.vdim])
        return joined((y, weights))


class OneBilinear(nn.Bilinear):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x[..., : self.in2_features].sin())


class SomeExperts(nn.Module):
    """Of two layers, as those of transformers; for each input all of them."""

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 8, 6, dtype=dtype) / 3)
        self.down_proj = nn.Parameter(torch.randn(3, 6, 4, dtype=dtype) / 2)

    def forward(self, x: Tensor) -> Tensor:
        y = x.new_zeros(x.shape)
        for k in range(3):
            gate, up = nn.functional.linear(x, self.gate_up_proj[k]).chunk(2, -1)
            y = y + nn.functional.linear(gate.sigmoid() * up, self.down_proj[k])
        return y


KEPT: dict[str, Row] = {
    "lstm": Row(
        lambda **k: OneLSTM(6, 5, bidirectional=True, **k), (4, 3, 6), False, compiles=False
    ),
    "lstm, projected": Row(
        lambda **k: OneLSTM(6, 5, proj_size=4, batch_first=True, **k),
        (3, 4, 6),
        False,
        compiles=False,
        is_like_another=True,
    ),
    "gru": Row(
        lambda **k: OneGRU(6, 5, 2, bias=False, **k),
        (4, 6),
        False,
        compiles=False,
        is_like_another=True,
    ),
    "rnn": Row(
        lambda **k: OneRNN(6, 5, nonlinearity="relu", **k),
        (4, 3, 6),
        False,
        compiles=False,
        is_like_another=True,
    ),
    "lstm cell": Row(lambda **k: OneLSTMCell(6, 5, **k), (2, 3, 6), False, is_like_another=True),
    "gru cell": Row(lambda **k: nn.GRUCell(6, 5, **k), (3, 6), False, is_like_another=True),
    "rnn cell": Row(
        lambda **k: nn.RNNCell(6, 5, bias=False, **k), (6,), False, is_like_another=True
    ),
    "attention": Row(lambda **k: OneAttention(8, 2, batch_first=True, **k), (2, 5, 8), False),
    "attention, three": Row(
        lambda **k: OneAttention(8, 2, kdim=6, vdim=4, add_bias_kv=True, **k),
        (5, 2, 8),
        False,
        is_like_another=True,
    ),
    "output projection": Row(
        lambda **k: NonDynamicallyQuantizableLinear(6, 8, **k), (3, 6), False, is_like_another=True
    ),
    "bilinear": Row(lambda **k: OneBilinear(8, 6, 4, **k), (3, 8), False, is_like_another=True),
    "experts": Row(lambda **k: SomeExperts(**k), (5, 6), False),
}
ROWS |= KEPT

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")
every_row = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
every_row_and_spectrum = pytest.mark.parametrize(
    ("row", "spectrum"),
    [
        pytest.param(row, spectrum, id=f"{name}-{spectrum}")
        for name, row in ROWS.items()
        for spectrum in SPECTRA
        if spectrum == "free" or not row.is_like_another
    ],
)
every_row_and_form = pytest.mark.parametrize(
    ("row", "form"),
    [
        pytest.param(row, form, id=f"{name}-{form}")
        for name, row in ROWS.items()
        for form in ("spectral", "dense", "factors")
        if (form == "spectral" or row.has_factors) and not row.is_like_another
    ],
)


def other(method: str) -> str:
    return METHODS[1 - METHODS.index(method)]


def dense_twin(row: Row, layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """The stock layer's own forward, of the dense weights as functions of the parameters."""
    stock = row.make(**DOUBLE)
    tensors = {n: reduce(getattr, n.split("."), layer) for n, _ in stock.named_parameters()}
    return lambda x: torch.func.functional_call(stock, tensors, (x,))


def beside(layer: nn.Module) -> dict[str, Tensor]:
    """Parameters of a layer that are no spectral weights, nor would be."""
    own = {name: p for name, p in layer._parameters.items() if p is not None}
    return {name: p for name, p in own.items() if name not in stock_weights(layer)}


def test_the_table_is_complete() -> None:
    made = [row for row in map(row_of, (row.make() for row in ROWS.values())) if row is not None]
    assert set(made) == set(TABLE)
    for row in TABLE:
        if row.spectral is not None:
            assert row.spectral.stock is row.stock
            assert row.stock in {type(own.make()) for own in ROWS.values()}


# -- values and gradients ----------------------------------------------------------------------


@every_row
@every_method
@pytest.mark.parametrize("kind", ["sttp", "svdp"])
def test_at_full_rank_nothing_changes(row: Row, method: str, kind: str) -> None:
    stock = row.make(**DOUBLE)
    layer = compress(copy.deepcopy(stock), rank=FULL, method=method, kind=kind, grow="allow")
    assert set(held_of(layer)) == set(stock_weights(stock)) != set()
    close(layer(row.input()), stock(row.input()))


@every_row_and_spectrum
@every_method
@pytest.mark.parametrize("rank", [LOW, FULL])
def test_values_and_gradients_are_those_of_the_dense_weights(
    row: Row, method: str, spectrum: str, rank: int
) -> None:
    layer = row.spectral(rank, method=method, spectrum=spectrum)
    x = row.input()
    x.requires_grad_(x.is_floating_point())
    y, wanted = layer(x), dense_twin(row, layer)(x)
    close(y, wanted)
    target = torch.linspace(-1, 1, y.numel(), **DOUBLE).view_as(y)
    variables = [v for v in (x, *layer.parameters()) if v.requires_grad and v.numel()]
    found, right = (
        torch.autograd.grad((out.sin() * target).sum(), variables, allow_unused=True)
        for out in (y, wanted)
    )
    for a, b in zip(found, right, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            close(a, b, 1e-9)


@every_row
@every_method
def test_second_derivatives(row: Row, method: str) -> None:
    if not row.has_curvature:
        pytest.skip("torch has none of this layer")
    layer = row.spectral(method=method)
    parameters = [p for p in layer.parameters() if p.numel()]

    def curved(forward: Callable[[Tensor], Tensor]) -> list[Tensor]:
        y = forward(row.input())
        first = torch.autograd.grad(y.square().sum(), parameters, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), parameters))  # type: ignore[arg-type]

    for a, b in zip(curved(layer), curved(dense_twin(row, layer)), strict=True):
        close(a, b, 1e-8)


# -- dtypes, copies, states --------------------------------------------------------------------


@every_row
@every_method
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.bfloat16, 6e-2), (torch.float16, 1e-2)],
)
def test_every_dtype(row: Row, method: str, dtype: torch.dtype, tolerance: float) -> None:
    layer = row.spectral(method=method)
    wanted = layer(row.input()).detach()
    narrow = copy.deepcopy(layer).to(dtype)
    y = narrow(row.input(dtype))
    assert y.dtype == dtype
    error = float((y.detach().double() - wanted).norm() / wanted.norm())
    assert error < tolerance
    y.float().square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in narrow.parameters())
    made = row.spectral(method=method, dtype=dtype)
    assert {p.dtype for p in made.parameters()} == {dtype}
    assert {p.dtype for p in switch(made, other(method)).parameters()} == {dtype}
    assert {p.dtype for p in decompress(made).parameters()} == {dtype}


@every_row_and_spectrum
@every_method
def test_copies_and_states(row: Row, method: str, spectrum: str) -> None:
    layer, twin = (row.spectral(method=method, spectrum=spectrum) for _ in range(2))
    x = row.input()
    y = layer(x)
    for made in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(made(x), y)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    twin.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(twin(x), y)
    with torch.device("meta"):
        empty = row.spectral(method=method, spectrum=spectrum, init="eye")
    empty.to_empty(device="cpu").load_state_dict(layer.state_dict())
    assert torch.equal(empty(x), y)


@every_row
@every_method
def test_files_make_the_stock_layer_spectral(row: Row, method: str, tmp_path: Path) -> None:
    layer = row.spectral(method=method)
    save(layer, tmp_path / "layer.safetensors")
    made = load(tmp_path / "layer.safetensors", into=row.make(**DOUBLE))
    assert type(made).__name__ == type(layer).__name__  # each module that stays has its own
    close(made(row.input()), layer(row.input()))


def sums_in(adapted: nn.Module, stock: nn.Module) -> dict[str, Tensor]:
    """The tensors of an adapted layer that are matrices of the stock one, by their names there."""
    names = [f"{at}.{n}" if at else n for at, m in stock.named_modules() for n in stock_weights(m)]
    return {name: reduce(getattr, name.split("."), adapted) for name in names}


@every_row
@every_method
def test_adapters_of_the_layer(row: Row, method: str, tmp_path: Path) -> None:
    """Zero at the start, then the stock layer of the sum, and merged into it."""
    stock, x = row.make(**DOUBLE), row.input()
    y = stock(x)
    model = adapt(nn.Sequential(copy.deepcopy(stock)), LOW, method=method)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert torch.equal(model(x), y)
    for _ in range(2):  # the first step moves the spectrum, the second one frames as well
        model.zero_grad()
        model(x).square().sum().backward()
        RiemannianSGD(trained, lr=0.1).step()
    z = model(x)
    assert not torch.equal(z, y)
    with torch.no_grad():
        close(model(x), z)  # by torch's fast paths, where there are some
    close(z, torch.func.functional_call(stock, sums_in(model[0], stock), (x,)))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), z)
    other = adapt(nn.Sequential(copy.deepcopy(stock)), LOW, method=method)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), z)
    save_adapter(model, tmp_path / "update.safetensors")
    loaded = load_adapter(tmp_path / "update.safetensors", into=nn.Sequential(copy.deepcopy(stock)))
    close(loaded(x), z)
    close(unmerge(merge(model))(x), z)
    close(remove_adapter(merge(model))(x), z)
    assert type(model[0]) is type(stock)
    assert list(model[0].state_dict()) == list(stock.state_dict())


@every_row
@every_method
def test_gradients_of_adapters_are_those_of_the_sum(row: Row, method: str) -> None:
    """Along random directions of the update, against the stock layer's own gradients."""
    stock, x = row.make(**DOUBLE), row.input()
    model = adapt(nn.Sequential(copy.deepcopy(stock)), LOW, method=method, alpha=0.7)
    updates = [m for m in model.modules() if isinstance(m, SpectralUpdate)]
    sums = sums_in(model[0], stock)
    assert len(updates) == len(sums)
    for p in (p for p in model.parameters() if p.requires_grad):
        with torch.no_grad():
            p.add_(torch.linspace(-0.1, 0.1, p.numel(), **DOUBLE).view_as(p))
    sums = sums_in(model[0], stock)  # of what was just written
    leaves = {n: s.detach().requires_grad_() for n, s in sums.items()}
    wanted = torch.func.functional_call(stock, leaves, (x,)).sin().sum()
    gradients = torch.autograd.grad(wanted, list(leaves.values()))
    trained = [p for p in model.parameters() if p.requires_grad]
    right = torch.autograd.grad(list(sums.values()), trained, gradients)
    for a, b in zip(torch.autograd.grad(model(x).sin().sum(), trained), right, strict=True):
        close(a, b, 1e-9)


@every_row
@every_method
def test_another_plan_is_refused(row: Row, method: str) -> None:
    state = row.spectral(1, method=method).state_dict()
    with pytest.raises(RuntimeError, match="does not fit"):
        row.spectral(method=method).load_state_dict(state, strict=False)
    with pytest.raises(RuntimeError, match="compress"):
        row.spectral(method=method).load_state_dict(row.make(**DOUBLE).state_dict())


@every_row
@every_method
def test_the_call_that_a_refusal_names_takes_the_nearest(row: Row, method: str) -> None:
    layer = row.spectral(method=method)
    for name, held in held_of(layer).items():
        view = views_of(layer)[name]
        W = torch.randn(view.shape, **DOUBLE)
        with pytest.raises(ConversionError) as refused:
            setattr(layer, name, W)
        call = re.search(r"carries by (.*), or more rank", str(refused.value))
        assert call is not None
        eval(call[1], {"layer": layer, "module": layer, "name": name, "W": W, "tt_svd": tt_svd})
        nearest = tt_svd(view.split(W).flatten(2), held.shape).to_matrix()
        close(held().view_as(nearest), nearest)


# -- conversions -------------------------------------------------------------------------------


@every_row_and_spectrum
@every_method
def test_switch_and_decompress_keep_the_outputs(row: Row, method: str, spectrum: str) -> None:
    layer, x = row.spectral(method=method, spectrum=spectrum), row.input()
    y, names, stock = layer(x).detach(), list(held_of(layer)), row.make()
    assert switch(layer, other(method)) is layer
    assert {weight.method for weight in weights_of(layer).values()} == {other(method)}
    assert list(held_of(layer)) == names
    close(layer(x), y)
    thin = decompress(copy.deepcopy(layer), form="factors")
    close(thin(x), y)
    assert isinstance(thin, nn.Sequential) == row.has_factors
    dense = decompress(layer)
    close(dense(x), y)
    assert repr(dense) == repr(stock)
    assert list(dense.state_dict()) == list(stock.state_dict())
    assert set(stock_weights(dense)) == set(names)
    for model in (thin, dense):
        homes = {type(m).__module__.partition(".")[0] for m in model.modules()}
        assert homes <= {"torch", "transformers", type(stock).__module__.partition(".")[0]}
        assert all(type(p) is nn.Parameter and p.is_leaf for p in model.parameters())


@every_row
@every_method
def test_ties_biases_freezing_and_modes_are_kept(row: Row, method: str) -> None:
    model = nn.ModuleList([row.make(), row.make()])
    for name, weight in stock_weights(model[0]).items():
        model[1].register_parameter(name, weight)
        weight.requires_grad_(False)
    model[0].eval()
    rest = [beside(layer) for layer in model]

    def look() -> None:
        assert [layer.training for layer in model] == [False, True]
        for a, b in zip(weights_of(model[0]).values(), weights_of(model[1]).values(), strict=True):
            assert a is b
            assert not a.trainable
        assert [beside(layer) for layer in model] == rest
        assert all(p.requires_grad for some in rest for p in some.values())

    compress(model, rank=LOW, method=method, grow="allow")
    look()
    switch(model, other(method))
    look()
    thin = decompress(copy.deepcopy(model), form="factors")
    frozen = [{id(p) for p in layer.parameters() if not p.requires_grad} for layer in thin]
    assert frozen[0] == frozen[1] != set()
    assert [layer.training for layer in thin] == [False, True]
    decompress(model)
    for name, weight in stock_weights(model[0]).items():
        assert stock_weights(model[1])[name] is weight
        assert not weight.requires_grad
    assert [beside(layer) for layer in model] == rest


@every_row
@every_method
def test_hooks_and_attributes_go_along(row: Row, method: str) -> None:
    model = nn.Sequential(row.make(**DOUBLE))
    model[0].factor = 2.0
    handle = model[0].register_forward_hook(lambda m, _, y: m.factor * y)
    compress(model, rank=FULL, method=method, grow="allow")
    for change in (
        lambda m: m,
        lambda m: switch(m, other(method)),
        lambda m: decompress(m, form="factors"),
    ):
        change(model)
        y = model(row.input())
        handle.remove()
        close(y, 2 * model(row.input()))
        handle = model[0].register_forward_hook(lambda m, _, y: m.factor * y)


@every_row
@every_method
def test_tools_for_whole_networks_see_the_layer(row: Row, method: str) -> None:
    stock = row.make()
    layer = row.spectral(method=method)
    found, views = held_of(layer), views_of(layer)
    assert list(found) == list(views) == list(stock_weights(stock))
    assert all(isinstance(weight, SpectralWeight) for weight in weights_of(layer).values())
    assert len(weights_of(layer)) == sum(view.count for view in views.values())
    for name, weight in stock_weights(stock).items():
        assert views[name].shape == tuple(getattr(layer, name).shape) == tuple(weight.shape)
    table = summary(layer)
    inside = [w for m in stock.modules() for w in stock_weights(m).values()]
    assert [r.shape for r in table.rows] == [tuple(w.shape) for w in inside]
    assert table.total.dense == summary(stock).total.dense
    assert spectral_penalty(layer, "d_optimal").isfinite()


# -- torch's machinery -------------------------------------------------------------------------


def compile_all() -> None:
    """Compile a row of each type; in a process of its own, since tests check types when called."""
    compiled_ones = [r for r in ROWS.values() if r.compiles and not r.is_like_another]
    one_of_each = {type(row.make()): row for row in compiled_ones}
    for k, row in enumerate(one_of_each.values()):
        # What differs between the methods is the weight, which is the same in all layers.
        for method in METHODS if k == 0 else [METHODS[k % 2]]:
            torch._dynamo.reset()
            layer, x = row.spectral(method=method), row.input()
            compiled = torch.compile(layer, backend="eager", fullgraph=True)
            y = compiled(x)
            graphs = counters["stats"]["unique_graphs"]
            # Eager calls in between keep what they compute once: no graph depends on it.
            close(y, layer(x))
            layer.eval()(x)
            summary(layer.train())
            compiled(x).square().sum().backward()
            assert counters["stats"]["unique_graphs"] == graphs, (row, method)
            assert all(p.grad is not None for p in layer.parameters() if p.numel())
            stock = row.make(**DOUBLE)
            with contextlib.suppress(RuntimeError):  # an input that is no batch
                stock(torch.cat((x, x)))
                assert compilations(layer, x) <= compilations(stock, x)


def takes_batches(row: Row) -> bool:
    """Whether the first dimension of the input may be of any size."""
    try:
        row.make(**DOUBLE)(torch.cat([row.input()] * 2))
    except RuntimeError:
        return False
    return True


def compilations(layer: nn.Module, x: Tensor) -> int:
    """How often a layer is compiled for batches of several sizes."""
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with torch.no_grad():
        for count in (1, 2, 40, 3, 5, 17):
            compiled(torch.cat([x] * count))
    return counters["stats"]["unique_graphs"]


@pytest.mark.slow
def test_every_layer_compiles_in_one_graph() -> None:
    here = Path(__file__).resolve()
    path = os.pathsep.join(map(str, here.parents[:3]))
    subprocess.run(
        [sys.executable, "-c", f"import {here.stem}; {here.stem}.compile_all()"],
        check=True,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        timeout=1200,
    )


@every_row_and_form
@every_method
def test_exports(row: Row, method: str, form: str) -> None:
    layer, x = row.spectral(method=method), row.input()
    y = layer(x).detach()
    model = layer if form == "spectral" else decompress(layer, form=form)
    # A bag of even size is exported for one number of rows, torch's LSTM for one length.
    fixed = isinstance(row.make(), nn.EmbeddingBag) or not row.compiles
    if form != "spectral" or fixed or not takes_batches(row):
        close(torch.export.export(model, (x,)).module()(x), y)
        return
    sizes = ({0: torch.export.Dim.AUTO},)
    exported = torch.export.export(model, (torch.cat((x, x)),), dynamic_shapes=sizes).module()
    for count in (1, 3):
        more = torch.cat([x] * count) if count * len(x) > 1 else torch.cat((x, x))
        close(exported(more), layer(more))


@every_row_and_form
@every_method
def test_traces(row: Row, method: str, form: str) -> None:
    layer, x = row.spectral(method=method), row.input()
    y = layer(x).detach()
    model = layer if form == "spectral" else decompress(layer, form=form)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, x)
    close(traced(x), y)
    if takes_batches(row):
        more = torch.cat((x, x, x))
        close(traced(more), model(more))


@every_row
@every_method
def test_transforms_of_torch_func(row: Row, method: str) -> None:
    layer, x = row.spectral(method=method), row.input()
    parameters = dict(layer.named_parameters())

    def loss(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(layer, values, (x,)).square().sum()

    gradients = torch.func.grad(loss)(parameters)
    layer(x).square().sum().backward()
    for name, p in parameters.items():
        if p.numel():
            close(gradients[name], p.grad, 1e-9)  # type: ignore[arg-type]
