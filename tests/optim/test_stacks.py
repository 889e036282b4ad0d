"""Blocks of frames that a step works on: no larger than a cache likes, and of no influence."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds, shapes
from torch.utils._python_dispatch import TorchDispatchMode

from sttp_manifold._geoopt import EuclideanStiefel, ManifoldParameter
from sttp_manifold.manifolds.spectral_tt import SpectralTTManifold
from sttp_manifold.optim import RiemannianAdam, RiemannianSGD, _layout, _stacks
from sttp_manifold.optim._blocks import frame_views, scalars_shape, spectrum_slice
from sttp_manifold.optim._stacks import Stacks
from sttp_manifold.tt.shape import TTShape

OPTIMIZERS = [
    (RiemannianAdam, {"lr": 0.05}),
    (RiemannianAdam, {"lr": 0.05, "second_moment": "frame"}),
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


@pytest.mark.parametrize(("cls", "options"), OPTIMIZERS)
@given(
    shape=shapes(),
    seed=seeds,
    columns=st.sampled_from([0, 2, 100]),
    free=st.sampled_from([0, 1 << 20]),
)
def test_padding_changes_nothing(cls, options, shape, seed, columns, free):
    """None, some, and all of it."""
    wanted, state = trajectory(cls, options, shape, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_layout, "_COLUMNS", columns)
        patch.setattr(_layout, "_FREE", free)
        found, other = trajectory(cls, options, shape, seed)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(other, state)


@given(shape=shapes(), seed=seeds, limit=st.sampled_from([1, 30, 100]), small=st.booleans())
def test_blocks_hold_everything_once_and_no_more_than_they_may(shape, seed, limit, small):
    params = points(shape, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_stacks, "_CACHED", limit)
        patch.setattr(torch, "get_num_threads", lambda: 1)
        patch.setattr(_layout, "_COLUMNS", 16 if small else 0)
        stacks = Stacks(params, 0)
    points_ = [p.detach() for p in params]
    pieces = stacks.take(points_)
    for block, mine in zip(stacks.blocks, pieces, strict=True):
        held = sum(piece.numel() for piece in mine)
        # A single segment may be more: one frame, or the small ones, of each point of a batch.
        assert held <= limit or len(mine) == 1
        frames, coordinates = block.views(block.fetch(mine))
        for stack in frames:
            d = stack.shape[1]
            gram = stack.mT @ stack
            torch.testing.assert_close(gram, torch.eye(gram.shape[-1]).expand_as(gram).double())
            assert d >= stack.shape[2]
        assert sum(stack.square().sum() > 0 for stack in frames) == len(frames)
        assert not block.coordinates or coordinates.shape == (block.coordinates,)
    put = [torch.zeros_like(p) for p in points_]
    stacks.lend("there", points_)
    stacks.give_back("there", put)
    torch.testing.assert_close(put, points_, rtol=0, atol=0)
    numbers = [torch.randn(scalars_shape(p), dtype=p.dtype) for p in params]
    back = [torch.zeros_like(n) for n in numbers]
    stacks.lend("numbers", numbers, scalars=True)
    stacks.give_back("numbers", back)
    torch.testing.assert_close(back, numbers, rtol=0, atol=0)


def test_scalars_belong_to_their_frames():
    """The norm of each frame, through the block, is where the state of its parameter has it."""
    params = points(TTShape([3, 4, 2], [2, 5], rank=3), 0)
    stacks = Stacks(params, 0)
    scaled = [p.detach() * torch.rand_like(p.detach()) for p in params]
    for block, mine in zip(stacks.blocks, stacks.take(scaled), strict=True):
        frames, coordinates = block.views(block.fetch(mine))
        norms = [frame.flatten(1).norm(dim=1) for frame in frames]
        rest = [coordinates.abs()] if block.coordinates else []
        block.scalars["norms"] = torch.cat([*norms, *rest])
    found = [torch.zeros(scalars_shape(p), dtype=p.dtype) for p in params]
    stacks.give_back("norms", found)
    for p, x, numbers in zip(params, scaled, found, strict=True):
        expected = [v.flatten(-2).norm(dim=-1) for v in frame_views(p, x)]
        if spectrum_slice(p) is not None:
            expected.append(x[..., spectrum_slice(p)].abs())
        expected = expected[0] if len(expected) == 1 else torch.cat(expected, -1)
        torch.testing.assert_close(numbers, expected)


def test_on_an_accelerator_everything_is_one_block(monkeypatch):
    monkeypatch.setattr(_stacks, "_CACHED", 1)
    shapes_ = (TTShape([3, 4], [2, 5], rank=3), TTShape.svd(90, 80, rank=40))
    params = []
    for shape in shapes_:
        manifold = SpectralTTManifold(shape)
        for _ in range(3):
            data = manifold.random(dtype=torch.float32).to("meta")
            params.append(ManifoldParameter(data.as_subclass(torch.Tensor), manifold=manifold))
    assert len(Stacks(params, 0).blocks) == 1
    on_cpu = [ManifoldParameter(p.manifold.random()) for p in params]
    assert len(Stacks(on_cpu, 0, stays=True).blocks) == 1
    # One large frame in a block, the small ones of one parameter, and each spectrum of the others.
    assert len(Stacks(on_cpu, 0).blocks) == 6 + 3 + 3


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("cls", "options", "at_most"),
    [
        (RiemannianAdam, {}, 80),
        (RiemannianAdam, {"second_moment": "frame"}, 80),
        (RiemannianSGD, {"momentum": 0.9}, 62),
    ],
)
def test_calls_of_a_step_of_a_small_network(cls, options, at_most):
    """64-128-64-10 of rank 4 with biases: what a step costs there is calls."""
    sizes = ((128, 64), (64, 128), (10, 64))
    params = []
    for out, into in sizes:
        manifold = SpectralTTManifold(TTShape.for_matrix(out, into, rank=4))
        params += [manifold.random_parameter(), torch.nn.Parameter(torch.zeros(out))]
    optimizer = cls(params, lr=1e-3, **options)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    optimizer.step()
    with Calls() as calls:
        optimizer.step()
    assert calls.count <= at_most
