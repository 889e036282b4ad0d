"""Adapters: zero at the start, trained alone, switched, merged, and aligned with a gradient."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from closeness import close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from ways_to_hold import METHODS, every_method

from sttp_manifold.errors import ConversionError, ShapeError, SpectrumError
from sttp_manifold.nn import (
    AdaptedLayer,
    SkippedLayerWarning,
    SpectralLinear,
    SpectralWeight,
    adapt,
    adapters,
    align_adapters,
    compress,
    decompress,
    merge,
    remove_adapter,
    set_adapter,
    summary,
    switch,
    together,
    unmerge,
    without_adapters,
)
from sttp_manifold.nn.adapter_places import places
from sttp_manifold.nn.stock import TABLE
from sttp_manifold.optim import RiemannianAdam, RiemannianMuon, RiemannianSGD, check_points

SPECTRA = ("full", "free", "bounded")
every_spectrum = pytest.mark.parametrize("spectrum", SPECTRA)


def net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, padding_mode="circular"),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(54, 12),
        nn.Tanh(),
        nn.Linear(12, 4, bias=False),
    )
    return model.to(dtype)


def image(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(5, 3, 3, 3, generator=torch.Generator().manual_seed(1)).to(dtype)


def target() -> Tensor:
    return torch.arange(5) % 4


def loss(model: nn.Module) -> Tensor:
    return nn.functional.cross_entropy(model(image()), target())


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 15) -> list[float]:
    seen = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        optimizer.step()
        seen.append(float(value.detach()))
    return seen


def trained(model: nn.Module, steps: int = 5) -> nn.Module:
    train(model, RiemannianAdam([p for p in model.parameters() if p.requires_grad], lr=0.05), steps)
    return model


def updates_of(model: nn.Module) -> list[SpectralWeight]:
    return [m for m in model.modules() if isinstance(m, SpectralWeight)]


# -- the start --------------------------------------------------------------------------------


@every_method
@every_spectrum
@pytest.mark.parametrize("kind", ["sttp", "svdp"])
def test_the_network_computes_what_it_did_and_only_the_update_is_trained(
    method: str, spectrum: str, kind: str
) -> None:
    model = net()
    before, outputs = list(model.parameters()), model(image())
    adapted = adapt(model, 3, method=method, spectrum=spectrum, kind=kind)
    assert adapted is model
    assert torch.equal(adapted(image()), outputs)
    assert not any(p.requires_grad for p in before)
    free = {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert {name.rpartition(".updates.default.weight.")[0] for name in free} == {"0", "3", "5"}
    assert len(free) == 3
    for weight in updates_of(adapted):
        assert bool((weight.bond() == 0).all())
        assert float(weight.tt().detach().orthonormality_error()) < 1e-12


@every_method
@every_spectrum
def test_the_first_gradient_is_that_of_the_spectrum(method: str, spectrum: str) -> None:
    """Frames rest while the spectrum is zero, and move from the second step on."""
    model = adapt(net(), 3, method=method, spectrum=spectrum)
    optimizer = RiemannianAdam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    frames = [w.tt().detach().core_frames() for w in updates_of(model)]
    for moved in (False, True):
        train(model, optimizer, 1)
        now = [w.tt().detach().core_frames() for w in updates_of(model)]
        for a, b in zip(frames, now, strict=True):
            gaps = [float((x - y).abs().max()) for x, y in zip(a, b, strict=True)]
            assert (max(gaps) > 1e-4) is moved
    assert all(bool((w.bond() != 0).any()) for w in updates_of(model))


@every_method
@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: RiemannianAdam(p, lr=0.05),
        lambda p: RiemannianMuon(p, lr=0.05),
        lambda p: RiemannianSGD(p, lr=0.5),
        lambda p: torch.optim.Adam(p, lr=0.05),
        lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9),
    ],
    ids=["adam", "muon", "sgd", "torch adam", "torch sgd"],
)
def test_every_optimizer_trains_it(method: str, optimizer: Callable[..., Any]) -> None:
    model = adapt(net(), 4, method=method, kind="svdp")
    made = optimizer([p for p in model.parameters() if p.requires_grad])
    if method == "riemannian" and type(made).__module__.startswith("torch."):
        pytest.skip("a plain optimizer leaves the manifold")
    align_adapters(model, lambda: loss(model))
    before = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    seen = train(model, made, 30)
    assert seen[-1] < 0.5 * seen[0]
    check_points(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)


def test_bounded_updates_move_the_weight_by_no_more_than_said() -> None:
    model = adapt(net(), 3, spectrum="bounded", bound=0.5, alpha=0.2)
    before = {n: m.base.weight.clone() for n, m in model.named_modules() if type(m) is AdaptedLayer}
    train(model, torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1.0), 30)
    for name, weight in before.items():
        gap = (model.get_submodule(name).weight - weight).detach().flatten(1)
        assert float(torch.linalg.matrix_norm(gap, 2)) < 0.1
    assert any(
        float((model.get_submodule(n).weight - w).detach().norm()) > 0.05 for n, w in before.items()
    )


@every_method
def test_values_and_gradients_are_those_of_the_sum(method: str) -> None:
    """Against the dense sum in the stock layers, by torch alone."""
    model = trained(adapt(net(), 3, method=method, alpha=0.7))
    dense = net()
    with torch.no_grad():
        for at in ("0", "3", "5"):
            layer, update = model.get_submodule(at), model.get_submodule(f"{at}.updates.default")
            dense.get_submodule(at).weight += 0.7 * update.weight().view(layer.base.weight.shape)
            close(layer.weight, dense.get_submodule(at).weight)
    x, y = image().requires_grad_(), image().requires_grad_()
    close(model(x), dense(y))
    model(x).square().sum().backward()
    dense(y).square().sum().backward()
    close(x.grad, y.grad, 1e-9)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(METHODS),
    st.sampled_from(SPECTRA),
    st.sampled_from(["sttp", "svdp"]),
    st.integers(1, 6),
    st.tuples(st.integers(1, 12), st.integers(1, 12)),
    st.floats(-3, 3).filter(lambda a: abs(a) > 0.1),
    st.integers(0, 99),
)
def test_any_layer_merges_and_unmerges(
    method: str, spectrum: str, kind: str, rank: int, size: tuple[int, int], alpha: float, seed: int
) -> None:
    torch.manual_seed(seed)
    layer = nn.Linear(*size).double()
    x = torch.randn(3, size[0], dtype=torch.float64)
    first = layer(x)
    model = adapt(
        nn.Sequential(layer), rank, method=method, spectrum=spectrum, kind=kind, alpha=alpha
    )
    assert torch.equal(model(x), first)
    weight = updates_of(model)[0]
    with torch.no_grad():
        value = weight.tt()
        s = 0.3 * torch.randn_like(value.spectrum)
        weight.encode_(type(value)(value.left, s, value.right, value.shape))
    y = model(x)
    merge(model)
    close(model(x), y)
    close(model[0].base(x), y)
    unmerge(model)
    close(model(x), y)
    close(model[0].base(x), first)
    close(merge(model)(x), remove_adapter(merge(model))(x))
    close(model(x), y)
    assert type(model[0]) is nn.Linear


# -- targets ----------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key_value = nn.Linear(8, 8), nn.Linear(8, 16)
        self.out = nn.Sequential(nn.Linear(8, 8), nn.Dropout())

    def forward(self, x: Tensor) -> Tensor:
        k, v = self.key_value(x).chunk(2, -1)
        return self.out(self.query(x) * k.softmax(-1) * v)


def blocks() -> nn.Module:
    return nn.Sequential(Block(), Block(), nn.Linear(8, 3))


@pytest.mark.parametrize(
    ("targets", "found"),
    [
        (None, "0.query 0.key_value 0.out.0 1.query 1.key_value 1.out.0 2"),
        ("query", "0.query 1.query"),
        (["0.query", "2"], "0.query 2"),
        (["*.key_*"], "0.key_value 1.key_value"),
        ("out", "0.out.0 1.out.0"),
        (Block, "0.query 0.key_value 0.out.0 1.query 1.key_value 1.out.0"),
        (lambda name, module: getattr(module, "out_features", 0) == 16, "0.key_value 1.key_value"),
        ([nn.Linear, "query"], "0.query 0.key_value 0.out.0 1.query 1.key_value 1.out.0 2"),
    ],
)
def test_targets(targets: Any, found: str) -> None:
    model = adapt(blocks(), 2, targets)
    assert adapters(model) == {"default": tuple(found.split())}


def test_targets_that_mean_nothing_and_bad_options() -> None:
    model = blocks()
    before = str(model)
    bad: list[tuple[Any, type[Exception], str]] = [
        ({"targets": "quary"}, ConversionError, "'quary'.*'0.query'"),
        ({"targets": []}, ConversionError, "targets is empty"),
        ({"targets": [3]}, ConversionError, "targets takes names, .*classes.*got 3"),
        ({"alpha": 0.0}, ConversionError, "alpha=1.0"),
        ({"alpha": float("nan")}, ConversionError, "alpha"),
        ({"name": "a.b"}, ConversionError, "without dots"),
        ({"name": "keys"}, ConversionError, "without dots"),
        ({"spectrum": "identity"}, SpectrumError, "starts at zero.*'full'"),
        ({"spectrum": "normalized"}, SpectrumError, "starts at zero"),
        ({"init": "pretrained"}, ConversionError, "align_adapters"),
        ({"rank": 0}, ShapeError, "rank"),
        ({"rang": 2}, TypeError, "rang"),
    ]
    for how, kind, words in bad:
        with pytest.raises(kind, match=words):
            adapt(model, **{"rank": 2, **how})
        assert str(model) == before
    with pytest.raises(ConversionError, match="no layer of the table"):
        adapt(nn.Sequential(nn.ReLU()), 2)
    for call in (merge, unmerge, remove_adapter, lambda m: set_adapter(m, "a")):
        with pytest.raises(ConversionError, match="has no adapters"):
            call(model)


class Bags(nn.Module):
    """Sums and maxima of vectors of words, and a layer on both."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.sums = nn.EmbeddingBag(20, 8, mode="sum")
        self.maxima = nn.EmbeddingBag(20, 8, mode="max")
        self.head = nn.Linear(16, 4)
        self.double()

    def forward(self, words: Tensor) -> Tensor:
        return self.head(torch.cat([self.sums(words), self.maxima(words)], -1))


def compressed_bags() -> nn.Module:
    return compress(Bags(), rank=3, grow="allow")


NOT_LINEAR = "'maxima': an EmbeddingBag with mode='max' is not linear in its weight"


@pytest.mark.parametrize("before", [Bags, compressed_bags])
def test_maxima_are_left_and_named_where_no_target_asks_for_them(
    before: Callable[[], nn.Module],
) -> None:
    words = torch.arange(12).view(3, 4)
    model = before()
    wanted = model(words)
    with pytest.warns(SkippedLayerWarning, match=NOT_LINEAR) as caught:
        model = adapt(model, 2)
    assert [warning.filename for warning in caught] == [__file__]
    assert adapters(model) == {"default": ("sums", "head")}
    close(model(words), wanted)
    assert not any(p.requires_grad for p in model.get_submodule("maxima").parameters())


@pytest.mark.parametrize("before", [Bags, compressed_bags])
@pytest.mark.parametrize("targets", ["maxima", ["head", "maxima"], "*", nn.EmbeddingBag])
def test_maxima_that_are_asked_for_are_refused_with_the_call_that_works(
    before: Callable[[], nn.Module], targets: Any
) -> None:
    model = before()
    if targets is nn.EmbeddingBag:
        targets = type(model.get_submodule("maxima"))
    with pytest.raises(ConversionError, match=rf"{NOT_LINEAR}.*adapt\(model, rank=8\)"):
        adapt(model, 2, targets=targets)
    assert not adapters(model)
    assert all(p.requires_grad for p in model.parameters())


def test_a_network_of_maxima_alone_has_nothing_to_adapt() -> None:
    with pytest.raises(ConversionError, match="no layer can have an update: the root module: an E"):
        adapt(nn.EmbeddingBag(20, 8, mode="max"), 2)


def test_every_layer_of_the_table_is_a_place() -> None:
    assert {row.stock for row in TABLE} >= {nn.Linear, nn.Conv2d, nn.MultiheadAttention}
    assert list(places(nn.Linear(2, 2)).values()) == [""]
    assert list(places(SpectralLinear(4, 4, 2)).values()) == [""]
    assert list(places(nn.GRUCell(2, 2)).values()) == ["weight_ih", "weight_hh"]
    assert not places(nn.LayerNorm(2))


# -- several ----------------------------------------------------------------------------------


def test_several_adapters_are_switched_and_added_up() -> None:
    model, x = net(), image()
    plain = model(x)
    trained(adapt(model, 3, ["3"], name="one"))
    one = model(x)
    trained(adapt(model, 2, ["3", "5"], name="two", method="riemannian", kind="svdp"))
    assert adapters(model) == {"one": ("3",), "two": ("3", "5")}
    two = model(x)
    both = set_adapter(model, ["one", "two"])(x)
    assert all(p.requires_grad for n, p in model.named_parameters() if ".updates." in n)
    close(set_adapter(model, "one")(x), one)
    assert {n.split(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {"one"}
    close(set_adapter(model, "two")(x), two)
    assert torch.equal(set_adapter(model, None)(x), plain)
    assert not any(p.requires_grad for p in model.parameters())
    set_adapter(model, ["two", "one"])
    with without_adapters(model):
        assert torch.equal(model(x), plain)
    close(model(x), both)
    merge(model)
    close(model(x), both)
    with pytest.raises(ConversionError, match="unmerge"):
        set_adapter(model, "one")
    with pytest.raises(ConversionError, match="unmerge"), without_adapters(model):
        pass
    unmerge(model)
    close(model(x), both)
    remove_adapter(model, "two")
    close(model(x), one)
    with pytest.raises(ConversionError, match=r"'two'.*'one'"):
        set_adapter(model, "two")
    with pytest.raises(ConversionError, match="already"):
        adapt(model, 2, ["3"], name="one")
    remove_adapter(model)
    assert str(model) == str(net())
    close(model(x), plain)


def test_merged_adapters_are_taken_back_as_they_were_put_in() -> None:
    model = trained(adapt(net(), 3))
    weight = model[3].base.weight.clone()
    merge(model)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1)  # trained further, or loaded anew
    close(unmerge(model)[3].base.weight, weight)


def test_a_merge_that_fails_changes_nothing() -> None:
    model = trained(adapt(net(torch.float32), 3, ["0", "3"]).double()).float()
    model[3].base.half()
    with torch.no_grad():
        model[3].base.weight.fill_(65504.0)
        model[3].updates["default"].alpha = 1e6
    before = [layer.base.weight.clone() for layer in (model[0], model[3])]
    with pytest.raises(ConversionError, match=r"'3'.*not finite"):
        merge(model)
    assert model[0].merged == ()
    torch.testing.assert_close(model[0].base.weight, before[0])


def test_weights_that_are_shared_or_spectral_are_not_merged_into() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    adapt(model, 2, ["2"])
    with pytest.raises(ConversionError, match=r"'2'.*0\.weight.*clone"):
        merge(model)
    model = adapt(compress(net(), rank=4, grow="allow"), 2)
    with pytest.raises(ConversionError, match="decompress"):
        merge(model)
    y = trained(model)(image())
    merge(decompress(model))
    close(model(image()), y)


# -- what torch does with it ------------------------------------------------------------------


@every_method
def test_compressed_networks_are_adapted_copied_and_switched(method: str) -> None:
    model = compress(net(), rank=4, method=method, grow="allow")
    y = model(image())
    trained(adapt(model, 2, method=method))
    z = model(image())
    assert not torch.allclose(y, z)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        close(twin(image()), z)
        trained(twin)
        close(model(image()), z)
    close(switch(model, METHODS[method == "householder"])(image()), z)
    trained(switch(model, "householder"))


@every_method
def test_a_state_is_loaded_into_the_same_adapter_and_no_other(method: str) -> None:
    one = trained(adapt(net(), 3, method=method))
    two = adapt(net(), 3, method=method)
    two.load_state_dict(one.state_dict())
    close(two(image()), one(image()))
    for how in (
        {"rank": 2},
        {"kind": "svdp"},
        {"spectrum": "free"},
        {"method": METHODS[method == "householder"]},
        {"alpha": 2.0},
    ):
        with pytest.raises(RuntimeError, match="does not fit"):
            adapt(net(), **{"rank": 3, "method": method, **how}).load_state_dict(one.state_dict())


def test_half_precision_keeps_updates_in_float32() -> None:
    model = adapt(net(torch.bfloat16), 3)
    assert {w.dtype for w in updates_of(model)} == {torch.float32}
    x = image(torch.bfloat16)
    y = model(x)
    assert y.dtype == torch.bfloat16
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x).float(), target()).backward()
        optimizer.step()
    before = model[3].base.weight.clone()
    wide = copy.deepcopy(model).float()(image(torch.float32))
    merge(model)
    assert model[3].base.weight.dtype == torch.bfloat16
    torch.testing.assert_close(model(x).float(), wide, rtol=0.1, atol=0.1)
    unmerge(model)
    eps = torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(model[3].base.weight, before, rtol=0, atol=2 * eps)
    assert {w.dtype for w in updates_of(adapt(net(), 3, dtype=torch.float32))} == {torch.float32}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        adapt(net(torch.float32), 3)(image(torch.float32)).float().sum().backward()


def test_a_single_layer_meta_compile_and_the_fast_path() -> None:
    layer = adapt(nn.Linear(8, 6), 2)
    assert isinstance(layer, AdaptedLayer)
    assert (layer.in_features, layer.bias) == (8, layer.base.bias)
    with pytest.raises(AttributeError, match="nonsense"):
        layer.nonsense  # noqa: B018
    assert type(remove_adapter(layer)) is nn.Linear
    with torch.device("meta"):
        meta = adapt(nn.Sequential(nn.Linear(8, 6)), 2)
    assert all(p.is_meta for p in meta.parameters())
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).eval()
    adapt(encoder, 2, ["linear1", "linear2"])
    optimizer = torch.optim.SGD([p for p in encoder.parameters() if p.requires_grad], lr=1.0)
    x = torch.randn(2, 5, 8)
    encoder.train()(x).square().sum().backward()
    optimizer.step()
    slow = encoder.eval()(x)
    with torch.no_grad():
        torch.testing.assert_close(encoder(x), slow)


# -- the aligned start ------------------------------------------------------------------------


@every_method
@every_spectrum
def test_the_first_step_is_along_the_leading_singular_vectors(method: str, spectrum: str) -> None:
    """Against LAPACK: the gradient of the bond is diagonal, with the largest singular values."""
    model = net()
    grads = torch.autograd.grad(loss(model), [model[k].weight for k in (0, 3, 5)])
    adapt(model, 3, kind="svdp", method=method, spectrum=spectrum)
    outputs = model(image())
    align_adapters(model, lambda: loss(model))
    assert torch.equal(model(image()), outputs)
    for weight, gradient in zip(updates_of(model), grads, strict=True):
        U, V = weight.tt().detach().frames()
        inner = U.mT @ gradient.flatten(1) @ V
        found = torch.linalg.svdvals(inner)
        close(found, torch.linalg.svdvals(gradient.flatten(1))[:3], 1e-9)
        if spectrum != "full":
            close(inner.diagonal().abs(), found, 1e-9)


def test_several_batches_add_up_and_an_aligned_start_falls_faster() -> None:
    def at_first(model: nn.Module) -> float:
        parameters = [p for p in model.parameters() if p.requires_grad]
        return sum(float(g.square().sum()) for g in torch.autograd.grad(loss(model), parameters))

    plain, one, two = (adapt(net(), 2, kind="svdp", spectrum="free") for _ in range(3))
    align_adapters(one, lambda: loss(one))
    align_adapters(two, [lambda: loss(two)] * 2)
    assert at_first(one) > 3 * at_first(plain)
    for a, b in zip(updates_of(one), updates_of(two), strict=True):
        close(a.tt().frames()[0].abs(), b.tt().frames()[0].abs(), 1e-9)


@pytest.mark.parametrize("kind", ["svdp", "sttp"])
@pytest.mark.parametrize("scale", [2.0**120, 2.0**-120])
def test_the_length_of_a_gradient_does_not_matter(kind: str, scale: float) -> None:
    """In float32, whose largest number is below 2^128."""
    torch.manual_seed(0)
    x, y, found = torch.randn(5, 30), torch.randn(5, 24), []
    for factor in (1.0, scale):
        torch.manual_seed(1)
        layer = adapt(nn.Linear(30, 24), 4, kind=kind)

        def loss(layer: nn.Module = layer, factor: float = factor) -> Tensor:
            return (layer(x) * y * factor).sum()

        found.append(align_adapters(layer, loss).updates["default"].weight.tt())
    cores = [tt.left + tt.right for tt in found]
    for one, other in zip(*cores, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_aligning_what_cannot_be_aligned() -> None:
    model = adapt(net(), 2)
    for how, kind, words in (
        (lambda: model(image()), ShapeError, "scalar"),
        (lambda: torch.zeros(()), ConversionError, "does not depend"),
        (lambda: model[5](torch.randn(2, 12).double()).sum(), ConversionError, "'0', '3'"),
        (lambda: loss(model) * float("nan"), ShapeError, "finite"),
    ):
        with pytest.raises(kind, match=words):
            align_adapters(model, how)
    assert all(layer.probe is None for layer in model if isinstance(layer, AdaptedLayer))
    with pytest.raises(ConversionError, match="not zero"):
        align_adapters(trained(model), lambda: loss(model))
    with pytest.raises(ConversionError, match="no adapter is active"):
        align_adapters(net(), lambda: loss(model))


def test_updates_are_formed_together() -> None:
    model = adapt(net(), 3)
    assert len(model._forward_pre_hooks) == 1
    x = image()
    y = trained(model)(x)
    close(together(model, False)(x), y)
    together(model)
    assert not remove_adapter(model)._forward_pre_hooks


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated")
def test_the_rest_of_the_package_and_torch_take_it() -> None:
    model = trained(adapt(net(), 3, ["3", "5"]))
    x, y = image(), model(image())
    rows = {row.layer: row for row in summary(model).rows}
    assert rows["3.base"].kind == "dense"
    assert rows["3.updates.default.weight"].kind.startswith("sttp")
    small = compress(copy.deepcopy(model), rank=100, grow="allow")
    assert isinstance(small[3].base, SpectralLinear)
    close(small(x), y)
    close(decompress(small)(x), y)
    close(torch.export.export(model, (x,)).module()(x), y)
    close(torch.compile(model, fullgraph=True, backend="eager")(x), y)
    close(torch.func.functional_call(model, dict(model.named_parameters()), (x,)), y)
