"""Rows of a spectral tensor train, against rows of its matrix."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import shapes

from sttp_manifold import TTShape
from sttp_manifold.frames import haar_frame
from sttp_manifold.tt.contract import left_matrix
from sttp_manifold.tt.lookup import look_up, lookup_plan, lookup_plans


def cores_of(shape: TTShape) -> list[torch.Tensor]:
    sizes = zip(shape.left_core_shapes, shape.frame_shapes, strict=False)
    return [haar_frame(*frame, dtype=torch.float64).view(core) for core, frame in sizes]


@given(shapes(), st.integers(0, 2**31), st.integers(0, 12), st.booleans())
def test_rows_are_those_of_the_product_however_much_is_formed(
    shape: TTShape, seed: int, count: int, merged: bool
) -> None:
    torch.manual_seed(seed)
    shape = shape.merged if merged else shape
    cores = [core.requires_grad_() for core in cores_of(shape)]
    index = torch.randint(shape.d_out, (count,))
    wanted = left_matrix(cores)[index]
    target = torch.randn_like(wanted)
    gradients = torch.autograd.grad((wanted * target).sum(), cores)
    for formed in range(1, len(cores) + 1):
        rows = look_up(cores, index, formed)
        torch.testing.assert_close(rows, wanted)
        found = torch.autograd.grad((rows * target).sum(), cores)
        for a, b in zip(found, gradients, strict=True):
            torch.testing.assert_close(a, b)


def test_more_is_formed_for_more_rows() -> None:
    shape = TTShape.for_matrix(32_000, 512, rank=64).merged
    plans = [lookup_plan(shape, count) for count in (8, 1024, 8192, 10**6)]
    formed = [plan.formed for plan in plans]
    assert formed == sorted(formed)
    assert [plans[0].name, plans[2].name, plans[3].name] == ["cores", "lowrank", "dense"]
    assert {plan.formed for plan, _ in lookup_plans(shape, 8)} == set(range(1, 6))


@pytest.mark.parametrize("formed", [1, 2, 3])
@pytest.mark.parametrize("place", [-1, 24])
def test_what_is_no_row_is_refused(formed: int, place: int) -> None:
    cores = cores_of(TTShape((3, 4, 2), (30,), rank=4))
    with pytest.raises(IndexError):
        look_up(cores, torch.tensor([0, place]), formed)
