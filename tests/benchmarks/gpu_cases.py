"""What is measured on a GPU, table by table: competitors, made when their turn comes.

Every competitor is eager, captured as one graph of kernels, or compiled. Data and networks are
random; sizes are those of `gpu.py`, or tiny ones for the stand-in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from gpu_meter import Cuda, StandIn
from networks import Weights
from steps import householder_product, with_gradients
from timing import Work
from torch import Tensor, nn
from training import METHODS, PLAIN, converted, mlp

from sttp_manifold import SpectralTTManifold, TTShape
from sttp_manifold._geoopt import ManifoldParameter, geoopt
from sttp_manifold.experiments.models import ResNet, network, weight_sizes
from sttp_manifold.frames import full_frame, full_size
from sttp_manifold.nn import (
    HouseholderWeight,
    SpectralLinear,
    capture_step,
    decompress,
    together,
)
from sttp_manifold.optim import RiemannianAdam, RiemannianMuon, RiemannianSGD

__all__ = ["TABLES", "Case", "Competitor"]

EAGER, CAPTURED, COMPILED = "eager", "captured", "compiled"
Meter = Cuda | StandIn


class Competitor(NamedTuple):
    """Somebody who does the work of a case in one way; ``make`` returns a call of it."""

    who: str
    way: str
    make: Callable[[], Work]


class Case(NamedTuple):
    """Competitors that do the same."""

    name: str
    competitors: list[Competitor]


def _sizes(name: str) -> list[tuple[int, ...]]:
    if name == "transformer":
        return [size for _ in range(12) for size in [(768, 768)] * 4 + [(3072, 768), (768, 3072)]]
    if name == "tiny":
        return [(8, 4, 3, 3), (8, 8, 3, 3), (10, 16)]
    return weight_sizes(network(name, device="meta"))


def _networks(small: bool) -> list[tuple[str, int]]:
    if small:
        return [("tiny", 4)]
    return [("resnet-32", 64), ("wrn-28-10", 64), ("transformer", 64)]


def steps(meter: Meter, small: bool) -> Iterator[Case]:
    """An optimizer's step for all weights of a network."""
    for name, rank in _networks(small):
        yield Case(f"{name}, rank {rank}", _steps(meter, _sizes(name), rank, small))


def _steps(meter: Meter, sizes: list[tuple[int, ...]], rank: int, small: bool) -> list[Competitor]:
    shapes = [TTShape.for_weight(size, rank) for size in sizes]
    frames = [frame for shape in shapes for frame in shape.merged.frame_shapes]
    fused = meter.device.type == "cuda"
    capturable = dict(capturable=True) if fused else {}

    def points() -> list[Tensor]:
        made = (SpectralTTManifold(shape).random_parameter() for shape in shapes)
        held = [ManifoldParameter(p.detach().to(meter.device), manifold=p.manifold) for p in made]
        return with_gradients(held)

    def plain(some: list[tuple[int, ...]]) -> list[Tensor]:
        made = [nn.Parameter(torch.randn(size, device=meter.device)) for size in some]
        return with_gradients(made)

    def loose() -> list[Tensor]:
        manifold = geoopt.EuclideanStiefel()
        held = [
            ManifoldParameter(torch.linalg.qr(torch.randn(size))[0].contiguous().to(meter.device),
                              manifold=manifold)
            for size in frames
        ]  # fmt: skip
        return with_gradients(held)

    def adam(**flags: Any) -> Work:
        return RiemannianAdam(points(), lr=1e-3, **flags).step

    def muon(**flags: Any) -> Work:
        return RiemannianMuon(points(), lr=1e-3, **flags).step

    def torch_adam(some: list[tuple[int, ...]]) -> Work:
        how = dict(fused=True) if fused else dict(foreach=True)
        return torch.optim.Adam(plain(some), lr=1e-3, **how).step

    dense = [(shape.d_out, shape.d_in) for shape in shapes]
    found = [
        Competitor("RiemannianAdam", EAGER, adam),
        Competitor("RiemannianAdam", CAPTURED, lambda: meter.captured(adam(**capturable))),
        Competitor("RiemannianAdam, without kernels", EAGER, lambda: adam(fused=False)),
        Competitor(
            "RiemannianAdam, without kernels",
            CAPTURED,
            lambda: meter.captured(adam(fused=False, **capturable)),
        ),
        Competitor(
            "RiemannianSGD, momentum",
            EAGER,
            lambda: RiemannianSGD(points(), lr=1e-3, momentum=0.9).step,
        ),
        Competitor("RiemannianMuon", EAGER, muon),
        Competitor("RiemannianMuon", CAPTURED, lambda: meter.captured(muon(**capturable))),
        Competitor("RiemannianMuon, without kernels", EAGER, lambda: muon(fused=False)),
        Competitor(
            "RiemannianAdam, a parameter a frame",
            EAGER,
            lambda: RiemannianAdam(loose(), lr=1e-3).step,
        ),
        Competitor(
            "geoopt RiemannianAdam, the same frames",
            EAGER,
            lambda: geoopt.optim.RiemannianAdam(loose(), lr=1e-3).step,
        ),
        Competitor("torch Adam, the same frames", EAGER, lambda: torch_adam(list(frames))),
        Competitor("torch Adam, the dense weights", EAGER, lambda: torch_adam(dense)),
    ]
    return found


def charts(meter: Meter, small: bool) -> Iterator[Case]:
    """All weights of a network from their charts, forward and backward, and one batch of frames."""
    for name, rank in _networks(small):
        shapes = [TTShape.for_weight(size, rank) for size in _sizes(name)]
        yield Case(
            f"all weights of {name}, rank {rank}",
            [
                Competitor("charts, together", EAGER, lambda s=shapes: _weights(meter, s)),
                Competitor(
                    "charts, together",
                    CAPTURED,
                    lambda s=shapes: meter.captured(_weights(meter, s)),
                ),
            ],
        )
    count, d, r = (2, 9, 4) if small else (64, 128, 64)
    yield Case(f"{count} frames of {d} x {r}", _frames(meter, count, d, r))


def _weights(meter: Meter, shapes: list[TTShape]) -> Work:
    model = Weights([HouseholderWeight(shape, init="random") for shape in shapes]).to(meter.device)
    together(model)
    g = [torch.randn(shape.d_out, shape.d_in, device=meter.device) for shape in shapes]
    parameters = list(model.parameters())
    model()  # weights are formed together from the second forward on

    def work() -> None:
        torch.autograd.grad(model(), parameters, g)

    return work


def _frames(meter: Meter, count: int, d: int, r: int) -> list[Competitor]:
    x = torch.randn(count, full_size(d, r), device=meter.device).div_(d**0.5).requires_grad_()
    A = torch.randn(count, d, r, device=meter.device, requires_grad=True)
    g = torch.randn(count, d, r, device=meter.device)

    def chart() -> None:
        torch.autograd.grad(full_frame(x, d, r), x, g)

    def product() -> None:
        torch.autograd.grad(householder_product(x, d, r), x, g)

    def qr() -> None:
        torch.autograd.grad(torch.linalg.qr(A)[0], A, g)

    return [
        Competitor("full_frame", EAGER, lambda: chart),
        Competitor("full_frame", CAPTURED, lambda: meter.captured(chart)),
        Competitor("torch.linalg.qr", EAGER, lambda: qr),
        Competitor("torch.linalg.householder_product", EAGER, lambda: product),
    ]


def training(meter: Meter, small: bool) -> Iterator[Case]:
    """The step of training of a network: forward, backward, optimizer."""
    cases: list[tuple[str, Callable[[], nn.Module], tuple[int, ...], int]]
    if small:
        cases = [("MLP 16-32-16, rank 4, batch 8", lambda: mlp(16, 32), (8, 16), 4)]
    else:
        cases = [
            (
                "MLP 4096-16384-4096, rank 64, batch 1024",
                lambda: mlp(4096, 16384),
                (1024, 4096),
                64,
            ),
            ("ResNet-20, rank 16, batch 256", lambda: ResNet(20), (256, 3, 32, 32), 16),
        ]
    for name, make, size, rank in cases:
        x = torch.randn(size, device=meter.device)
        labels = torch.randint(10, size[:1], device=meter.device)
        methods = ["dense", PLAIN, *(method for method in METHODS if method != "dense")]
        yield Case(
            name,
            [
                Competitor(method, way, lambda m=method, w=way, n=make, r=rank, b=(x, labels):
                           _training(meter, n, m, r, b, w))
                for way in (EAGER, CAPTURED, COMPILED)
                for method in methods
            ],
        )  # fmt: skip


def _loss(model: Callable[[Tensor], Tensor], x: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x), labels)


def _training(
    meter: Meter,
    make: Callable[[], nn.Module],
    method: str,
    rank: int,
    batch: tuple[Tensor, Tensor],
    way: str,
) -> Work:
    model, optimizer = converted(make(), method, rank)
    model = model.to(meter.device)
    on_gpu = meter.device.type == "cuda"
    flags: dict[str, Any] = dict(capturable=True) if on_gpu and way == CAPTURED else {}
    if isinstance(optimizer, RiemannianAdam):
        optimizer = RiemannianAdam(model.parameters(), lr=1e-3, **flags)
    else:
        flags |= dict(fused=True) if on_gpu else dict(foreach=True)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, **flags)
    if way == CAPTURED:
        step = capture_step(model, optimizer, _loss, batch)
        return lambda: step(*batch)
    called = meter.compiled(model) if way == COMPILED else model

    def work() -> None:
        optimizer.zero_grad(set_to_none=True)
        _loss(called, *batch).backward()
        optimizer.step()

    return work


def inference(meter: Meter, small: bool) -> Iterator[Case]:
    """A square linear layer, without gradient."""
    width, rank = (16, 4) if small else (4096, 64)
    for batch in (1, 2) if small else (1, 512):
        x = torch.randn(batch, width, device=meter.device)
        layers: dict[str, Callable[[], nn.Module]] = {
            "dense": lambda: nn.Linear(width, width),
            "two nn.Linear": lambda: nn.Sequential(
                nn.Linear(width, rank, bias=False), nn.Linear(rank, width)
            ),
            'decompress(form="factors")': lambda: decompress(
                nn.Sequential(SpectralLinear(width, width, rank, kind="svdp")), form="factors"
            ),
            "SVDP chart": lambda: SpectralLinear(width, width, rank, kind="svdp"),
            "STTP chart": lambda: SpectralLinear(width, width, rank, kind="sttp"),
        }
        yield Case(
            f"{width} x {width}, rank {rank}, batch {batch}",
            [
                Competitor(who, EAGER, lambda m=make, x=x: _forward(m().to(meter.device), x))
                for who, make in layers.items()
            ],
        )


def _forward(model: nn.Module, x: Tensor) -> Work:
    def work() -> None:
        with torch.no_grad():
            model(x)

    return work


TABLES: dict[str, Callable[[Meter, bool], Iterator[Case]]] = {
    "steps": steps,
    "charts": charts,
    "training": training,
    "inference": inference,
}
