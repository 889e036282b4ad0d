"""Given singular values that stay, in weights, layers, options and states."""

from __future__ import annotations

import copy
import itertools
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from ways_to_hold import METHODS, every_method

from sttp_manifold import SpectralTT, TTShape, tt_svd
from sttp_manifold.errors import ShapeError, SpectrumError
from sttp_manifold.nn import (
    Recipe,
    SpectralLinear,
    SpectralWeight,
    compress,
    decompress,
    make_weight,
    spectral_penalty,
    summary,
    switch,
)
from sttp_manifold.optim import RiemannianAdam
from sttp_manifold.spectrum import SpectrumMap, hold_spectrum

SHAPE = TTShape.for_matrix(12, 10, rank=4)
GIVEN = [4.0, 1.0, 3.0, 0.5]


def singular_values(weight: SpectralWeight) -> Tensor:
    return torch.linalg.svdvals(weight().detach().double())[: weight.shape.rank]


def held(weight: SpectralWeight, values: list[float] | Tensor, atol: float = 1e-5) -> None:
    wanted = torch.as_tensor(values, dtype=torch.float64).sort(descending=True).values
    torch.testing.assert_close(singular_values(weight), wanted, rtol=0, atol=atol)


def value(*s: float) -> SpectralTT:
    tt = tt_svd(torch.randn(12, 10, dtype=torch.float64), SHAPE)
    return SpectralTT(tt.left, torch.tensor(s, dtype=torch.float64), tt.right, SHAPE)


def train(model: nn.Module, steps: int = 5) -> None:
    optimizer = RiemannianAdam(model.parameters(), lr=0.05)
    x = torch.randn(16, 10)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


@every_method
@pytest.mark.parametrize("init", ["eye", "noisy_eye", "random"])
def test_given_values_stay_in_training(method: str, init: str) -> None:
    layer = SpectralLinear(10, 12, 4, method=method, spectrum="fixed", init=init, values=GIVEN)
    held(layer.spectral_weight, GIVEN)
    before = layer.weight.detach()
    train(layer)
    held(layer.spectral_weight, GIVEN)
    assert float((layer.weight - before).detach().norm()) > 0.1


@every_method
def test_pretrained_singular_values_are_kept(method: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 24), nn.Tanh(), nn.Linear(24, 6))
    spectra = [torch.linalg.svdvals(model[i].weight.detach().double())[:4] for i in (0, 2)]
    compress(model, 4, method=method, spectrum="fixed", kind="svdp", grow="allow")
    for other in (method, METHODS[1 - METHODS.index(method)]):
        switch(model, other)
        train(model)
        for i, s in zip((0, 2), spectra, strict=True):
            held(model[i].spectral_weight, s)
    decompress(model)
    torch.testing.assert_close(
        torch.linalg.svdvals(model[0].weight.detach().double())[:4], spectra[0], rtol=0, atol=1e-5
    )


@every_method
def test_values_in_any_order_and_of_any_sign_are_taken_over(method: str) -> None:
    tt = value(-0.5, 4.0, 1.0, -3.0)
    weight = make_weight(method, SHAPE, "fixed", tt)
    torch.testing.assert_close(weight().detach(), tt.to_matrix())
    weight.encode_(value(3.0, -1.0, 0.5, 4.0))
    held(weight, GIVEN, 1e-12)


@every_method
def test_other_singular_values_are_refused_unless_projected(method: str) -> None:
    weight = make_weight(method, SHAPE, "fixed", "random", values=GIVEN, dtype=torch.float64)
    tt = value(9.0, 3.0, 1.0, 0.1)
    before = weight().detach()
    with pytest.raises(SpectrumError, match=r"4, 3, 1, 0\.5 and no others.*project=True"):
        weight.encode_(tt)
    assert torch.equal(weight(), before)
    weight.encode_(tt, project=True)
    held(weight, GIVEN, 1e-12)
    # The nearest: no other pairing of the singular vectors with the values is nearer.
    best = (weight().detach() - tt.to_matrix()).norm()
    for order in itertools.permutations(GIVEN):
        other = SpectralTT(tt.left, torch.tensor(order, dtype=torch.float64), tt.right, SHAPE)
        assert best <= (other.to_matrix() - tt.to_matrix()).norm() + 1e-12


@every_method
def test_a_state_brings_its_values(method: str) -> None:
    first = make_weight(method, SHAPE, "fixed", "random", values=GIVEN)
    second = make_weight(method, SHAPE, "fixed", "random")
    held(second, [1.0, 0.75, 0.5, 0.25])
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(), second())
    second.encode_(first.tt())
    held(second, GIVEN)
    if method == "riemannian":
        torch.testing.assert_close(second.manifold.unpack(second.point).to_matrix(), second())
    state = first.state_dict() | {"values": torch.tensor([1.0, 0.0, 1.0, 1.0])}
    with pytest.raises(RuntimeError, match="values holds a zero"):
        second.load_state_dict(state)
    held(second, GIVEN)


@every_method
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_there_and_back_to_half_precision(method: str, dtype: torch.dtype) -> None:
    weight = make_weight(method, SHAPE, "fixed", "random", values=[3.1, 1.0, 1e-3, 1e-9])
    half = copy.deepcopy(weight).to(dtype)
    assert half.values is not None
    assert half.values.dtype == dtype
    assert bool((half.values != 0).all())
    gap = (half().float() - weight()).detach().norm()
    assert float(gap) < 0.05
    half.encode_(half.tt())
    half.encode_(weight.tt(), project=True)
    assert half.float().tt().orthonormality_error() < 2e-2


@every_method
def test_equal_values_are_the_identity_times_a_number(method: str) -> None:
    weight = make_weight(method, SHAPE, "fixed", "random", values=[2.0] * 4, dtype=torch.float64)
    unit = make_weight(method, SHAPE, "identity", "eye", dtype=torch.float64)
    tt = weight.tt().detach()
    unit.encode_(SpectralTT(tt.left, tt.spectrum / 2, tt.right, SHAPE))
    torch.testing.assert_close(2 * unit(), weight())
    (row,) = summary(weight).rows
    assert row.dimension == SHAPE.dim("identity")
    assert row.parameters == SHAPE.num_parameters("fixed") == SHAPE.dim("free") - 4


@every_method
def test_a_spectrum_without_parameters_has_no_penalty_gradient(method: str) -> None:
    weight = make_weight(method, SHAPE, "fixed", values=GIVEN)
    penalty = spectral_penalty(weight, "d_optimal")
    assert not penalty.requires_grad
    wanted = -torch.log(torch.tensor(GIVEN) / 4).mean()
    torch.testing.assert_close(penalty, wanted)


def test_options_of_layers() -> None:
    recipe = Recipe(rank=3, spectrum="fixed", values=[1, 3, 2])
    assert recipe.values == (3.0, 2.0, 1.0)
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    # A layer of a lower rank takes the largest.
    layer = SpectralLinear(8, 2, 3, spectrum="fixed", values=[1, 3, 2])
    held(layer.spectral_weight, [3.0, 2.0])
    with pytest.raises(SpectrumError, match="rank 4 has 4 singular values, got 3"):
        SpectralLinear(8, 8, 4, spectrum="fixed", values=[1, 3, 2])
    model = nn.Sequential(nn.Linear(10, 12))
    with pytest.raises(SpectrumError, match="project=True"):
        compress(model, 3, spectrum="fixed", values=[3, 2, 1], grow="allow")
    compress(model, 3, spectrum="fixed", values=[3, 2, 1], project=True, grow="allow")
    held(model[0].spectral_weight, [3.0, 2.0, 1.0])


@pytest.mark.parametrize("values", [[], [1.0, 0.0], [1.0, -2.0], [float("nan")], "12", 3.0, ["a"]])
def test_values_that_are_none(values: Any) -> None:
    with pytest.raises(SpectrumError, match=r"values=\[3\.0, 2\.0, 1\.0\]"):
        Recipe(rank=2, spectrum="fixed", values=values)


def test_values_belong_to_the_fixed_spectrum() -> None:
    with pytest.raises(SpectrumError, match="take spectrum='fixed'"):
        make_weight("householder", SHAPE, "free", values=GIVEN)
    with pytest.raises(SpectrumError, match="rank 4 has 4 singular values, got 2"):
        make_weight("riemannian", SHAPE, "fixed", values=[2.0, 1.0])
    with pytest.raises(SpectrumError, match="got 2 for spectrum='fixed'"):
        SHAPE.dim("fixed", [1.0, 2.0])
    with pytest.raises(SpectrumError, match="got 4 for spectrum='free'"):
        SHAPE.gauge_dim("free", GIVEN)
    with pytest.raises(ShapeError, match=r"another plan|tt_svd"):
        make_weight("householder", TTShape.svd(12, 10, 4), "fixed", value(*GIVEN))


def test_a_weight_of_lower_rank_has_no_values_to_keep() -> None:
    with pytest.raises(SpectrumError, match="a lower rank"):
        make_weight("householder", SHAPE, "fixed", value(1.0, 0.5, 0.2, 0.0))


def test_the_centre_is_put_in_descending_order() -> None:
    tt = value(0.5, -4.0, 1.0, 3.0)
    ordered = hold_spectrum(tt, SpectrumMap("fixed", 4, values=(4.0, 3.0, 1.0, 0.5)))
    assert ordered.allclose(tt)
    assert ordered.spectrum.tolist() == [-4.0, 3.0, 1.0, 0.5]


@every_method
def test_memory_that_nothing_has_been_written_to_is_no_spectrum(method: str) -> None:
    weight = make_weight(method, SHAPE, "fixed", "random", values=GIVEN)
    state = copy.deepcopy(weight.state_dict())
    assert weight.values is not None
    for rubbish in (float("nan"), float("inf"), 0.0):
        weight.values.fill_(rubbish)
        weight.to_empty(device="cpu")
        weight.load_state_dict(state)
        held(weight, GIVEN)
