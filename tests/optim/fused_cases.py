"""Fused steps in Triton's interpreter beside those of the same optimizer without: prints JSON.

Run by `test_fused.py` in a process of its own, since the environment chooses the interpreter when
Triton is imported, which torch may do itself. Memory that torch does not fill is full of NaN, so
that nothing is read that no one wrote.
"""

from __future__ import annotations

import copy
import json
import math
import sys

import torch
from kernels.poisoned_memory import poisoned

from sttp_manifold import SpectralTTManifold, TTShape
from sttp_manifold._geoopt import EuclideanStiefel, ManifoldParameter
from sttp_manifold.errors import OptimizerError
from sttp_manifold.optim import RiemannianAdam, RiemannianMuon, RiemannianSGD

ADAM, SGD, MUON = RiemannianAdam, RiemannianSGD, RiemannianMuon
CASES = {
    "adam": (ADAM, dict(lr=1e-2)),
    "adam, frames": (ADAM, dict(lr=1e-2, second_moment="frame")),
    "adam, frames, all of it": (
        ADAM,
        dict(lr=0.3, amsgrad=True, weight_decay=0.1, maximize=True) | dict(second_moment="frame"),
    ),
    "adam, decay": (
        ADAM,
        dict(lr=0.1, amsgrad=True, weight_decay=0.1, decoupled_weight_decay=True),
    ),
    "adam, long steps": (ADAM, dict(lr=30.0, betas=(0.9, 0.5), second_moment="frame")),
    "adam, capturable": (
        ADAM,
        dict(lr=torch.tensor(1e-2), capturable=True, eps=0.0) | dict(second_moment="frame"),
    ),
    "sgd": (SGD, dict(lr=0.1)),
    "sgd, nesterov": (SGD, dict(lr=0.5, momentum=0.9, nesterov=True, weight_decay=0.1)),
    "sgd, dampening": (SGD, dict(lr=0.1, momentum=0.9, dampening=0.5, maximize=True)),
    "muon": (MUON, dict(lr=0.03)),
    "muon, all of it": (
        MUON,
        dict(lr=0.3, nesterov=False, maximize=True, weight_decay=0.1, adam_lr=0.01),
    ),
    "muon, capturable": (
        MUON,
        dict(lr=torch.tensor(0.1), adam_lr=torch.tensor(0.02), capturable=True),
    ),
}


def points(seed: int, dtype: torch.dtype = torch.float32) -> list[ManifoldParameter]:
    """Frames of one width and of two, small and with more rows than a block, and spectra."""
    torch.manual_seed(seed)
    M = SpectralTTManifold(TTShape((4, 3), (5, 2), rank=3), spectrum="free")
    full = SpectralTTManifold(TTShape((4,), (6,), rank=2), spectrum="full")
    stiefel = EuclideanStiefel()
    values = [
        (M.random(2, M.n_elements), M),
        (full.random(full.n_elements), full),
        (torch.linalg.qr(torch.randn(70, 17))[0].contiguous(), stiefel),
        (torch.linalg.qr(torch.randn(2, 9, 5))[0].contiguous(), stiefel),
    ]
    return [ManifoldParameter(x.float().to(dtype), manifold=kind) for x, kind in values]


def give(params: list[ManifoldParameter], seed: int) -> None:
    """Gradients; those of matrices in the order of columns, as backward passes may make them."""
    torch.manual_seed(seed)
    for p in params:
        g = torch.randn(p.shape).to(p.dtype)
        p.grad = g.mT.contiguous().mT if p.ndim == 2 else g


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def compare(cls, options, steps: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    mine, theirs = points(1, dtype), points(1, dtype)
    fused, plain = cls(mine, fused=True, **options), cls(theirs, fused=False, **options)
    for k in range(steps):
        give(mine, k)
        give(theirs, k)
        fused.step()
        plain.step()
    worst = {"point": max(map(apart, mine, theirs))}
    for p, q in zip(mine, theirs, strict=True):
        a, b = fused.state[p], plain.state[q]
        assert a.keys() == b.keys(), (a.keys(), b.keys())
        for name in a:
            assert a[name].shape == b[name].shape, name
            worst[name] = max(worst.get(name, 0.0), apart(a[name], b[name]))
    frames = [p.detach().double() for p in mine[2:]]
    eyes = [x.mT @ x - torch.eye(x.shape[-1], dtype=torch.float64) for x in frames]
    worst["orthonormality"] = max(float(e.abs().max()) for e in eyes)
    return worst


SPIKED = {
    "entries": dict(),
    "entries, forgotten": dict(betas=(0.9, 0.0)),
    "frames, forgotten": dict(betas=(0.9, 0.0), second_moment="frame"),
    "frames, highest": dict(amsgrad=True, second_moment="frame"),
    "muon": dict(adam_betas=(0.9, 0.0)),
}


def spiked(cls, options, size: float) -> dict[str, float]:
    """One huge gradient among small ones: a quotient that overflows, a square that does."""
    mine, theirs = points(4)[1:2], points(4)[1:2]
    fused, plain = cls(mine, fused=True, **options), cls(theirs, fused=False, **options)
    worst = 0.0
    for k in range(3):
        give(mine, k)
        give(theirs, k)
        for p in mine + theirs:
            p.grad.mul_(1e-3)
            if k == 1:
                p.grad.sign_().mul_(size)
        fused.step()
        plain.step()
        for p, q in zip(mine, theirs, strict=True):
            finite = q.detach().isfinite()
            assert torch.equal(p.detach().isfinite(), finite), (k, p, q)
            worst = max(worst, apart(p.detach()[finite], q.detach()[finite]))
    mine[0].grad[0] = math.nan  # of a frame
    mine[0].grad[-1] = math.nan  # of a coordinate
    fused.step()
    shown = [mine[0].detach()[k].isnan() for k in (0, -1)]
    return {"point": worst, "hidden": 2.0 - sum(map(float, shown))}


def beside_double() -> dict[str, float]:
    """Muon's steps beside those of float64: how far the kernel is off, and how far float32 is."""
    ends = []
    for dtype, fused in ((torch.float64, False), (torch.float32, False), (torch.float32, True)):
        mine = [ManifoldParameter(p.detach().to(dtype), manifold=p.manifold) for p in points(5)]
        optimizer = MUON(mine, lr=0.1, fused=fused)
        give(mine, 0)
        for p, seed in zip(mine, range(4), strict=True):
            p.grad.mul_(10.0 ** (15 * seed - 25))
        optimizer.step()
        ends.append(mine)
    right, *others = ends
    plain, fused = (max(map(apart, some, right)) for some in others)
    return {"plain": plain, "fused": fused}


def resting() -> dict[str, float]:
    """Frames without a gradient, and with a normal one, which must not turn."""
    torch.manual_seed(6)
    x = torch.linalg.qr(torch.randn(3, 20, 5))[0].contiguous()
    p = ManifoldParameter(x.clone(), manifold=EuclideanStiefel())
    S = torch.randn(5, 5)
    p.grad = torch.stack([torch.zeros(20, 5), x[1] @ (S + S.mT), torch.randn(20, 5)])
    MUON([p], lr=0.2, fused=True).step()
    moved = [apart(p[k], x[k]) for k in range(3)]
    # Of a frame that turns by 0.2 in all directions, 2 sin(0.1) of its norm.
    return {"rest": max(moved[:2]), "turn": abs(moved[2] - 2 * math.sin(0.1))}


def handed_over(cls) -> dict[str, float]:
    """A state goes from one way to the other, and through a state dict; a parameter moves."""
    mine, theirs = points(2)[1:], points(2)[1:]
    a, b = cls(mine, lr=0.05, fused=True), cls(theirs, lr=0.05)
    for k in range(4):
        give(mine, k)
        give(theirs, k)
        if k == 1:
            a.param_groups[0]["fused"] = False
        if k == 2:
            a.param_groups[0]["fused"] = True
            for p in mine:
                p.data = p.data.clone()
        if k == 3:
            saved = copy.deepcopy(a.state_dict())
            a = cls(mine, lr=0.05, fused=True)
            a.load_state_dict(saved)
        a.step()
        b.step()
    # One parameter fewer has a gradient.
    give(mine, 9)
    give(theirs, 9)
    mine[0].grad = theirs[0].grad = None
    a.step()
    b.step()
    return {"point": max(map(apart, mine, theirs))}


def refused() -> dict[str, str]:
    """What kernels cannot do, by the reason given."""
    said = {}
    wide = ManifoldParameter(torch.eye(200, 130), manifold=EuclideanStiefel())
    bounded = SpectralTTManifold(TTShape((4,), (6,), rank=2), spectrum="bounded")
    for name, params, options in (
        ("retraction", points(3), dict(retraction="qr")),
        ("columns", [wide], {}),
        ("double", [ManifoldParameter(torch.eye(4, 2).double(), manifold=EuclideanStiefel())], {}),
        ("decay", [bounded.random_parameter()], dict(weight_decay=0.1)),
        ("stabilize", points(3), dict(stabilize=5)),
        (
            "betas",
            points(3),
            dict(betas=(torch.tensor(0.9), torch.tensor(0.99)), lr=torch.tensor(0.1)),
        ),
    ):
        try:
            RiemannianAdam(params, **{"lr": 0.1, "fused": True, **options})
        except OptimizerError as error:
            said[name] = str(error)
    for name, options in (
        ("muon, betas", dict(adam_betas=(torch.tensor(0.9), torch.tensor(0.99)))),
        ("muon, matrices", dict(plain_matrices="muon")),
        ("muon, foreach", dict(foreach=True)),
        ("muon, retraction", dict(retraction="cayley")),
    ):
        try:
            RiemannianMuon(points(3), **{"fused": True, **options})
        except OptimizerError as error:
            said[name] = str(error)
    return said


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.empty = poisoned
    found: dict[str, object] = {"cases": {k: compare(cls, how) for k, (cls, how) in CASES.items()}}
    found["half"] = compare(ADAM, dict(lr=1e-2), steps=1, dtype=torch.bfloat16)
    found["half, muon"] = compare(MUON, dict(lr=0.1), steps=1, dtype=torch.bfloat16)
    found["handed over"] = {cls.__name__: handed_over(cls)["point"] for cls in (ADAM, MUON)}
    found["beside double"] = beside_double()
    found["resting"] = resting()
    found["spiked"] = {
        f"{name}, {size:g}": spiked(MUON if name == "muon" else ADAM, dict(how, lr=0.05), size)
        for name, how in SPIKED.items()
        for size in (1e19, 1e37)
    }
    found["refused"] = refused()
    json.dump(found, sys.stdout)
