"""Parameters as matrices, and stacks of spectral weights in their place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sttp_manifold import TTShape, tt_svd
from sttp_manifold.errors import ConversionError, ShapeError, SpectrumError
from sttp_manifold.nn import make_weight
from sttp_manifold.nn.recipe import Recipe
from sttp_manifold.nn.stack import MatrixView, WeightStack, parts_of

DOUBLE: Any = {"dtype": torch.float64}


@given(
    count=st.integers(1, 4),
    inner=st.lists(st.integers(1, 4), min_size=2, max_size=4),
    stacked=st.booleans(),
    data=st.data(),
)
def test_a_parameter_is_its_matrices(
    count: int, inner: list[int], stacked: bool, data: st.DataObject
) -> None:
    order = tuple(data.draw(st.permutations(range(len(inner)))))
    shape = (count, *inner) if stacked else (count * inner[0], *inner[1:])
    view = MatrixView(shape, count, stacked, order)
    parameter = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    matrices = view.split(parameter)
    assert tuple(matrices.shape) == (count, *view.sizes)
    assert torch.equal(view.join(matrices), parameter)
    assert torch.equal(view.join(matrices.flatten(2)), parameter)
    for i, matrix in enumerate(matrices):
        own = parameter[i] if stacked else parameter.chunk(count)[i]
        assert torch.equal(matrix, own.permute(order))


@pytest.mark.parametrize(
    ("shape", "how", "match"),
    [
        ((5, 4), {"count": 2}, "below each other"),
        ((3, 4, 5), {"count": 2, "stacked": True}, "one for each index"),
        ((3, 4), {"count": 3, "stacked": True}, "d_out, d_in"),
        ((4, 3), {"order": (0, 0)}, "in the order"),
        ((4,), {}, "d_out, d_in"),
        ((), {}, "below each other"),
    ],
)
def test_what_is_no_matrix_is_refused(shape: Any, how: Any, match: str) -> None:
    with pytest.raises(ShapeError, match=match):
        MatrixView(shape, **how)


@pytest.mark.parametrize("method", ["householder", "riemannian"])
def test_a_stack_is_its_weights(method: str) -> None:
    view = MatrixView((6, 5, 3), count=2, order=(1, 0, 2))
    parameter = nn.Parameter(torch.randn(6, 5, 3, **DOUBLE), requires_grad=False)
    with torch.no_grad():
        held = Recipe(rank=100, method=method, init="pretrained").make_behind(parameter, view)
    assert isinstance(held, WeightStack)
    assert not held.trainable
    torch.testing.assert_close(view.join(held()), parameter.data, rtol=1e-11, atol=1e-11)
    us, vt = held.factors()
    torch.testing.assert_close(us @ vt, held())
    assert len(set(parts_of(held))) == 2
    assert {w.shape.numel for w in parts_of(held)} == {45}
    values = [tt_svd(m.flatten(1), held.shape) for m in view.split(parameter)]
    for weight, value in zip(held.parts, values, strict=True):
        torch.testing.assert_close(weight.tt().singular_values(), value.singular_values())


def test_stacks_of_unequal_weights_are_refused() -> None:
    plans = [TTShape.for_matrix(6, 4, rank) for rank in (1, 2)]
    with pytest.raises(ShapeError, match="one plan"):
        WeightStack([make_weight("householder", plan) for plan in plans])
    with pytest.raises(ConversionError, match="one method"):
        WeightStack([make_weight(method, plans[0]) for method in ("householder", "riemannian")])
    with pytest.raises(ShapeError, match="make_weight"):
        WeightStack([nn.Linear(2, 2)])  # type: ignore[list-item]


@pytest.mark.parametrize("method", ["householder", "riemannian"])
def test_a_stack_takes_a_batch_of_values_or_none(method: str) -> None:
    plan = TTShape.for_matrix(6, 4, rank=3)
    stack = WeightStack([make_weight(method, plan, "bounded", **DOUBLE) for _ in range(3)])
    torch.manual_seed(0)
    W = torch.nn.functional.normalize(torch.randn(3, 6, 4, **DOUBLE), dim=(1, 2)) / 2
    assert stack.encode_(tt_svd(W, plan)) is stack
    nearest = torch.stack([tt_svd(one, plan).to_matrix() for one in W])
    torch.testing.assert_close(stack(), nearest, rtol=0, atol=1e-12)
    before, twice = stack().detach(), W.clone()
    twice[1] *= 4  # which the spectrum cannot hold, once the first one is taken over
    with pytest.raises(SpectrumError, match="project"):
        stack.encode_(tt_svd(twice, plan))
    assert torch.equal(stack(), before)
    stack.encode_(tt_svd(twice, plan), project=True)
    assert float(torch.linalg.matrix_norm(stack().detach(), 2).max()) <= 1
    for wrong in (tt_svd(W[0], plan), tt_svd(W[:2], plan), W):
        with pytest.raises(ShapeError, match=r"batch of \(3,\).*tt_svd\(W, stack.shape\)"):
            stack.encode_(wrong)


def test_a_weight_that_is_in_a_stack_twice_holds_one_value() -> None:
    plan = TTShape.for_matrix(6, 4, rank=4)
    one = make_weight("householder", plan, **DOUBLE)
    stack, W = WeightStack([one, one]), torch.randn(2, 6, 4, **DOUBLE)
    before = stack().detach()
    with pytest.raises(ConversionError, match="several times"):
        stack.encode_(tt_svd(W, plan))
    assert torch.equal(stack(), before)
    W[1] = W[0]
    stack.encode_(tt_svd(W, plan))
    torch.testing.assert_close(one(), W[0], rtol=0, atol=1e-10)
