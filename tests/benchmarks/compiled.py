"""A training step and a forward under `torch.compile`, beside the same in eager mode.

Forward and backward, without an optimizer, and the forward alone without gradient; ratios are those
within a turn, of compiled to eager. Calls are those of this package's operators in one step.
Compiling is the wall time of the first step and the first forward, from empty caches; ResNet-20 has
to be asked for, as it takes minutes there.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from timing import Timer, Work, markdown, parser, started
from torch import Tensor, nn
from torch._inductor import config
from torch.profiler import ProfilerActivity, profile
from training import METHODS

from sttp_manifold.experiments.models import ResNet
from sttp_manifold.nn import compress

LONG = "ResNet-20"
# Network, size of one input, batch, rank.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, int]] = {
    "64-128-64-10": (
        lambda: nn.Sequential(
            nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
        ),
        (64,),
        64,
        4,
    ),
    "three of 512 x 512": (
        lambda: nn.Sequential(
            nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512)
        ),
        (512,),
        64,
        32,
    ),
    "four convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(8, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2048, 10),
        ),
        (8, 16, 16),
        16,
        8,
    ),
    LONG: (lambda: ResNet(20), (3, 32, 32), 8, 16),
}


def works(model: nn.Module, x: Tensor) -> tuple[Work, Work]:
    """A step without optimizer, and a forward without gradient."""
    parameters = list(model.parameters())

    def step() -> None:
        for p in parameters:
            p.grad = None
        model(x).square().mean().backward()

    @torch.no_grad()
    def forward() -> None:
        model(x)

    return step, forward


def operators(work: Work) -> int:
    """Calls of this package's operators."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        work()
    return sum(event.name.startswith("sttp_manifold") for event in recorded.events())


def rows_of(timer: Timer, name: str, method: str) -> list[str]:
    """Seconds of compiling, times in milliseconds, ratios, calls."""
    make, size, batch, rank = NETWORKS[name]
    torch.manual_seed(0)
    model, x = make(), torch.randn(batch, *size)
    how = METHODS[method]
    if how is not None:
        compress(model, rank, kind=how[0], method=how[1], init="random", grow="allow")
    eager, compiled = works(model, x), works(torch.compile(model, fullgraph=True), x)
    start = time.perf_counter()
    for work in compiled:
        work()
    compiling = time.perf_counter() - start
    for work in (*eager, *compiled) * 3:
        work()
    found = [f"{compiling:.1f}"]
    for pair in zip(eager, compiled, strict=True):
        taken = timer.compare(dict(zip(("eager", "compiled"), pair, strict=True)))
        for one in taken.values():
            assert one is not None
            found.append(f"{1e3 * one.seconds:.2f}")
        found.append(f"{one.against:.2f}")
    return [name, method, *found, str(operators(compiled[0]))]


def main() -> None:
    """Print the table."""
    options = parser(__doc__, turns=40)
    short = [name for name in NETWORKS if name != LONG]
    options.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=short)
    options.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    arguments = options.parse_args()
    timer = started(arguments)
    config.force_disable_caches = True
    rows = []
    for name in arguments.networks:
        for method in arguments.methods:
            torch._dynamo.reset()
            rows.append(rows_of(timer, name, method))
            print(" | ".join(rows[-1]), flush=True)
    header = ["network", "held as", "compiling, s", "step: eager, ms", "compiled, ms", "of eager",
              "forward: eager, ms", "compiled, ms", "of eager", "operators in a step"]  # fmt: skip
    print("\n" + markdown(header, rows, numbers=8))


if __name__ == "__main__":
    main()
