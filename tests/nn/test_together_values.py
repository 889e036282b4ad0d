"""Weights computed together are those computed one by one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks_together import (
    DOUBLE,
    agree,
    alone,
    every_spectrum,
    gradients,
    image,
    made,
    run,
    warm,
)
from strategies import seeds, spectra
from torch import Tensor, nn
from ways_to_hold import METHODS, every_method

from sttp_manifold import TTShape
from sttp_manifold.nn import (
    make_weight,
    together,
)


@every_method
@every_spectrum
def test_outputs_and_gradients_are_those_of_weights_alone(
    method: str, spectrum: str, taken: list[bool]
) -> None:
    model, x = made(method, spectrum), image()
    wanted = run(alone(model), x)
    for _ in range(3):
        agree(run(model, x), wanted)
    assert len(taken) == 3 * 10
    assert all(taken)


@given(seed=seeds, spectrum=spectra, method=st.sampled_from(METHODS), data=st.data())
def test_any_weights_in_any_forms(
    seed: int, spectrum: str, method: str, data: st.DataObject
) -> None:
    """Random plans, each twice, forms mixed, some outputs without a gradient."""
    torch.manual_seed(seed)
    modes = st.lists(st.integers(1, 4), min_size=1, max_size=3)
    shapes = [
        TTShape(data.draw(modes), data.draw(modes), rank=data.draw(st.integers(1, 5)))
        for _ in range(2)
    ]
    forms = ("dense", "factors", "rows", "cores")
    wanted = [(shape, data.draw(st.sampled_from(forms))) for shape in shapes for _ in range(3)]
    weights = [make_weight(method, shape, spectrum, "random", **DOUBLE) for shape, _ in wanted]
    used = [data.draw(st.booleans()) for _ in wanted]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ModuleList(weights)

        def forward(self) -> list[tuple[Tensor, ...]]:
            values = []
            for weight, (_, form) in zip(self.weights, wanted, strict=True):
                if form == "dense":
                    values.append((weight(),))
                elif form == "factors":
                    values.append(weight.factors())
                elif form == "rows":
                    values.append(weight.row_factors())
                else:
                    tt = weight.tt()
                    values.append((*tt.left, tt.spectrum, *tt.right))
            return values

    def step(model: nn.Module) -> tuple[Tensor, list[Tensor | None]]:
        model.zero_grad()
        values = model()
        total = torch.zeros((), **DOUBLE)
        for mine, counts in zip(values, used, strict=True):
            if counts:
                total = total + sum((v * v.detach().sin()).sum() for v in mine)
        if total.requires_grad:
            total.backward()
        flat = torch.cat([v.detach().flatten() for mine in values for v in mine])
        return flat, gradients(model)

    model = together(Model())
    expected = step(alone(model))
    for _ in range(2):
        agree(step(model), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype, taken: list[bool]) -> None:
    """Frames are computed in float32 and rounded once, as for a weight alone."""
    model = made().to(dtype)
    weights = [block.first.spectral_weight for block in model.blocks]

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ModuleList(weights)

        def forward(self) -> Tensor:
            return torch.stack([weight() for weight in self.weights])

    both = together(Sum())
    ours = both()
    assert taken == [True] * 3
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, alone(both)(), rtol=0, atol=torch.finfo(dtype).eps)


def test_second_derivatives(taken: list[bool]) -> None:
    model, x = made(), image()
    warm(model, x, taken)
    other = alone(model)

    def products(m: nn.Module) -> list[Tensor]:
        parameters = list(m.parameters())
        loss = m(x).square().sum()
        first = torch.autograd.grad(loss, parameters, create_graph=True)
        scalar = sum((g * g.detach().cos()).sum() for g in first)
        return list(torch.autograd.grad(scalar, parameters))

    for mine, wanted in zip(products(model), products(other), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-8, atol=1e-9)
    assert all(taken)
