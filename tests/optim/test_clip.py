"""Norms of gradients in the metric, beside torch's and geoopt's own."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sttp_manifold._geoopt import EuclideanStiefel, ManifoldParameter, geoopt
from sttp_manifold.errors import OptimizerError
from sttp_manifold.manifolds import FixedTTRankManifold, SpectralTTManifold
from sttp_manifold.optim import clip_grad_norm_, gradient_noise_scale
from sttp_manifold.tt.shape import TTShape

SHAPE = TTShape(out_modes=(3, 4, 2), in_modes=(2, 5, 3), rank=4)


def on(manifold, x):
    p = ManifoldParameter(x.clone(), manifold=manifold)
    p.grad = torch.randn_like(p)
    return p


def plain(*shape, dtype=torch.float64):
    p = torch.nn.Parameter(torch.ones(shape, dtype=dtype))
    p.grad = torch.randn_like(p)
    return p


def curved():
    """Points of several manifolds, with gradients."""
    M = SpectralTTManifold(SHAPE)
    F = FixedTTRankManifold(SHAPE)
    generator = torch.Generator().manual_seed(0)
    ball = geoopt.PoincareBall()
    return [
        on(M, M.random(dtype=torch.float64, generator=generator)),
        on(M, M.random(2, M.n_elements, dtype=torch.float64, generator=generator)),
        on(F, F.random(dtype=torch.float64, generator=generator)),
        on(EuclideanStiefel(), torch.linalg.qr(torch.randn(2, 6, 3, dtype=torch.float64))[0]),
        on(ball, ball.projx(0.3 * torch.randn(4, 3, dtype=torch.float64))),
    ]


def length(p):
    """In the words of geoopt."""
    x, manifold = p.detach(), p.manifold
    u = manifold.egrad2rgrad(x, p.grad.clone())
    return math.sqrt(float(manifold.inner(x, u, keepdim=True).sum()))


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf])
@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e9])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_plain_parameters_as_torch_has_it_bit_for_bit(foreach, norm_type, max_norm, dtype):
    params = [plain(4, 3, dtype=dtype), plain(5, dtype=dtype), torch.nn.Parameter(torch.ones(2))]
    twins = copy.deepcopy(params)
    for p, q in zip(params, twins, strict=True):
        q.grad = None if p.grad is None else p.grad.clone()
    ours = clip_grad_norm_(params, max_norm, norm_type, foreach=foreach)
    theirs = torch.nn.utils.clip_grad_norm_(twins, max_norm, norm_type, foreach=foreach)
    assert torch.equal(ours, theirs)
    assert ours.dtype == theirs.dtype
    for p, q in zip(params[:2], twins[:2], strict=True):
        assert torch.equal(p.grad, q.grad)


def test_the_norm_is_that_of_riemannian_gradients():
    params = [*curved(), plain(4, 3)]
    expected = math.hypot(*map(length, params[:-1]), float(params[-1].grad.norm()))
    before = [p.grad.clone() for p in params]
    total = clip_grad_norm_(iter(params), 0.25)
    assert float(total) == pytest.approx(expected, rel=1e-12)
    for p, grad in zip(params, before, strict=True):
        torch.testing.assert_close(p.grad, 0.25 / expected * grad, rtol=1e-5, atol=0)
    assert float(clip_grad_norm_(params, 1.0)) == pytest.approx(0.25, rel=1e-5)


def test_the_normal_part_does_not_count():
    M = SpectralTTManifold(SHAPE)
    x = on(M, M.random(dtype=torch.float64))
    x.grad = M.proju(x.detach(), x.grad)
    expected = clip_grad_norm_(x, 1e9)
    span, count, d, r = M.frame_groups[0]
    X = x.detach()[span].view(count, d, r)
    x.grad[span] += 100 * X.flatten()
    torch.testing.assert_close(clip_grad_norm_(x, 1e9), expected)
    assert expected < x.grad.norm()


@given(scale=st.sampled_from([1e-30, 1e-20, 1e20, 1e30]), seed=st.integers(0, 9))
def test_squares_do_not_overflow_on_manifolds(scale, seed):
    torch.manual_seed(seed)
    M = SpectralTTManifold(SHAPE)
    x = on(M, M.random(dtype=torch.float32))
    expected = float(clip_grad_norm_(x, 1e9))
    x.grad *= scale
    total = clip_grad_norm_(x, math.inf)
    assert total.dtype == torch.float32
    assert float(total) == pytest.approx(expected * scale, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_measured_in_float32(dtype):
    x = ManifoldParameter(torch.eye(300, 2, dtype=dtype), manifold=EuclideanStiefel())
    x.grad = torch.full_like(x, 3e4)
    with torch.autocast("cpu"):
        total = clip_grad_norm_(x, 1.0)
    assert total.dtype == torch.float32
    # All but the two rows of the identity is tangent, and of these the skew part.
    assert float(total) == pytest.approx(3e4 * math.sqrt(596), rel=1e-2)
    assert float(x.grad.float().norm()) == pytest.approx(1.0, rel=2e-2)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite(bad):
    params = [*curved(), plain(3)]
    params[0].grad[0] = bad
    before = params[-1].grad.clone()
    with pytest.raises(OptimizerError, match="cannot be clipped") as raised:
        clip_grad_norm_(params, 1.0, error_if_nonfinite=True)
    assert isinstance(raised.value, RuntimeError)
    assert torch.equal(params[-1].grad, before)
    assert not clip_grad_norm_(params, 1.0).isfinite()


def test_what_cannot_be_used_is_refused():
    for settings in ({"max_norm": -1.0}, {"max_norm": math.nan}, {"max_norm": 1, "norm_type": 0}):
        with pytest.raises(OptimizerError, match=r"clip_grad_norm_ got max_norm"):
            clip_grad_norm_([plain(2)], **settings)
    with pytest.raises(OptimizerError, match="norm of order 2 only"):
        clip_grad_norm_(curved(), 1.0, math.inf)


def test_nothing_to_clip():
    assert float(clip_grad_norm_([torch.nn.Parameter(torch.ones(2))], 1.0)) == 0
    assert float(clip_grad_norm_([], 1.0)) == 0


def test_no_value_is_asked_for():
    M = SpectralTTManifold(SHAPE)
    x = ManifoldParameter(torch.empty(M.n_elements, device="meta"), manifold=M)
    x.grad = torch.empty_like(x.detach())
    p = torch.nn.Parameter(torch.empty(2, device="meta"))
    p.grad = torch.empty_like(p.detach())
    assert clip_grad_norm_([x, p], 1.0).device.type == "meta"


# --- Noise. ---


def test_the_scale_of_noise_is_that_of_samples_drawn():
    """Gradients of known mean and covariance: 3 in each of 5 entries, and variance 4."""
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(5, dtype=torch.float64))
    samples = 3 + 2 * torch.randn(4000, 16, 5, dtype=torch.float64, generator=generator)
    losses = ((p * batch).sum(-1).mean() for batch in samples)
    scale = gradient_noise_scale([p], losses, batch_size=16)
    assert scale == pytest.approx(20 / 45, rel=0.03)
    assert p.grad is None


def test_noise_is_measured_in_the_metric():
    """That of normal directions is none, whatever it is in the Euclidean space."""
    M = SpectralTTManifold(SHAPE)
    x = M.random_parameter(dtype=torch.float64)
    span, count, d, r = M.frame_groups[0]
    normal = x.detach()[span].view(count, d, r)
    target = torch.randn(M.n_elements, dtype=torch.float64)

    def loss(noise):
        return (x * target).sum() + noise * (x[span].view(count, d, r) * normal).sum()

    assert gradient_noise_scale([x], map(loss, (1.0, -5.0, 9.0))) == pytest.approx(0, abs=1e-12)
    assert gradient_noise_scale([x], [(x * target).sum(), (2 * x * target).sum()]) > 0.1


def test_few_batches_are_not_taken_for_many():
    """Gradients 3 and 5: variance 2, and of the squared mean 16 a half of that is noise."""
    p = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    losses = [3 * p.sum(), 5 * p.sum()]
    assert gradient_noise_scale([p], losses, batch_size=7) == pytest.approx(7 * 2 / 15)


def test_ends_of_the_scale():
    p = torch.nn.Parameter(torch.ones(3))
    assert gradient_noise_scale([p], [p.sum(), p.sum()]) == 0
    assert gradient_noise_scale([p], [p.sum(), -p.sum()]) == math.inf
    for losses in ([], [p.sum()]):
        with pytest.raises(OptimizerError, match="of which there is no spread"):
            gradient_noise_scale([p], losses)
    with pytest.raises(OptimizerError, match="got batch_size=0"):
        gradient_noise_scale([p], [p.sum(), p.sum()], batch_size=0)
