"""`Recipe`: the options of a weight, in one place."""

from __future__ import annotations

import inspect
import json
from typing import Any

import pytest
import torch
from torch import nn

from sttp_manifold import HouseholderChart, SpectralTTManifold, TTShape, tt_svd
from sttp_manifold.errors import ConversionError, ShapeError, SpectrumError
from sttp_manifold.nn import (
    HouseholderWeight,
    Recipe,
    RiemannianWeight,
    SpectralConv2d,
    SpectralLinear,
    compress,
    make_weight,
)
from sttp_manifold.spectrum import SpectrumMap
from sttp_manifold.tt import SPECTRA

OPTIONS: dict[str, Any] = {
    "rank": 3,
    "kind": "svdp",
    "kernel": "factored",
    "method": "riemannian",
    "spectrum": "bounded",
    "init": "random",
    "bound": 0.5,
    "init_std": 0.1,
    "project": True,
    "values": None,
}


def test_a_recipe_is_a_plain_dict_and_back() -> None:
    recipe = Recipe(**OPTIONS)
    assert recipe.to_dict() == OPTIONS
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert Recipe.from_dict({}) == Recipe()
    fixed = Recipe(rank=2, spectrum="fixed", values=(3.0, 2.0))
    assert Recipe.from_dict(json.loads(json.dumps(fixed.to_dict()))) == fixed
    assert recipe.at(7) == Recipe(**{**OPTIONS, "rank": 7})
    with pytest.raises(ConversionError, match="'colour'; there are rank"):
        Recipe.from_dict({"colour": 3})
    value = tt_svd(torch.eye(4), TTShape.svd(4, 4, 2))
    with pytest.raises(ConversionError, match="state_dict"):
        Recipe(init=value).to_dict()


def test_a_recipe_makes_what_it_says() -> None:
    weight = Recipe(**OPTIONS).make_for(torch.zeros(8, 4, 3, 3, dtype=torch.float64))
    assert weight.shape == TTShape.svd(8, 36, 3)
    assert (weight.method, weight.spectrum, weight.bound) == ("riemannian", "bounded", 0.5)
    assert weight.dtype == torch.float64
    assert not weight.trainable
    flat, factored = (Recipe(rank=2, kernel=k).plan((8, 4, 2, 3)) for k in ("flat", "factored"))
    assert flat == TTShape.for_conv((8, 4, 2, 3), 2)
    assert factored == TTShape.for_conv((8, 4, 2, 3), 2, "factored")


@pytest.mark.parametrize(
    ("option", "value", "error"),
    [
        ("kind", "svd", ShapeError),
        ("kind", None, ShapeError),
        ("kernel", "deep", ShapeError),
        ("method", "cayley", ConversionError),
        ("spectrum", "learned", SpectrumError),
        ("init", "zeros", ShapeError),
        ("init", None, ShapeError),
        ("bound", 0.0, SpectrumError),
        ("bound", float("nan"), SpectrumError),
        ("init_std", -1.0, ConversionError),
        ("init_std", float("nan"), ConversionError),
        ("project", "no", ConversionError),
    ],
)
def test_every_option_is_checked_wherever_it_comes_in(
    option: str, value: Any, error: type[Exception]
) -> None:
    how: Any = {option: value}
    with pytest.raises(error):
        Recipe(**how)
    with pytest.raises(error):
        SpectralConv2d(4, 4, 3, 2, **how)
    with pytest.raises(error):
        SpectralConv2d.from_layer(nn.Conv2d(4, 4, 3), 2, **how)
    with pytest.raises(error):
        compress(nn.Sequential(nn.Linear(4, 4)), rank=2, **how)


def test_what_is_no_option_is_a_type_error_that_lists_them() -> None:
    how: Any = {"colour": "red"}
    for call in (
        lambda: SpectralLinear(4, 4, 2, **how),
        lambda: SpectralLinear.from_layer(nn.Linear(4, 4), 2, **how),
        lambda: compress(nn.Linear(4, 4), 2, **how),
    ):
        with pytest.raises(TypeError, match=r"'colour'; the options of its weight are kind"):
            call()
    how = {"kernel": "factored"}
    with pytest.raises(TypeError, match=r"SpectralLinear\(\) got an unexpected .*'kernel'"):
        SpectralLinear(4, 4, 2, **how)


def test_a_given_weight_takes_no_options() -> None:
    weight = SpectralLinear(6, 5, 2).spectral_weight
    assert SpectralLinear(6, 5, 2, weight=weight).spectral_weight is weight
    with pytest.raises(ConversionError, match="also spectrum"):
        SpectralLinear(6, 5, weight=weight, spectrum="identity")
    with pytest.raises(ConversionError, match="also init"):
        SpectralLinear.from_layer(nn.Linear(6, 5), weight=weight, init="eye")
    with pytest.raises(ShapeError, match="rank=3 and a weight"):
        SpectralLinear(6, 5, 3, weight=weight)
    with pytest.raises(ShapeError, match="SpectralWeight"):
        SpectralLinear(6, 5, weight=torch.zeros(5, 6))  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="rank=16"):
        SpectralLinear.from_layer(nn.Linear(6, 5))


@pytest.mark.parametrize("function", [SpectralLinear, SpectralConv2d, compress])
def test_signatures_show_the_options_one_by_one(function: Any) -> None:
    shown = inspect.signature(function).parameters
    for name in ("kind", "method", "spectrum", "init", "bound", "init_std", "project"):
        default = getattr(Recipe(), name)
        wanted = "pretrained" if (function, name) == (compress, "init") else default
        assert shown[name].default == wanted
    assert not any(p.kind is p.VAR_KEYWORD for p in shown.values())


@pytest.mark.parametrize("spectrum", [s for s in SPECTRA if s != "bounded"])
def test_a_bound_is_of_the_bounded_spectrum(spectrum: str) -> None:
    shape = TTShape.svd(6, 5, 2)
    for call in (
        lambda: Recipe(spectrum=spectrum, bound=2.0),
        lambda: SpectrumMap(spectrum, 2, bound=2.0),
        lambda: HouseholderChart(shape, spectrum, bound=2.0),
        lambda: SpectralTTManifold(shape, spectrum, bound=2.0),
        lambda: HouseholderWeight(shape, spectrum, bound=2.0),
        lambda: RiemannianWeight(shape, spectrum, bound=2.0),
        lambda: make_weight("householder", shape, spectrum, bound=2.0),
        lambda: SpectralLinear(5, 6, 2, spectrum=spectrum, bound=2.0),
        lambda: compress(nn.Linear(5, 6), 2, spectrum=spectrum, bound=2.0),
    ):
        with pytest.raises(SpectrumError, match="spectrum='bounded', or no bound"):
            call()
