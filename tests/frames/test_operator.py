"""All frames of a vector by one operator: the same frames, and what torch asks of an operator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sttp_manifold.errors import FrameOverflowError
from sttp_manifold.frames import full_frame, reduced_frame
from sttp_manifold.frames.operator import all_frames

DOUBLE: Any = {"dtype": torch.float64}
Sizes = list[tuple[int, int, bool]]


def length(d: int, r: int, full: bool) -> int:
    return d * r - r * (r + 1) // 2 if full else r * (d - r)


def vector_of(sizes: Sizes, seed: int = 0) -> Tensor:
    count = sum(length(*size) for size in sizes)
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), **DOUBLE)


def one_by_one(vector: Tensor, sizes: Sizes) -> list[Tensor]:
    parts = vector.split([length(*size) for size in sizes])
    return [
        (full_frame if full else reduced_frame)(part, d, r)
        for part, (d, r, full) in zip(parts, sizes, strict=True)
    ]


def at_once(vector: Tensor, sizes: Sizes) -> list[Tensor]:
    return all_frames(vector, [(d, r) for d, r, _ in sizes], [full for _, _, full in sizes])


frame_sizes = st.tuples(st.integers(1, 20), st.integers(0, 12), st.booleans()).map(
    lambda t: (t[0] + t[1], t[0], t[2])
)


@given(st.lists(frame_sizes, min_size=1, max_size=5), st.integers(0, 1000))
def test_frames_and_gradients_are_those_of_the_charts(sizes: Sizes, seed: int) -> None:
    vector = vector_of(sizes, seed).requires_grad_()
    found, wanted = at_once(vector, sizes), one_by_one(vector, sizes)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(a.mT @ a, torch.eye(a.shape[1], **DOUBLE), rtol=0, atol=1e-11)
    if vector.numel():
        slopes = [torch.linspace(-1, 1, a.numel(), **DOUBLE).view_as(a) for a in wanted]
        mine, right = (
            torch.autograd.grad(
                sum((a.sin() * g).sum() for a, g in zip(frames, slopes, strict=True)), vector
            )
            for frames in (found, wanted)
        )
        torch.testing.assert_close(mine, right, rtol=1e-9, atol=1e-9)


MIXED: Sizes = [(7, 3, True), (5, 2, False), (4, 4, False), (4, 4, True), (30, 20, True)]


def arguments(vector: Tensor, sizes: Sizes) -> tuple[Any, ...]:
    held = [size for size in sizes if length(*size)]
    return (vector, *([size[k] for size in held] for k in range(3)))


@pytest.mark.parametrize("sizes", [MIXED, MIXED[:2], [(30, 20, False)]])
def test_torch_accepts_the_operator(sizes: Sizes) -> None:
    args = arguments(vector_of(sizes).requires_grad_(), sizes)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.sttp_manifold.frames, args, test_utils=checks)
    _, saved = torch.ops.sttp_manifold.frames(*args)
    frames = sum(d * r for d, r, full in sizes if length(d, r, full))
    back = (torch.randn(frames, **DOUBLE), args[0].detach(), saved.detach(), *args[1:])
    torch.library.opcheck(torch.ops.sttp_manifold.frames_pulled_back, back, test_utils=checks)


def test_a_reflector_that_overflows_is_refused() -> None:
    with pytest.raises(FrameOverflowError, match="lower lr"):
        at_once(torch.full((12,), 1e19), [(7, 2, True), (2, 1, False)])
