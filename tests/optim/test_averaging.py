"""Averages stay on manifolds, and are torch's on everything else."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

import sttp_manifold as sm
from sttp_manifold._geoopt import EuclideanStiefel, ManifoldParameter, geoopt
from sttp_manifold.errors import OptimizerError
from sttp_manifold.manifolds.spectral_tt import SpectralTTManifold
from sttp_manifold.optim import check_points, get_manifold_multi_avg_fn
from sttp_manifold.tt.shape import TTShape

AVERAGES = [None, get_swa_multi_avg_fn(), get_ema_multi_avg_fn(0.9), get_ema_multi_avg_fn(0.0)]


class Model(torch.nn.Module):
    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        shape = TTShape((4, 3), (5, 2), rank=3)
        sphere, ball = geoopt.Sphere(), geoopt.PoincareBall()
        self.plain = torch.nn.Parameter(torch.randn(3, 2, dtype=dtype))
        self.one = SpectralTTManifold(shape).random_parameter(dtype=dtype)
        self.many = SpectralTTManifold(shape, spectrum="bounded").random_parameter(2, dtype=dtype)
        self.fixed = ManifoldParameter(sm.FixedTTRankManifold(shape).random(dtype=dtype))
        self.frame = ManifoldParameter(EuclideanStiefel().random(6, 4, dtype=dtype))
        self.sphere = ManifoldParameter(sphere.projx(torch.randn(5, dtype=dtype)), manifold=sphere)
        self.ball = ManifoldParameter(0.1 * torch.randn(4, dtype=dtype), manifold=ball)
        self.other = torch.nn.Parameter(torch.randn(4))
        self.norm = torch.nn.BatchNorm1d(3, dtype=dtype)


def train(model, averaged, steps=30):
    optimizer = sm.optim.RiemannianAdam(model.parameters(), lr=0.05)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        optimizer.step()
        model.norm.running_mean.add_(1)
        model.norm.num_batches_tracked.add_(1)
        for one in averaged:
            one.update_parameters(model)


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("average", AVERAGES)
def test_averages_are_on_their_manifolds_and_torchs_elsewhere(average, use_buffers):
    if average is AVERAGES[1] and use_buffers:
        pytest.skip("torch's function refuses the integers of batch norm")
    model = Model()
    ours = AveragedModel(
        model, multi_avg_fn=get_manifold_multi_avg_fn(model, average), use_buffers=use_buffers
    )
    torchs = AveragedModel(model, multi_avg_fn=average, use_buffers=use_buffers)
    train(model, [ours, torchs])
    check_points(ours)
    assert not any(torch.equal(ours.module.one, p) for p in (model.one,)) or average is AVERAGES[3]
    for name in ("plain", "other", "norm.weight", "norm.bias"):
        a, b = ours.module.get_parameter(name), torchs.module.get_parameter(name)
        assert torch.equal(a, b), name
    for a, b in zip(ours.module.buffers(), torchs.module.buffers(), strict=True):
        assert torch.equal(a, b)
    # Spectra are averaged as numbers.
    part = model.one.manifold.spectrum_slice
    assert ours.module.one.manifold is not None
    assert ours.module.one.detach()[part].shape == model.one.detach()[part].shape


def test_frames_go_to_the_nearest_frame_of_the_average():
    model = Model()
    start = model.frame.detach().clone()
    averaged = AveragedModel(model, multi_avg_fn=get_manifold_multi_avg_fn(model))
    averaged.update_parameters(model)
    with torch.no_grad():
        model.frame.copy_(torch.linalg.qr(start + 0.1 * torch.randn_like(start))[0])
    averaged.update_parameters(model)
    left, _, right = torch.linalg.svd((start + model.frame.detach()) / 2, full_matrices=False)
    torch.testing.assert_close(averaged.module.frame.detach(), left @ right)


def test_what_torchs_average_leaves_is_noticed():
    model = Model()
    averaged = AveragedModel(model)
    train(model, [averaged])
    with pytest.raises(OptimizerError, match=r"'module.one' is off its manifold.*proj_"):
        check_points(averaged)
    with torch.no_grad():
        for p in averaged.parameters():
            if isinstance(p, ManifoldParameter):
                p.proj_()
    check_points(averaged)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    shape = TTShape((4, 3), (5, 2), rank=3)
    model = torch.nn.Module()
    point = SpectralTTManifold(shape).random_parameter()
    model.x = ManifoldParameter(point.detach().to(dtype), manifold=point.manifold)
    check_points(model)
    average = get_manifold_multi_avg_fn(model, get_ema_multi_avg_fn(0.5))
    averaged = AveragedModel(model, multi_avg_fn=average)
    optimizer = sm.optim.RiemannianSGD(model.parameters(), lr=0.1)
    for _ in range(10):
        model.x.grad = torch.randn_like(model.x)
        optimizer.step()
        averaged.update_parameters(model)
    check_points(averaged)
    with torch.no_grad():
        averaged.module.x.mul_(1.2)
    with pytest.raises(OptimizerError, match=r"'module\.x'"):
        check_points(averaged)


def test_copies_are_known_by_their_order():
    """As they come where the average is kept on another device."""
    model = Model()
    values = [p.detach().clone() for p in model.parameters() if p.dtype == torch.float64]
    averaged = [v + 0.01 for v in values]
    get_manifold_multi_avg_fn(model)(averaged, values, 1)
    frame = averaged[4]
    torch.testing.assert_close(frame.mT @ frame, torch.eye(4, dtype=frame.dtype))


def test_another_model_is_refused():
    model = Model()
    averaged = AveragedModel(torch.nn.Linear(2, 2), multi_avg_fn=get_manifold_multi_avg_fn(model))
    averaged.update_parameters(torch.nn.Linear(2, 2))
    with pytest.raises(OptimizerError, match=r"Model.*update_parameters\(model\)"):
        averaged.update_parameters(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("given", [(0.999,), (torch.nn.Linear(2, 2), 0.999), (None,)])
def test_a_decay_is_no_averaging_function(given):
    with pytest.raises(OptimizerError, match=r"call get_manifold_multi_avg_fn\(model, get_ema"):
        get_manifold_multi_avg_fn(*given)


def test_a_network():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(24, 20), torch.nn.ReLU(), torch.nn.Linear(20, 24))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = sm.nn.compress(model, rank=3, method="riemannian")
    averaged = AveragedModel(model, multi_avg_fn=get_manifold_multi_avg_fn(model))
    optimizer = sm.optim.RiemannianAdam(model.parameters(), lr=0.03)
    data = torch.randn(64, 24)
    for _ in range(20):
        optimizer.zero_grad()
        (model(data) - data).square().mean().backward()
        optimizer.step()
        averaged.update_parameters(model)
    check_points(averaged)
    before = copy.deepcopy(averaged.module)
    torch.testing.assert_close(averaged(data), before(data))
