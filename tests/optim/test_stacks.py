"""Stacks of frames that a step works on: no larger than a cache likes, and of no influence."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds, shapes

from sttp_manifold._geoopt import EuclideanStiefel, ManifoldParameter
from sttp_manifold.manifolds.spectral_tt import SpectralTTManifold
from sttp_manifold.optim import RiemannianAdam, RiemannianSGD, _stacks
from sttp_manifold.optim._stacks import Stacks
from sttp_manifold.tt.shape import TTShape

OPTIMIZERS = [
    (RiemannianAdam, {"lr": 0.05}),
    (RiemannianAdam, {"lr": 0.05, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    (RiemannianSGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
]


def points(shape, seed):
    """Single points, a batch of them, and a stack of frames."""
    torch.manual_seed(seed)
    manifold = SpectralTTManifold(shape)
    found = [manifold.random_parameter(dtype=torch.float64) for _ in range(3)]
    found.append(manifold.random_parameter(2, dtype=torch.float64))
    found.append(ManifoldParameter(EuclideanStiefel().random(4, 5, 3, dtype=torch.float64)))
    return found


def trajectory(cls, options, shape, seed):
    params = points(shape, seed)
    optimizer = cls(params, **options)
    for step in range(3):
        generator = torch.Generator().manual_seed(seed + step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        optimizer.step()
    return [p.detach() for p in params], optimizer.state_dict()["state"]


@pytest.mark.parametrize(("cls", "options"), OPTIMIZERS)
@given(shape=shapes(), seed=seeds, limit=st.sampled_from([1, 30, 100]))
def test_small_stacks_step_as_large_ones(cls, options, shape, seed, limit):
    wanted, state = trajectory(cls, options, shape, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_stacks, "_CACHED", limit)
        found, other = trajectory(cls, options, shape, seed)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(other, state)


@given(shape=shapes(), seed=seeds, limit=st.sampled_from([1, 30, 100]))
def test_a_stack_is_small_or_a_single_piece(shape, seed, limit):
    params = points(shape, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_stacks, "_CACHED", limit)
        patch.setattr(torch, "get_num_threads", lambda: 1)
        stacks = Stacks(params, 0)
    batch = [p.detach() for p in params]
    for k, stack in enumerate(stacks.stack(batch)):
        pieces = stacks.take_apart(batch)[k]
        # A piece is one frame, of each point of a batch, or a parameter of frames alone.
        single = len(pieces) == 1 and pieces[0].numel() // len(stack) <= math.prod(stack.shape[1:])
        assert k == stacks.coordinates or stack.numel() <= limit or single
    put = [torch.zeros_like(p) for p in batch]
    stacks.put(stacks.stack(batch), put)
    torch.testing.assert_close(put, batch, rtol=0, atol=0)


def test_on_an_accelerator_there_is_one_stack_for_each_shape(monkeypatch):
    monkeypatch.setattr(_stacks, "_CACHED", 1)
    shape = TTShape([3, 4], [2, 5], rank=3)
    manifold = SpectralTTManifold(shape)
    params = [
        ManifoldParameter(p.detach().to("meta"), manifold=manifold) for p in points(shape, 0)[:3]
    ]
    kinds = {(d, r) for _, _, d, r in manifold.frame_groups}
    assert len(Stacks(params, 0).frames) == len(kinds)
    assert len(Stacks(points(shape, 0)[:3], 0, stays=True).frames) == len(kinds)
    assert len(Stacks(points(shape, 0)[:3], 0).frames) == 3 * len(shape.merged.frame_shapes)
