"""`compress`: what is meant by names, wildcards, classes, predicates; ranks, budgets, the rest."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sttp_manifold.errors import ConversionError, ShapeError
from sttp_manifold.nn import (
    SkippedLayerWarning,
    SpectralConv2d,
    SpectralLayer,
    SpectralLinear,
    compress,
    decompress,
    summary,
)
from sttp_manifold.nn.allocate import ALLOCATIONS


class Block(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.up = nn.Linear(size, 2 * size)
        self.down = nn.Linear(2 * size, size)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), Block(12), Block(12), nn.Linear(12, 5))


def ranks(model: nn.Module) -> dict[str, int]:
    return {
        name: layer.spectral_weight.shape.rank
        for name, layer in model.named_modules()
        if isinstance(layer, SpectralLayer)
    }


CHOICES: dict[str, tuple[Any, list[str]]] = {
    "a name": ("0", ["0"]),
    "a module around": (["1"], ["1.up", "1.down"]),
    "a wildcard": ("*.up", ["1.up", "2.up"]),
    "a wildcard of modules": (["[12]"], ["1.up", "1.down", "2.up", "2.down"]),
    "a class": (Block, ["1.up", "1.down", "2.up", "2.down"]),
    "a predicate": (lambda name, m: getattr(m, "out_features", 0) == 5, ["3"]),
    "several": (["0", nn.Identity, lambda name, m: name == "3"], ["0", "3"]),
}


@pytest.mark.parametrize(("choice", "wanted"), CHOICES.values(), ids=CHOICES)
def test_only_and_skip_are_each_others_rest(choice: Any, wanted: list[str]) -> None:
    everything = list(ranks(compress(network(), 2)))
    assert list(ranks(compress(network(), 2, only=choice))) == wanted
    rest = [name for name in everything if name not in wanted]
    assert list(ranks(compress(network(), 2, skip=choice))) == rest


def test_skip_takes_from_only() -> None:
    assert list(ranks(compress(network(), 2, only=Block, skip="2"))) == ["1.up", "1.down"]


@pytest.mark.parametrize("argument", ["skip", "only"])
def test_choices_that_mean_nothing_are_refused(argument: str) -> None:
    with pytest.raises(ConversionError, match=rf"{argument} names 'head\.\*'.*'1\.up'"):
        compress(network(), 2, **{argument: ["head.*"]})
    with pytest.raises(ConversionError, match=rf"{argument} takes names, wildcards, classes"):
        compress(network(), 2, **{argument: [3]})


def test_ranks_by_pattern_and_function() -> None:
    model = compress(network(), {"2": 1, "*.up": 3, "0": 2})
    assert ranks(model) == {"0": 2, "1.up": 3, "2.up": 1, "2.down": 1}
    model = compress(network(), lambda name, layer: 3 if layer.in_features == 12 else None)
    assert ranks(model) == {"1.up": 3, "2.up": 3, "3": 3}
    with pytest.raises(ConversionError, match=r"rank names 'x\*'"):
        compress(network(), {"x*": 1})
    with pytest.raises(ShapeError, match=r"the rank of '0' must be a positive integer"):
        compress(network(), {"0": 0})
    with pytest.raises(ShapeError, match="positive integer"):
        compress(network(), lambda name, layer: 2.5)


def test_layers_of_one_weight_have_one_rank() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    with pytest.raises(ConversionError, match=r"one rank, got '0': 2, '1': 3"):
        compress(model, {"0": 2, "1": 3})


# -- budgets -----------------------------------------------------------------------------------


@pytest.mark.parametrize("allocate", ALLOCATIONS)
@pytest.mark.parametrize("kind", ["sttp", "svdp"])
@pytest.mark.parametrize("of", ["treated", "model"])
def test_budgets_are_kept_and_nearly_spent(allocate: str, kind: str, of: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 96), nn.Linear(96, 64), nn.Embedding(5, 8))
    before = summary(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SkippedLayerWarning)
        compress(model, budget=0.4, of=of, allocate=allocate, kind=kind)
    after = summary(model)
    rows = [row for row in after.rows if row.kind != "dense"]
    kept = sum(r.parameters for r in rows) if of == "treated" else after.total.parameters
    dense = sum(r.dense for r in rows) if of == "treated" else before.total.dense
    assert 0.36 * dense <= kept <= 0.4 * dense


def test_allocations_follow_the_spectra() -> None:
    """A weight of low rank needs little, and gets it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(64, 4) @ torch.randn(4, 64))
    found = {}
    for how in ALLOCATIONS:
        made = compress(nn.Sequential(*map(_copy, model)), budget=0.4, allocate=how, kind="svdp")
        found[how] = ranks(made)
    assert found["uniform"]["0"] == found["uniform"]["1"]
    assert found["energy"]["0"] == 4
    assert found["energy"]["0"] < found["balanced"]["0"] < found["uniform"]["0"]
    assert found["energy"]["1"] > found["balanced"]["1"] > found["uniform"]["1"]


def _copy(layer: nn.Linear) -> nn.Linear:
    other = nn.Linear(layer.in_features, layer.out_features)
    other.load_state_dict(layer.state_dict())
    return other


def test_a_budget_out_of_reach_names_the_largest() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(999))
    with pytest.raises(
        ConversionError, match=r"the largest in its way are '1' \(LayerNorm\): 1,998"
    ):
        compress(model, budget=0.3, of="model")
    with pytest.raises(ConversionError, match=r"the smallest reachable budget is 0\.12"):
        compress(model, budget=0.1, kind="svdp")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"budget": 0.3, "of": "all"}, "'treated' or 'model'"),
        ({"budget": 0.3, "allocate": "greedy"}, "'uniform', 'energy', 'balanced'"),
        ({"rank": 3, "allocate": "energy"}, "say how to spend a budget"),
        ({"rank": 3, "data": [torch.ones(1, 8)], "init": "eye"}, "start anew"),
        ({"rank": 3, "data": []}, "no batches"),
        ({"rank": 3, "data": 4}, "list or a loader"),
        ({"rank": 3, "data": ["text"]}, "a batch of data is"),
    ],
)
def test_what_contradicts_is_refused(how: dict[str, Any], message: str) -> None:
    model = network()
    with pytest.raises(ConversionError, match=message):
        compress(model, **how)
    assert not ranks(model)


# -- what is compressed already ----------------------------------------------------------------


@pytest.mark.parametrize("method", ["householder", "riemannian"])
def test_again_lowers_ranks(method: str) -> None:
    model = compress(network(), 6, method=method, kind="svdp", grow="allow")
    dense = model[3].weight.detach().clone()
    layer, bias = model[3], model[3].bias
    compress(model, {"3": 2, "*": 4})
    assert ranks(model) == {"0": 4, "1.up": 4, "1.down": 4, "2.up": 4, "2.down": 4, "3": 2}
    assert model[3] is layer
    assert layer.bias is bias
    assert layer.spectral_weight.method == method
    u, s, vt = torch.linalg.svd(dense)
    torch.testing.assert_close(layer.weight, (u[:, :2] * s[:2]) @ vt[:2], rtol=0, atol=1e-5)
    compress(model, budget=0.25)
    assert sum(r.parameters for r in summary(model).rows) <= 0.25 * sum(
        r.dense for r in summary(model).rows
    )


def test_again_says_what_it_would_not_do() -> None:
    model = compress(network(), 3)
    with pytest.raises(ConversionError, match=r"nothing to compress.*of no higher rank"):
        compress(model, 3)
    with pytest.raises(ConversionError, match=r"method='householder'.*decompress\(model\) first"):
        compress(model, 2, method="riemannian")
    with pytest.raises(ConversionError, match="in spectral form already"):
        compress(model, 2, data=[torch.ones(2, 8)])
    assert set(ranks(model).values()) == {3}


def test_stock_layers_that_are_new_are_converted_and_others_lowered() -> None:
    model = compress(network(), 4, skip="3")
    compress(model, 3)
    assert set(ranks(model).values()) == {3}
    assert isinstance(model[3], SpectralLinear)
    assert isinstance(decompress(model)[0], nn.Linear)


# -- what stays dense --------------------------------------------------------------------------


def test_what_stays_dense_is_said_once_with_its_share() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.zeros(1, 20, 30))
            self.token = nn.Parameter(torch.zeros(1, 1, 30))

    model = nn.Sequential(nn.Linear(20, 20, bias=False), Own(), nn.LayerNorm(7))
    with pytest.warns(SkippedLayerWarning, match=r"1 Own, dense \(57\.5 % of the p") as seen:
        compress(model, 2)
    assert len(seen) == 1
    assert "LayerNorm" not in str(seen[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compress(nn.Sequential(nn.Linear(8, 8), Own()), 2, skip=Own)


def test_convolutions_and_linears_are_told_apart() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(72, 8))
    assert isinstance(compress(model, 3, only=nn.Conv2d)[0], SpectralConv2d)
    assert type(model[2]) is nn.Linear
