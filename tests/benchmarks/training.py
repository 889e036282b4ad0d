"""The training step of a whole network: dense, and compressed by each method.

Beside the time stand the floating-point operations of the same step, as torch's counter finds them:
matrix products, convolutions, triangular solves and Cholesky factorizations, forward, backward and
optimizer; a multiplication and an addition count as two, what goes element by element as nothing.

*Plain factors* are two matrices of the same rank as free parameters, applied by the same plan: the
same arithmetic without frames. What a chart or a manifold costs is what it takes beyond them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from timing import Timer, Work, markdown, parser, started
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sttp_manifold.experiments.models import ResNet
from sttp_manifold.nn import SpectralLayer, compress
from sttp_manifold.optim import RiemannianAdam

# Kind and way of holding; a dense network is left as it is.
METHODS: dict[str, tuple[str, str] | None] = {
    "dense": None,
    "SVDP chart": ("svdp", "householder"),
    "SVDP Riemannian": ("svdp", "riemannian"),
    "STTP chart": ("sttp", "householder"),
    "STTP Riemannian": ("sttp", "riemannian"),
}
PLAIN = "plain factors"


class Factors(nn.Module):
    """A product of two matrices in the place of a spectral weight."""

    def __init__(self, weight: nn.Module) -> None:
        super().__init__()
        self.shape = weight.shape
        self.us, self.vt = map(nn.Parameter, weight.factors())

    def forward(self) -> Tensor:
        return self.us @ self.vt

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.us, self.vt

    def row_factors(self) -> tuple[Tensor, Tensor]:
        return self.vt.t(), self.us.t()


def mlp(narrow: int = 1024, wide: int = 4096) -> nn.Module:
    """Widths 1024, 4096, 1024, and ten classes."""
    return nn.Sequential(
        nn.Linear(narrow, wide),
        nn.ReLU(),
        nn.Linear(wide, narrow),
        nn.ReLU(),
        nn.Linear(narrow, 10),
    )


# Network, size of one input, batch, rank.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, int]] = {
    "ResNet-20, 32 x 32 images, batch 64, rank 16": (lambda: ResNet(20), (3, 32, 32), 64, 16),
    "MLP 1024-4096-1024, batch 128, rank 64": (mlp, (1024,), 128, 64),
}
SMALL: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, int]] = {
    "MLP 32-64-32, batch 8, rank 4": (lambda: mlp(32, 64), (32,), 8, 4)
}


def converted(model: nn.Module, method: str, rank: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The network as a method holds it, and the method's optimizer."""
    if method == PLAIN:
        model = compress(model, rank, kind="svdp", init="random", grow="allow", together=False)
        for layer in model.modules():
            if isinstance(layer, SpectralLayer):
                layer.spectral_weight = Factors(layer.spectral_weight)
        return model, torch.optim.Adam(model.parameters(), lr=1e-3, foreach=True)
    how = METHODS[method]
    if how is None:
        return model, torch.optim.Adam(model.parameters(), lr=1e-3, foreach=True)
    kind, held = how
    model = compress(model, rank, kind=kind, method=held, init="random", grow="allow")
    if held == "riemannian":
        return model, RiemannianAdam(model.parameters(), lr=1e-3, second_moment="frame")
    return model, torch.optim.Adam(model.parameters(), lr=1e-3, foreach=True)


def training_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> Work:
    """Forward, backward and the optimizer's step, towards classes or, if there are none, zero."""
    labels = torch.randint(10, x.shape[:1])

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        y = model(x)
        classes = y.shape[-1] == 10
        loss = nn.functional.cross_entropy(y, labels) if classes else y.square().mean()
        loss.backward()
        optimizer.step()

    step()  # weights are computed together from the second forward on, and Adam makes its state
    return step


def _solve(A: Sequence[int], B: Sequence[int], *args: object, **kwargs: object) -> int:
    return math.prod(B) * A[-1]


def _cholesky(A: Sequence[int], *args: object, **kwargs: object) -> int:
    return math.prod(A) * A[-1] // 3


def _added(
    C: Sequence[int], A: Sequence[int], B: Sequence[int], *args: object, **kw: object
) -> int:
    return 2 * math.prod(A) * B[-1]


def flops(work: Work) -> int:
    """Floating-point operations of one call, as the docstring of this module counts them."""
    aten = torch.ops.aten
    more = {
        aten.linalg_solve_triangular: _solve,
        aten.linalg_cholesky_ex: _cholesky,
        aten.baddbmm_: _added,
        aten.addmm_: _added,
    }
    with FlopCounterMode(display=False, custom_mapping=more) as counter:
        work()
    return counter.get_total_flops()


def network_cases(timer: Timer, threads: int, small: bool = False) -> list[dict[str, object]]:
    """Time and flops of each method on each network, in turn, with ratios to dense."""
    found: list[dict[str, object]] = []
    for name, (make, size, batch, rank) in (SMALL if small else NETWORKS).items():
        works: dict[str, Work | None] = {}
        counts = {}
        x = torch.randn(batch, *size)
        for method in (*METHODS, PLAIN):
            works[method] = work = training_step(*converted(make(), method, rank), x)
            counts[method] = flops(work)
            work()  # what the counter's mode kept apart is together again
        compared = timer.compare(works)
        plain = compared[PLAIN]
        for method, measured in compared.items():
            assert measured is not None
            assert plain is not None
            found.append(
                {
                    "network": name,
                    "method": method,
                    "threads": threads,
                    "turns": measured.turns,
                    "seconds": measured.seconds,
                    "flops": counts[method],
                    "time_ratio": measured.against,
                    "flop_ratio": counts[method] / counts["dense"],
                    "of_plain": measured.against / plain.against,
                }
            )
    return found


def main() -> None:
    """Print the table."""
    arguments = parser(__doc__, turns=10).parse_args()
    timer = started(arguments)
    rows = [
        [
            str(case["network"]),
            str(case["method"]),
            f"{1e3 * case['seconds']:.1f}",
            f"{case['time_ratio']:.3f}",
            f"{case['flop_ratio']:.3f}",
            f"{case['of_plain']:.3f}",
        ]
        for case in network_cases(timer, arguments.threads)
    ]
    header = ["network", "method", "median ms", "time, of dense", "flops, of dense",
              "time, of plain factors"]  # fmt: skip
    print(markdown(header, rows, numbers=4))


if __name__ == "__main__":
    main()
