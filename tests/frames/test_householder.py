"""The charts against torch's Householder products, in value and gradient, and their inverses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import batches, normal, seeds

from sttp_manifold.frames import (
    full_frame,
    full_reflectors,
    full_size,
    haar_frame,
    reduced_frame,
    reduced_reflectors,
    reduced_size,
)

sizes = st.integers(1, 9).flatmap(lambda d: st.tuples(st.just(d), st.integers(1, d)))
charts = st.sampled_from(["full", "reduced"])


def frame(chart: str, parameters: torch.Tensor, d: int, r: int) -> torch.Tensor:
    return (full_frame if chart == "full" else reduced_frame)(parameters, d, r)


def size(chart: str, d: int, r: int) -> int:
    return (full_size if chart == "full" else reduced_size)(d, r)


def reflectors(chart: str, parameters: torch.Tensor, d: int, r: int) -> torch.Tensor:
    """``Y`` of the documented layout, built entry by entry."""
    rest = list(parameters.unbind(-1))
    zero, one = (
        torch.zeros_like(parameters[..., :1].sum(-1)),
        torch.ones_like(parameters[..., :1].sum(-1)),
    )
    rows = []
    for i in range(d):
        row = [
            (rest.pop(0) if (i >= r or chart == "full") and j < i else zero) if i != j else one
            for j in range(r)
        ]
        rows.append(torch.stack(row, -1))
    assert not rest
    return torch.stack(rows, -2)


@given(chart=charts, dr=sizes, seed=seeds, batch=batches)
def test_equal_to_torch_in_value_and_gradient(chart, dr, seed, batch) -> None:
    d, r = dr
    p = normal(seed, *batch, size(chart, d, r)).requires_grad_()
    Y = reflectors(chart, p, d, r)
    other = torch.linalg.householder_product(Y, 2 / Y.square().sum(-2))
    ours = frame(chart, p, d, r)
    torch.testing.assert_close(ours, other)
    cotangent = normal(seed + 1, *batch, d, r)
    if p.numel():
        torch.testing.assert_close(
            torch.autograd.grad((ours * cotangent).sum(), p)[0],
            torch.autograd.grad((other * cotangent).sum(), p)[0],
            rtol=1e-9,
            atol=1e-9,
        )


@given(chart=charts, dr=sizes, seed=seeds)
def test_differentiable_twice(chart, dr, seed) -> None:
    d, r = dr
    p = normal(seed, size(chart, d, r)).requires_grad_()
    if p.numel():
        assert torch.autograd.gradgradcheck(lambda q: frame(chart, q, d, r), (p,))


@given(
    chart=charts, dr=sizes, seed=seeds, batch=batches, scale=st.sampled_from([0.0, 1e-4, 1, 1e3])
)
def test_orthonormal_for_any_parameters(chart, dr, seed, batch, scale) -> None:
    d, r = dr
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-3 if scale > 1 else 1e-5)):
        p = (scale * normal(seed, *batch, size(chart, d, r))).to(dtype)
        Q = frame(chart, p, d, r)
        assert Q.dtype == dtype
        assert float((Q.mT @ Q - torch.eye(r, dtype=dtype)).abs().max()) < tolerance


@given(dr=sizes, seed=seeds, batch=batches)
def test_inverse_of_the_full_chart(dr, seed, batch) -> None:
    d, r = dr
    Q = haar_frame(d, r, *batch, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    p, signs = full_reflectors(Q)
    torch.testing.assert_close(full_frame(p, d, r), Q * signs.unsqueeze(-2))
    assert bool((signs.abs() == 1).all())
    norms = reflectors("full", p, d, r).norm(dim=-2) if p.numel() else torch.ones(1)
    assert float(norms.max()) <= 2**0.5 + 1e-12


@given(dr=sizes, seed=seeds, batch=batches)
def test_inverse_of_the_reduced_chart(dr, seed, batch) -> None:
    d, r = dr
    Q = haar_frame(d, r, *batch, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    p, rotation = reduced_reflectors(Q)
    torch.testing.assert_close(reduced_frame(p, d, r), Q @ rotation)
    eye = torch.eye(r, dtype=torch.float64).expand_as(rotation)
    torch.testing.assert_close(rotation.mT @ rotation, eye)
    norms = reflectors("reduced", p, d, r).norm(dim=-2) if p.numel() else torch.ones(1)
    assert float(norms.max()) <= 2**0.5 + 1e-12


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inverses_at_the_worst_points(sign: float, dtype: torch.dtype) -> None:
    """At and next to plus and minus the truncated identity, where a naive inverse breaks."""
    for tilt in (0.0, 1e-9, 1e-5):
        near = sign * torch.eye(6, 3, dtype=dtype) + tilt * torch.randn(6, 3, dtype=dtype)
        Q = torch.linalg.qr(near)[0]
        Q = Q * torch.where((Q * near).sum(0) < 0, -1.0, 1.0).to(dtype)
        p, signs = full_reflectors(Q)
        eps = 20 * torch.finfo(dtype).eps
        assert float((full_frame(p, 6, 3) - Q * signs).abs().max()) < eps
        p, rotation = reduced_reflectors(Q)
        assert float((reduced_frame(p, 6, 3) - Q @ rotation).abs().max()) < eps


@given(dr=sizes, seed=seeds)
def test_decode_encode_is_the_identity_on_the_image(dr, seed) -> None:
    """On encoded points the inverse returns the coordinates, not only the frame."""
    d, r = dr
    Q = haar_frame(d, r, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    p, _ = full_reflectors(Q)
    again, ones = full_reflectors(full_frame(p, d, r))
    torch.testing.assert_close(again, p)
    assert bool((ones == 1).all())
    p, _ = reduced_reflectors(Q)
    again, rotation = reduced_reflectors(reduced_frame(p, d, r))
    torch.testing.assert_close(again, p, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(rotation, torch.eye(r, dtype=torch.float64), rtol=0, atol=1e-9)


def test_constants() -> None:
    """Zero parameters give minus the truncated identity, a square reduced frame is -I."""
    torch.testing.assert_close(full_frame(torch.zeros(7), 5, 2), -torch.eye(5, 2))
    torch.testing.assert_close(reduced_frame(torch.zeros(6), 5, 2), -torch.eye(5, 2))
    torch.testing.assert_close(reduced_frame(torch.zeros(0), 3, 3), -torch.eye(3))
    assert (reduced_size(3, 3), full_size(3, 3), full_size(1, 1)) == (0, 3, 0)


def test_haar_frames_are_uniform() -> None:
    """First and second moments, and no preferred sign of the diagonal (QR alone has one)."""
    Q = haar_frame(3, 2, 40_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert float(Q.mean(0).abs().max()) < 0.02
    torch.testing.assert_close(
        Q.square().mean(0), torch.full((3, 2), 1 / 3).double(), atol=0.01, rtol=0
    )
    assert abs(float((Q[:, 0, 0] > 0).double().mean()) - 0.5) < 0.01


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [(), (2, 3)])
@pytest.mark.parametrize(
    ("frame", "size", "inverse"),
    [(full_frame, full_size, full_reflectors), (reduced_frame, reduced_size, reduced_reflectors)],
)
def test_half_precision_is_computed_in_single(frame, size, inverse, batch, dtype) -> None:
    """With and without a gradient: the frame of the rounded parameters, rounded."""
    eps = torch.finfo(dtype).eps
    parameters = (0.3 * normal(0, *batch, size(6, 3))).to(dtype).requires_grad_()
    wanted = frame(parameters.detach().float(), 6, 3)
    found = frame(parameters, 6, 3)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), wanted, rtol=0, atol=eps)
    (gradient,) = torch.autograd.grad(found.float().square()[..., 0, :].sum(), parameters)
    assert gradient.dtype == dtype
    assert bool(gradient.isfinite().all())
    with torch.no_grad():
        torch.testing.assert_close(frame(parameters, 6, 3).float(), wanted, rtol=0, atol=eps)
    again, turn = inverse(found.detach())
    assert again.dtype == turn.dtype == dtype
    turned = found.float() * turn.float().unsqueeze(-2) if turn.ndim < found.ndim else (
        found.float() @ turn.float()
    )  # fmt: skip
    torch.testing.assert_close(frame(again, 6, 3).float(), turned, rtol=0, atol=8 * eps)
