"""`compress`: which layers, what is kept, and what is refused."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from ways_to_hold import METHODS

from sttp_manifold import TTShape
from sttp_manifold.errors import ConversionError, ShapeError, SpectrumError
from sttp_manifold.nn import (
    SkippedLayerWarning,
    SpectralConv2d,
    SpectralLayer,
    SpectralLinear,
    compress,
    summary,
)
from sttp_manifold.tt import SPECTRA

KINDS = ("sttp", "svdp")


def network() -> nn.Sequential:
    """Convolutions with and without bias, a norm, linear layers, one nested."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2, groups=2),
        nn.Flatten(),
        nn.Sequential(nn.Linear(144, 32), nn.ReLU(), nn.Linear(32, 10, bias=False)),
    )


def layers(model: nn.Module) -> dict[str, SpectralLayer]:
    return {n: m for n, m in model.named_modules() if isinstance(m, SpectralLayer)}


class Twice(nn.Module):
    """One layer used at two places, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 12)
        self.inner = nn.ModuleDict({"again": self.first})

    def forward(self, x: Tensor) -> Tensor:
        return self.inner["again"](self.first(x).tanh())


class Table(nn.Embedding):
    """A subclass, of which `compress` does not know what it does."""


class Tied(nn.Module):
    """Two layers with one weight, and perhaps an unknown kind of embedding with the same."""

    def __init__(self, embedding: bool = False) -> None:
        super().__init__()
        self.a = nn.Linear(12, 20)
        self.b = nn.Linear(12, 20, bias=False)
        self.c = nn.Linear(20, 12)
        self.b.weight = self.a.weight
        if embedding:
            self.table = Table(20, 12)
            self.table.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.a(x) * self.b(x))


# -- what is converted -------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spectrum", ["free", "full"])
def test_full_rank_leaves_the_outputs(method: str, kind: str, spectrum: str) -> None:
    model, x = network().double().eval(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    y = model(x)
    made = compress(model, rank=1000, kind=kind, method=method, spectrum=spectrum, grow="allow")
    assert made is model
    assert list(layers(model)) == ["0", "3", "5.0", "5.2"]
    assert type(model[0]) is SpectralConv2d
    assert type(model[5][0]) is SpectralLinear
    torch.testing.assert_close(model(x), y, rtol=0, atol=1e-11)
    for layer in layers(model).values():
        weight = layer.spectral_weight
        assert (weight.method, weight.spectrum) == (method, spectrum)
        assert weight.dtype == torch.float64
        assert not layer.training


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_options_reach_every_layer(method: str, spectrum: str) -> None:
    bound = 0.5 if spectrum == "bounded" else 1.0
    model = compress(
        network(),
        rank=3,
        kind="sttp",
        method=method,
        spectrum=spectrum,
        kernel="factored",
        bound=bound,
        project=True,
    )
    found = layers(model)
    assert len(found) == 4
    assert found["3"].spectral_weight.shape == TTShape.for_conv((16, 8, 3, 3), 3, "factored")
    for layer in found.values():
        weight = layer.spectral_weight
        assert (weight.spectrum, weight.bound, weight.shape.rank) == (spectrum, bound, 3)
    model(torch.randn(2, 3, 8, 8)).sum().backward()


def test_other_inits_start_anew() -> None:
    model = compress(network(), rank=3, init="random")
    for layer in layers(model).values():
        torch.testing.assert_close(
            layer.spectral_weight.tt().singular_values(), torch.ones(3), rtol=0, atol=1e-5
        )


def test_biases_norms_and_the_rest_are_the_same_objects() -> None:
    model = network()
    kept = [model[1], model[1].weight, model[3].bias, model[5], model[5][0].bias]
    compress(model, rank=3)
    assert kept[0] is model[1]
    for a, b in zip(
        kept[1:], [model[1].weight, model[3].bias, model[5], model[5][0].bias], strict=True
    ):
        assert a is b
    assert model[0].bias is None
    assert model[5][2].bias is None


@pytest.mark.parametrize("layer", [nn.Linear(12, 8), nn.Conv2d(4, 8, 3, bias=False)])
def test_a_root_layer_is_returned_anew(layer: nn.Module) -> None:
    made = compress(layer, rank=2)
    assert isinstance(made, SpectralLayer)
    assert made is not layer
    assert made.bias is layer.bias


def test_frozen_weights_modes_and_hooks_are_kept() -> None:
    model = network()
    model[0].requires_grad_(False)
    model[5][0].bias.requires_grad_(False)
    model[3].eval()
    seen: list[str] = []
    handle = model[3].register_forward_hook(lambda *_: seen.append("after"))
    model[3].register_forward_pre_hook(lambda *_: seen.append("before"))
    compress(model, rank=3)
    assert not any(p.requires_grad for p in model[0].parameters())
    assert all(p.requires_grad for p in model[3].parameters())
    assert not model[5][0].bias.requires_grad
    assert all(p.requires_grad for p in model[5][0].spectral_weight.parameters())
    assert model.training
    assert not model[3].training
    assert not model[3].spectral_weight.training
    model(torch.randn(1, 3, 8, 8))
    assert seen == ["before", "after"]
    handle.remove()
    model(torch.randn(1, 3, 8, 8))
    assert seen == ["before", "after", "before"]


def test_subclasses_and_spectral_layers_stay() -> None:
    class MyLinear(nn.Linear):
        pass

    model = nn.Sequential(MyLinear(8, 8), SpectralLinear(8, 8, 2), nn.Linear(8, 8))
    kept = list(model)
    with pytest.warns(SkippedLayerWarning, match=r"1 MyLinear, dense \(\d+\.\d % of the param"):
        compress(model, rank=3)
    assert model[0] is kept[0]
    assert model[1] is kept[1]
    assert isinstance(model[2], SpectralLinear)
    attention = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 3, 8)
    y = attention(x)
    compress(attention, rank=100, only="linear*")
    assert list(layers(attention)) == ["linear1", "linear2"]
    torch.testing.assert_close(attention(x), y)


def test_nothing_to_compress_is_an_error() -> None:
    for model in (nn.ReLU(), nn.Sequential(SpectralLinear(8, 8, 2)), nn.Sequential()):
        with pytest.raises(ConversionError, match="nothing to compress"):
            compress(model, rank=3)
    with pytest.raises(ConversionError, match="nothing to compress"):
        compress(nn.Sequential(nn.Linear(3, 3)), rank=3, skip=["0"])
    with pytest.raises(ConversionError, match="nothing to compress"):
        compress(nn.Sequential(nn.BatchNorm1d(3)), budget=0.5)


# -- skip --------------------------------------------------------------------------------------


def test_skip_takes_layers_containers_and_a_single_name() -> None:
    assert list(layers(compress(network(), 3, skip=["0", "5.2"]))) == ["3", "5.0"]
    assert list(layers(compress(network(), 3, skip=("5",)))) == ["0", "3"]
    assert list(layers(compress(network(), 3, skip=iter(["5"])))) == ["0", "3"]
    assert list(layers(compress(network(), 3, skip="5.0"))) == ["0", "3", "5.2"]
    model = Twice()
    with pytest.raises(ConversionError, match="nothing"):
        compress(model, 3, skip=["inner.again"])
    with pytest.raises(ConversionError, match="nothing"):
        compress(nn.Linear(4, 4), 3, skip=[""])


def test_an_unknown_name_lists_the_layers() -> None:
    with pytest.raises(ConversionError, match=r"'conv1'.*'0', '3', '5\.0', '5\.2'") as caught:
        compress(network(), 3, skip=["0", "conv1"])
    assert caught.value.layer == "conv1"


# -- sharing -----------------------------------------------------------------------------------


def test_a_module_used_twice_stays_one() -> None:
    model = Twice().double()
    x = torch.randn(3, 12, dtype=torch.float64)
    y = model(x)
    compress(model, rank=100)
    assert isinstance(model.first, SpectralLinear)
    assert model.inner["again"] is model.first
    torch.testing.assert_close(model(x), y)


@pytest.mark.parametrize("method", METHODS)
def test_tied_weights_stay_tied(method: str) -> None:
    model = Tied().double()
    x = torch.randn(3, 12, dtype=torch.float64)
    y = model(x)
    compress(model, rank=100, method=method, grow="allow")
    assert model.a.spectral_weight is model.b.spectral_weight
    assert model.c.spectral_weight is not model.a.spectral_weight
    assert (model.a.bias is None, model.b.bias is None) == (False, True)
    torch.testing.assert_close(model(x), y)
    again = copy.deepcopy(model)
    assert again.a.spectral_weight is again.b.spectral_weight


def test_tied_convolutions_share_one_kernel() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)).double()
    model[1].weight = model[0].weight
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    y = model(x)
    compress(model, 100)
    assert model[0].spectral_weight is model[1].spectral_weight
    torch.testing.assert_close(model(x), y)


@pytest.mark.parametrize(
    ("model", "skip", "named"),
    [
        (Tied(embedding=True), (), "'table.weight'"),
        (Tied(), ("b",), "'b.weight'"),
    ],
)
def test_ties_that_would_break_are_left_with_a_warning(
    model: Tied, skip: tuple[str, ...], named: str
) -> None:
    with pytest.warns(SkippedLayerWarning, match=f"'a'.*shares its weight with {named}") as seen:
        compress(model, rank=3, skip=skip)
    assert len(seen) == 1
    assert list(layers(model)) == ["c"]
    assert model.a.weight is model.b.weight


def test_weights_in_the_same_memory_are_left_with_a_warning() -> None:
    model = nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 6), nn.Linear(6, 8))
    model[1].weight = nn.Parameter(model[0].weight.detach().T)
    with pytest.warns(SkippedLayerWarning, match=r"'1\.weight'.*'0\.weight'"):
        compress(model, rank=2)
    assert list(layers(model)) == ["2"]


def test_a_tie_with_a_loose_parameter_is_seen() -> None:
    model = Tied()
    model.loose = nn.Parameter(torch.zeros(3))
    model.other = model.c.weight
    with pytest.warns(SkippedLayerWarning, match="'other'"):
        compress(model, rank=3)
    assert list(layers(model)) == ["a", "b"]


# -- growth and budget -------------------------------------------------------------------------


def test_layers_that_would_grow_are_left_with_one_warning() -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2), nn.Linear(2, 3))

    with pytest.warns(SkippedLayerWarning, match=r"'1' would grow.*'2' would grow") as seen:
        made = compress(model(), rank=8, method="riemannian")
    assert len(seen) == 1
    assert list(layers(made)) == ["0"]
    assert isinstance(made[1], nn.Linear)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = compress(model(), rank=8, method="riemannian", grow="allow")
        assert list(layers(made)) == ["0", "1", "2"]
        # The chart never stores more than the dense weight.
        made = compress(model(), rank=100, method="householder")
        assert list(layers(made)) == ["0", "1", "2"]
    assert summary(made).total.stored == summary(model()).total.stored
    with pytest.raises(ConversionError, match=r"nothing to compress.*would grow"):
        compress(nn.Linear(2, 3), rank=8, method="riemannian")


def _kept(model: nn.Module, rank: int, **how: Any) -> int:
    table = summary(compress(model, rank=rank, **how))
    return table.total.parameters


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", [{}, {"method": "riemannian", "grow": "allow"}])
@pytest.mark.parametrize("spectrum", ["free", "normalized", "identity"])
@pytest.mark.parametrize("budget", [0.15, 0.5])
def test_a_budget_is_the_largest_rank_within_it(
    kind: str, how: dict[str, Any], spectrum: str, budget: float
) -> None:
    make: Callable[[], nn.Module] = lambda: network().double()  # noqa: E731
    how = {"kind": kind, "spectrum": spectrum, "project": True, "init": "eye", **how}
    dense = summary(make()).total.dense
    model = compress(make(), budget=budget, of="model", **how)
    rank = max(layer.spectral_weight.shape.rank for layer in layers(model).values())
    assert summary(model).total.parameters <= budget * dense
    above = [_kept(make(), r, **how) for r in range(rank + 1, 33)]
    assert all(kept > budget * dense for kept in above)


def test_a_budget_counts_skipped_layers_in_full() -> None:
    dense = summary(network()).total.dense
    model = compress(network(), budget=0.5, of="model", skip=["5.2"])
    assert summary(model).Z <= 50
    with pytest.raises(ConversionError, match=r"smallest reachable budget is 0\.7") as caught:
        compress(network(), budget=0.5, of="model", skip=["5.0"])
    smallest = float(str(caught.value).split("budget is ")[1].split(";")[0])
    model = compress(network(), budget=smallest, of="model", skip=["5.0"])
    assert {layer.spectral_weight.shape.rank for layer in layers(model).values()} == {1}
    assert summary(model).total.parameters == pytest.approx(smallest * dense, abs=0.01)


def test_a_budget_counts_layers_that_would_grow_in_full() -> None:
    """At rank 8 the second layer stays dense on the manifold; the budget knows."""
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 2, bias=False))
    dense = 64 * 64 + 128
    budget = (TTShape.for_matrix(64, 64, 8).dim() + 128) / dense
    with pytest.warns(SkippedLayerWarning, match="'1' would grow"):
        compress(model, budget=budget, method="riemannian")
    assert model[0].spectral_weight.shape.rank == 8
    assert pytest.approx(100 * budget) == summary(model).Z


def test_a_budget_finds_the_largest_rank_where_more_rank_is_fewer_dimensions() -> None:
    """Orthogonal 16 x 16 matrices have 120 dimensions, as rank 5; the ranks between have more."""
    counts = {r: TTShape.svd(16, 16, r).dim("identity") for r in (5, 10, 16)}
    assert counts == {5: 120, 10: 165, 16: 120}
    model = nn.Sequential(nn.Linear(16, 16, bias=False))
    compress(model, budget=0.5, kind="svdp", spectrum="identity", init="eye")
    assert model[0].spectral_weight.shape.rank == 16


def test_a_budget_of_one_keeps_every_dimension() -> None:
    model = compress(network(), budget=1.0)
    assert summary(model).Z == 100


@pytest.mark.parametrize("budget", [0.0, -0.1, 1.5, float("nan")])
def test_a_budget_is_a_fraction(budget: float) -> None:
    with pytest.raises(ConversionError, match=r"budget=0\.05"):
        compress(network(), budget=budget)


# -- refusals, all of them before anything has changed -----------------------------------------


def _parametrized() -> nn.Module:
    class Half(nn.Module):
        def forward(self, W: Tensor) -> Tensor:
            return W / 2

    layer = nn.Linear(8, 8)
    parametrize.register_parametrization(layer, "weight", Half())
    return layer


UNFIT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "parametrized": (_parametrized, "remove_parametrizations"),
    "weight_norm": (lambda: parametrizations.weight_norm(nn.Linear(8, 8)), "parametrization"),
    "spectral_norm": (lambda: parametrizations.spectral_norm(nn.Linear(8, 8)), "parametrization"),
    "old spectral_norm": (lambda: nn.utils.spectral_norm(nn.Linear(8, 8)), "computed from"),
    "pruned": (lambda: prune.l1_unstructured(nn.Linear(8, 8), "weight", 3), "computed from"),
    "parametrized bias": (
        lambda: parametrizations.weight_norm(nn.Linear(8, 8), "bias", dim=0),
        "parametrization",
    ),
    "lazy": (lambda: nn.LazyLinear(8), "first input"),
    "lazy convolution": (lambda: nn.LazyConv2d(8, 3), "first input"),
}


@pytest.mark.parametrize(("make", "message"), UNFIT.values(), ids=UNFIT)
def test_unfit_layers_are_left_and_named(make: Callable[[], nn.Module], message: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(make()))
    before = list(model.modules())
    with pytest.raises(ConversionError, match=rf"nothing.*'1\.0'.*{message}") as caught:
        compress(model, rank=2, skip="0")
    assert caught.value.layer == "1.0"
    assert list(model.modules()) == before
    with pytest.warns(SkippedLayerWarning, match=rf"'1\.0'.*{message}"):
        compress(model, rank=2)
    assert isinstance(model[0], SpectralLinear)
    assert model[1][0] is before[3]


def test_a_failure_names_the_layer_and_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model[1].weight[0, 0] = float("inf")
    with pytest.raises(ShapeError, match=r"'1'.*not finite"):
        compress(model, rank=2)
    assert all(type(layer) is nn.Linear for layer in model)
    assert torch.equal(model[0].weight, before["0.weight"])
    for spectrum in ("identity", "normalized"):
        with pytest.raises(SpectrumError, match=r"'0'.*project=True"):
            compress(model, rank=2, spectrum=spectrum)
    assert all(type(layer) is nn.Linear for layer in model)


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({}, ConversionError, "rank=16 or budget=0.05"),
        ({"rank": 3, "budget": 0.1}, ConversionError, "rank=16 or budget=0.05"),
        ({"rank": 3, "method": "cayley"}, ConversionError, "'householder', 'riemannian'"),
        ({"rank": 3, "spectrum": "learned"}, SpectrumError, "identity, free"),
        ({"rank": 3, "kind": "cp"}, ShapeError, "'sttp' or 'svdp'"),
        ({"rank": 3, "kernel": "deep"}, ShapeError, "'flat' or 'factored'"),
        ({"rank": 3, "init": "zeros"}, ShapeError, "'pretrained', 'eye'"),
        ({"rank": 3, "grow": "yes"}, ConversionError, "'skip' or 'allow'"),
        ({"rank": 0}, ShapeError, "rank must be a positive integer"),
        ({"rank": 2.5}, ShapeError, "rank must be a positive integer"),
    ],
)
def test_bad_options(how: dict[str, Any], error: type[Exception], message: str) -> None:
    model = network()
    with pytest.raises(error, match=message):
        compress(model, **how)
    assert not layers(model)


def test_a_warning_points_at_the_line_that_converts() -> None:
    with pytest.warns(SkippedLayerWarning) as caught:
        compress(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2)), 8, method="riemannian")
    assert [warning.filename for warning in caught] == [__file__]
