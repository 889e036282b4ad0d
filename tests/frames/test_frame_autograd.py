"""The written-out backward of the charts, and every way past it: the same numbers each time."""

from __future__ import annotations

import copy
import inspect
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import batches, normal, seeds

from sttp_manifold.errors import FrameOverflowError, ShapeError
from sttp_manifold.frames import (
    _householder_autograd,
    _wy_form,
    full_frame,
    full_size,
    reduced_frame,
    reduced_size,
)

CHARTS = {"full": (full_frame, full_size), "reduced": (reduced_frame, reduced_size)}
sizes = st.integers(1, 9).flatmap(lambda d: st.tuples(st.just(d), st.integers(1, d)))
charts = st.sampled_from(list(CHARTS))
parametrized = pytest.mark.parametrize("chart", list(CHARTS))


def plain(chart, parameters, d, r, transposed=False):
    """The frame by operations that torch differentiates by itself."""
    kind = getattr(_wy_form, f"{chart.capitalize()}Chart")
    flat = parameters.reshape(math.prod(parameters.shape[:-1]), parameters.shape[-1])
    Q = _householder_autograd._composite(kind, flat, d, r, transposed)
    return Q.reshape(*parameters.shape[:-1], *Q.shape[-2:])


# --- First derivatives. ---


@given(chart=charts, dr=sizes, seed=seeds, batch=batches, transposed=st.booleans())
def test_value_and_gradient_are_those_of_plain_operations(chart, dr, seed, batch, transposed):
    (d, r), (frame, size) = dr, CHARTS[chart]
    p = normal(seed, *batch, size(d, r)).requires_grad_()
    ours, theirs = frame(p, d, r, transposed=transposed), plain(chart, p, d, r, transposed)
    assert ours.shape == (*batch, *((r, d) if transposed else (d, r)))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    G = normal(seed + 1, *ours.shape)
    torch.testing.assert_close(
        torch.autograd.grad(ours, p, G)[0],
        torch.autograd.grad(theirs, p, G)[0],
        rtol=1e-9,
        atol=1e-11,
    )


@given(chart=charts, dr=sizes, seed=seeds, transposed=st.booleans())
def test_gradcheck_with_any_cotangent(chart, dr, seed, transposed):
    """Cotangents that are expanded or permuted in memory, too."""
    (d, r), (frame, size) = dr, CHARTS[chart]
    p = normal(seed, 2, size(d, r)).requires_grad_()
    if not p.numel():
        return
    assert torch.autograd.gradcheck(lambda q: frame(q, d, r, transposed=transposed), (p,))
    Q = frame(p, d, r, transposed=transposed)
    (expanded,) = torch.autograd.grad(Q.sum(), p, retain_graph=True)
    (whole,) = torch.autograd.grad(Q, p, torch.ones_like(Q), retain_graph=True)
    torch.testing.assert_close(expanded, whole)
    G = normal(seed, *Q.mT.shape).mT
    (strided,) = torch.autograd.grad(Q, p, G, retain_graph=True)
    (whole,) = torch.autograd.grad(Q, p, G.contiguous())
    torch.testing.assert_close(strided, whole)


@given(chart=charts, dr=sizes, seed=seeds, batch=batches)
def test_transposed_is_the_transpose(chart, dr, seed, batch):
    (d, r), (frame, size) = dr, CHARTS[chart]
    p = normal(seed, *batch, size(d, r))
    for q in (p, p.clone().requires_grad_()):
        torch.testing.assert_close(frame(q, d, r, transposed=True), frame(q, d, r).mT)


@parametrized
def test_strided_parameters(chart):
    frame, size = CHARTS[chart]
    p = normal(0, size(7, 3), 5).mT.requires_grad_()
    torch.testing.assert_close(frame(p, 7, 3), plain(chart, p.detach().contiguous(), 7, 3))


@parametrized
def test_empty_batches(chart):
    frame, size = CHARTS[chart]
    for batch in ((0,), (2, 0)):
        p = torch.zeros(*batch, size(6, 3), requires_grad=True)
        Q = frame(p, 6, 3)
        assert Q.shape == (*batch, 6, 3)
        assert torch.autograd.grad(Q.sum(), p)[0].shape == p.shape
        assert frame(p.detach(), 6, 3, transposed=True).shape == (*batch, 3, 6)


# --- Second derivatives, and other modes of differentiation. ---


@given(chart=charts, dr=sizes, seed=seeds, transposed=st.booleans())
def test_gradgradcheck(chart, dr, seed, transposed):
    (d, r), (frame, size) = dr, CHARTS[chart]
    p = normal(seed, 2, size(d, r)).requires_grad_()
    if p.numel():
        assert torch.autograd.gradgradcheck(lambda q: frame(q, d, r, transposed=transposed), (p,))


@parametrized
def test_third_derivatives(chart):
    frame, size = CHARTS[chart]
    p = normal(0, size(5, 2)).requires_grad_()

    def second(q):
        (g,) = torch.autograd.grad(frame(q, 5, 2).pow(3).sum(), q, create_graph=True)
        return g.pow(2).sum()

    assert torch.autograd.gradgradcheck(second, (p,))


# torch's own forward mode loads decompositions by a deprecated function.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
@parametrized
def test_every_jacobian_and_hessian_product_agrees(chart):
    frame, size = CHARTS[chart]
    p, v = normal(0, 2, size(6, 3)), normal(1, 2, size(6, 3))
    ours, theirs = (lambda q: frame(q, 6, 3)), (lambda q: plain(chart, q, 6, 3))
    expected = torch.autograd.functional.jvp(theirs, p, v)[1]
    torch.testing.assert_close(torch.autograd.functional.jvp(ours, p, v)[1], expected)
    torch.testing.assert_close(torch.func.jvp(ours, (p,), (v,))[1], expected)
    with torch.autograd.forward_ad.dual_level():
        for q in (p, p.clone().requires_grad_()):
            dual = torch.autograd.forward_ad.make_dual(q, v)
            tangent = torch.autograd.forward_ad.unpack_dual(ours(dual)).tangent
            torch.testing.assert_close(tangent, expected)

    def cost(q, of):
        return (of(q) * torch.arange(36.0, dtype=q.dtype).view(2, 6, 3)).sin().sum()

    expected = torch.autograd.functional.hvp(lambda q: cost(q, theirs), p, v)[1]
    gradient = torch.func.grad(lambda q: cost(q, ours))
    torch.testing.assert_close(torch.func.jvp(gradient, (p,), (v,))[1], expected)
    torch.testing.assert_close(torch.func.vjp(gradient, p)[1](v)[0], expected)
    H = torch.func.hessian(lambda q: cost(q, ours))(p)
    torch.testing.assert_close((H * v).sum((-2, -1)), expected)
    # Forward over reverse without torch.func.
    q = p.clone().requires_grad_()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, v)
        (g,) = torch.autograd.grad(cost(dual, ours), dual, create_graph=True)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(g).tangent, expected)


@parametrized
def test_vmap_is_the_batch(chart):
    frame, size = CHARTS[chart]
    p = normal(0, 4, 3, size(6, 2)).requires_grad_()
    expected = frame(p, 6, 2)
    torch.testing.assert_close(torch.vmap(lambda q: frame(q, 6, 2))(p), expected)
    torch.testing.assert_close(
        torch.vmap(lambda q: frame(q, 6, 2), in_dims=1, out_dims=1)(p), expected
    )
    per_sample = torch.vmap(torch.func.grad(lambda q: frame(q, 6, 2).pow(3).sum()))(p.detach())
    torch.testing.assert_close(per_sample, torch.autograd.grad(expected.pow(3).sum(), p)[0])


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@parametrized
@pytest.mark.parametrize("create_graph", [False, True])
def test_many_cotangents_at_once(chart, create_graph):
    frame, size = CHARTS[chart]
    p = normal(0, 3, size(6, 2)).requires_grad_()
    Q, G = frame(p, 6, 2), normal(1, 5, 3, 6, 2)
    (batched,) = torch.autograd.grad(
        Q, p, G, is_grads_batched=True, create_graph=create_graph, retain_graph=True
    )
    each = [torch.autograd.grad(Q, p, g, retain_graph=True)[0] for g in G]
    torch.testing.assert_close(batched, torch.stack(each))
    vectorized = torch.autograd.functional.jacobian(lambda q: frame(q, 6, 2), p, vectorize=True)
    torch.testing.assert_close((vectorized * G[0, ..., None, None]).sum((0, 1, 2)), each[0])


@parametrized
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(chart, backend):
    torch._dynamo.reset()
    # Without the checks of shapes that stand around it under test, which Dynamo cannot trace.
    frame, size = inspect.unwrap(CHARTS[chart][0]), CHARTS[chart][1]
    p = normal(0, 3, size(6, 3)).requires_grad_()
    compiled = torch.compile(
        lambda q: frame(q, 6, 3, transposed=True).pow(3), backend=backend, fullgraph=True
    )
    expected = frame(p, 6, 3, transposed=True).pow(3)
    torch.testing.assert_close(compiled(p), expected)
    torch.testing.assert_close(
        torch.autograd.grad(compiled(p).sum(), p)[0], torch.autograd.grad(expected.sum(), p)[0]
    )
    with torch.no_grad():
        torch.testing.assert_close(compiled(p), expected)


@parametrized
def test_checkpointed_and_retained(chart):
    frame, size = CHARTS[chart]
    p = normal(0, 3, size(6, 3)).requires_grad_()
    Q = frame(p, 6, 3)
    (expected,) = torch.autograd.grad(Q.pow(3).sum(), p, retain_graph=True)
    (again,) = torch.autograd.grad(Q.pow(3).sum(), p)
    assert torch.equal(expected, again)
    Q = torch.utils.checkpoint.checkpoint(lambda q: frame(q, 6, 3), p, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(Q.pow(3).sum(), p)[0], expected)


@parametrized
def test_parameters_changed_after_the_forward_are_noticed(chart):
    frame, size = CHARTS[chart]
    p = normal(0, 3, size(6, 3)).requires_grad_()
    Q = frame(p, 6, 3)
    with torch.no_grad():
        p.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        Q.sum().backward()


@parametrized
def test_inference_mode_leaves_nothing_behind(chart):
    """Constants that are kept from a call in inference mode must serve for gradients later."""
    frame, size = CHARTS[chart]
    _wy_form._KEPT.clear()
    with torch.inference_mode():
        frame(normal(0, 3, size(7, 4)), 7, 4)
    p = normal(0, 3, size(7, 4)).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda q: frame(q, 7, 4), (p,))


@parametrized
@pytest.mark.parametrize("transposed", [False, True])
def test_a_device_without_values_or_autocast(chart, transposed):
    frame, size = CHARTS[chart]
    p = torch.zeros(2, size(5, 3), device="meta", requires_grad=True)
    Q = frame(p, 5, 3, transposed=transposed)
    assert Q.shape == ((2, 3, 5) if transposed else (2, 5, 3))
    (gradient,) = torch.autograd.grad(Q.sum(), p)
    assert gradient.shape == p.shape
    with torch.no_grad():
        assert frame(p, 5, 3).device.type == "meta"


@parametrized
def test_autocast_does_not_round(chart):
    frame, size = CHARTS[chart]
    p = normal(0, 3, size(8, 4)).float().requires_grad_()
    (expected,) = torch.autograd.grad(frame(p, 8, 4).pow(3).sum(), p)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        Q = frame(p, 8, 4)
        assert Q.dtype == torch.float32
        assert torch.equal(frame(p.detach(), 8, 4), frame(copy.copy(p.detach()), 8, 4))
        (gradient,) = torch.autograd.grad(Q.pow(3).sum(), p)
    assert torch.equal(gradient, expected)


# --- Without gradient. ---


@parametrized
@pytest.mark.parametrize("lapack", [True, False])
@pytest.mark.parametrize("shape", [(1, 64, 16), (300, 16, 4), (5, 9, 9), (2, 1, 1)])
def test_both_ways_without_gradient_agree(chart, lapack, shape, monkeypatch):
    calls = []
    original = torch.linalg.householder_product
    monkeypatch.setattr(
        torch.linalg, "householder_product", lambda *a: calls.append(1) or original(*a)
    )
    monkeypatch.setattr(_householder_autograd, "_lapack_is_faster", lambda *_: lapack)
    (batch, d, r), (frame, size) = shape, CHARTS[chart]
    p = normal(0, batch, size(d, r))
    for transposed in (False, True):
        torch.testing.assert_close(
            frame(p, d, r, transposed=transposed), plain(chart, p, d, r, transposed)
        )
    assert len(calls) == 2 * lapack


@parametrized
def test_lapack_is_called_for_few_and_for_double_frames_and_for_wide_full_ones(chart, monkeypatch):
    def choice(b, d, r, dtype=torch.float32):
        x = torch.empty(b, CHARTS[chart][1](d, r), dtype=dtype)
        kind = getattr(_wy_form, f"{chart.capitalize()}Chart")
        return _householder_autograd._lapack_is_faster(kind, x, d, r)

    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert choice(1, 64, 8)
    assert choice(16, 512, 64, torch.float64)
    assert choice(64, 128, 64) == (chart == "full")
    assert not choice(16, 512, 64)
    assert not choice(256, 32, 16)
    assert not choice(256, 32, 32)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert choice(1, 64, 8)
    assert not choice(64, 128, 64)


# --- Accuracy in float32. ---


def reflectors(kind, b, d, r, seed):
    """Hard stacks of reflectors, in float32."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(b, d, r, generator=generator)
    one = torch.randn(b, d, 1, generator=generator)
    scales = 10 ** torch.empty(b, 1, r).uniform_(-4, 4, generator=generator)
    rows = 10 ** torch.empty(b, d, 1).uniform_(-4, 4, generator=generator)
    return {
        "ordinary": normal / d**0.5,
        "short": 1e-4 * normal,
        "long": 1e4 * normal,
        "columns of all lengths": scales * normal / d**0.5,
        "rows of all lengths": rows * normal / d**0.5,
        "parallel to 1e-3": one + 1e-3 * normal,
        "parallel to 1e-6, of unit length": one * (1 + 1e-6 * normal) / d**0.5,
    }[kind]


@pytest.mark.parametrize("shape", [(1, 64, 16), (16, 128, 32), (8, 128, 64), (2, 2048, 64)])
@pytest.mark.parametrize(
    ("kind", "bound"),
    [
        ("ordinary", 2e-6),
        ("short", 2e-6),
        ("long", 1e-5),
        ("columns of all lengths", 1e-5),
        ("rows of all lengths", 1e-5),
        ("parallel to 1e-3", 1e-5),
        ("parallel to 1e-6, of unit length", 1e-5),
    ],
)
@parametrized
@pytest.mark.parametrize("seed", [0, 1])
def test_orthonormal_in_float32(chart, kind, bound, shape, seed):
    (b, d, r), (frame, size) = shape, CHARTS[chart]
    Y = reflectors(kind, b, d, r, seed)
    rows, columns = torch.tril_indices(r, r, -1)
    p = Y[:, r:].flatten(1)
    if chart == "full":
        p = torch.cat((Y[:, :r][:, rows, columns], p), -1)
    assert p.shape[-1] == size(d, r)
    for q in (p, p.clone().requires_grad_()):
        Q = frame(q, d, r).detach().double()
        assert float((Q.mT @ Q - torch.eye(r, dtype=Q.dtype)).abs().max()) <= bound
        exact = frame(p.double(), d, r)
        assert float((Q - exact).abs().max()) <= bound


# --- Overflow. ---


@parametrized
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("shape", [(3, 6, 2), (3, 512, 32)])
def test_overflow_is_an_error(chart, grad, shape):
    (b, d, r), (frame, size) = shape, CHARTS[chart]
    p = torch.randn(b, size(d, r))
    p[1, -1] = 1e20
    match = rf"1 of 3 frames of shape \({d}, {r}\).*squared norm overflows torch.float32.*double"
    with pytest.raises(FrameOverflowError, match=match):
        frame(p.requires_grad_(grad), d, r)
    Q = frame(p.double(), d, r)
    torch.testing.assert_close(Q.mT @ Q, torch.eye(r, dtype=Q.dtype).expand(b, r, r))


@parametrized
def test_just_below_overflow_is_none(chart):
    """Every squared norm is finite, though the sum that looks for trouble is not."""
    frame, size = CHARTS[chart]
    p = torch.zeros(40, size(600, 16))
    p[:, -1] = 1.8e19
    for q in (p, p.clone().requires_grad_()):
        torch.testing.assert_close(frame(q, 600, 16), frame(p.double(), 600, 16).float())


@parametrized
def test_overflow_under_a_transform_is_nan_and_not_a_dropped_reflector(chart):
    frame, size = CHARTS[chart]
    p = torch.zeros(2, size(6, 2))
    p[1, -1] = 1e20
    Q = torch.vmap(lambda q: frame(q, 6, 2))(p)
    assert Q[1].isnan().any()
    torch.testing.assert_close(Q[0], frame(p[0], 6, 2))


@parametrized
@pytest.mark.parametrize("grad", [False, True])
def test_nan_is_passed_on(chart, grad):
    frame, size = CHARTS[chart]
    p = torch.zeros(2, size(600, 16))
    p[1, 0] = torch.nan
    Q = frame(p.requires_grad_(grad), 600, 16)
    assert Q[1].isnan().any()
    torch.testing.assert_close(Q[0], -torch.eye(600, 16))


# --- Arguments. ---


@parametrized
def test_wrong_sizes_are_refused(chart):
    frame, size = CHARTS[chart]
    with pytest.raises(ShapeError, match=rf"{chart}_frame.*\(2, 5\) instead of \(\*b, "):
        frame(torch.zeros(2, 5), 6, 3)
    with pytest.raises(ShapeError, match="1 <= r <= d"):
        frame(torch.zeros(2, 5), 3, 6)
    assert frame(torch.zeros(size(6, 3)), 6, 3).shape == (6, 3)
