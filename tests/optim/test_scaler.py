"""Under a GradScaler a run is the run without it, and a gradient that is not finite moves nothing.

torch's fused kernels unscale and skip by themselves, and tell the scaler so by a flag that is set
by what the optimizer was made with, whatever its groups hold.
"""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from sttp_manifold._geoopt import EuclideanStiefel, ManifoldParameter, geoopt
from sttp_manifold.manifolds.spectral_tt import SpectralTTManifold
from sttp_manifold.optim import RiemannianAdam, RiemannianSGD
from sttp_manifold.tt.shape import TTShape

OPTIMIZERS = [
    (RiemannianAdam, {}),
    (RiemannianAdam, {"amsgrad": True}),
    (RiemannianSGD, {}),
    (RiemannianSGD, {"momentum": 0.9}),
    (RiemannianSGD, {"momentum": 0.9, "nesterov": True}),
]


def parameters():
    torch.manual_seed(0)
    sphere = geoopt.Sphere()
    return {
        "plain": torch.nn.Parameter(torch.randn(3, 2)),
        "ours": SpectralTTManifold(TTShape((4, 3), (5, 2), rank=3)).random_parameter(),
        "stiefel": ManifoldParameter(EuclideanStiefel().random(6, 2)),
        "sphere": ManifoldParameter(sphere.projx(torch.randn(5)), manifold=sphere),
    }


def groups_of(params, fused, together):
    """One group of all, or one for each kind; ``fused`` for what is plain, or for nothing."""
    if together:
        return [dict(params=list(params.values()))]
    flags = {} if fused is None else {"fused": fused}
    return [
        dict(params=[p], **(flags if kind == "plain" else {"fused": False}))
        for kind, p in params.items()
    ]


def make(cls, options, params, *, optimizer_flag, group_flag, added):
    if optimizer_flag is None and group_flag is None:
        groups = groups_of(params, None, True)
    else:
        groups = groups_of(params, group_flag, False)
    first = groups[:1] if added else groups
    flags = {} if optimizer_flag is None else {"fused": optimizer_flag}
    optimizer = cls(first, lr=0.05, **options, **flags)
    for group in groups[len(first) :]:
        optimizer.add_param_group(group)
    return optimizer


def train(optimizer, params, scaler, *, clip=False, spoiled=None, steps=5):
    """Loss scaled by hand where there is no scaler; ``spoiled`` gets an infinite gradient."""
    moved = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        weights = {k: torch.randn(p.shape, generator=generator) for k, p in params.items()}
        loss = sum((weights[k] * p).sum() for k, p in params.items())
        spoil = spoiled is not None and step == 2
        if scaler is None:
            if spoil:
                continue
            loss.backward()
        else:
            scaler.scale(loss).backward()
            if spoil:
                grad = params[spoiled].grad
                grad[(0,) * grad.ndim] = torch.inf
        if clip:
            if scaler is not None:
                scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(list(params.values()), 0.7)
        before = [p.detach().clone() for p in params.values()]
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        moved.append(
            [not torch.equal(p.detach(), q) for p, q in zip(params.values(), before, strict=True)]
        )
    return moved


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("spoiled", [None, "plain", "ours"])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize(
    ("optimizer_flag", "group_flag"), list(itertools.product((None, False, True), repeat=2))
)
@pytest.mark.parametrize(("cls", "options"), OPTIMIZERS)
def test_a_scaled_run_is_the_run(cls, options, optimizer_flag, group_flag, added, spoiled, clip):
    flags = dict(optimizer_flag=optimizer_flag, group_flag=group_flag, added=added)
    params = parameters()
    twins = copy.deepcopy(params)
    optimizer, plain = make(cls, options, params, **flags), make(cls, options, twins, **flags)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    moved = train(optimizer, params, scaler, clip=clip, spoiled=spoiled)
    train(plain, twins, None, clip=clip, spoiled=spoiled)
    assert moved == [[step != 2 or spoiled is None] * 4 for step in range(5)]
    for kind, p in params.items():
        torch.testing.assert_close(p.detach(), twins[kind].detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("spoiled", [None, "plain"])
@pytest.mark.parametrize(("cls", "options"), OPTIMIZERS)
def test_plain_parameters_alone_and_fused(cls, options, spoiled):
    """Here torch's own kernel may unscale and skip."""
    params = {"plain": parameters()["plain"]}
    twins = copy.deepcopy(params)
    optimizer = cls(params.values(), lr=0.05, fused=True, **options)
    assert optimizer._step_supports_amp_scaling == (not options.get("momentum"))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    moved = train(optimizer, params, scaler, spoiled=spoiled)
    train(cls(twins.values(), lr=0.05, **options), twins, None, spoiled=spoiled)
    assert moved == [[step != 2 or spoiled is None] for step in range(5)]
    torch.testing.assert_close(params["plain"], twins["plain"], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("cls", "options"), OPTIMIZERS)
def test_a_loaded_flag_counts(cls, options):
    """A state brings ``fused`` for some groups and takes it from others."""
    params = parameters()
    twins = copy.deepcopy(params)
    flags = dict(group_flag=False, added=False)
    optimizer = make(cls, options, params, optimizer_flag=True, **flags)
    source = make(cls, options, twins, optimizer_flag=None, group_flag=True, added=False)
    optimizer.load_state_dict(source.state_dict())
    assert [g["fused"] for g in optimizer.param_groups] == [True, False, False, False]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    moved = train(optimizer, params, scaler, spoiled="ours")
    train(source, twins, None, spoiled="ours")
    assert moved == [[step != 2] * 4 for step in range(5)]
    for kind, p in params.items():
        torch.testing.assert_close(p.detach(), twins[kind].detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("carry", [copy.deepcopy])
def test_a_copied_optimizer_knows_it_too(carry):
    params = parameters()
    optimizer = RiemannianAdam([params["plain"]], fused=True)
    assert carry(optimizer)._step_supports_amp_scaling
    optimizer.add_param_group({"params": [params["ours"]], "fused": False})
    assert not carry(optimizer)._step_supports_amp_scaling
