"""All weights of a network, forward + backward: together, one by one, and the alternative.

The alternative makes one call of `torch-householder` for each frame shape of the network, its
parameters stacked beforehand, and contracts each chain by a cached `opt_einsum` expression. It is
given the chain twice: as the modes are written (prime factors, the published method) and merged as
this package stores it. Ratios are medians over the turns of one process; ours is 1.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sttp_manifold import TTShape
from sttp_manifold.nn import HouseholderWeight, RiemannianWeight, SpectralWeight, together

try:
    import opt_einsum
    from torch_householder import torch_householder_orgqr
except ImportError as error:
    opt_einsum = None
    MISSING = error.name

Kernels = list[tuple[int, ...]]


def resnet(depth: int) -> Kernels:
    """ResNet for 32 x 32 images (He et al. 2016), without the linear layer's few numbers."""
    kernels: Kernels = [(16, 3, 3, 3)]
    inside = 16
    for width in (16, 32, 64):
        for _ in range((depth - 2) // 6):
            kernels += [(width, inside, 3, 3), (width, width, 3, 3)]
            inside = width
    return [*kernels, (10, 64)]


def wide_resnet() -> Kernels:
    """WRN-28-10 (Zagoruyko & Komodakis 2016)."""
    kernels: Kernels = [(16, 3, 3, 3)]
    inside = 16
    for width in (160, 320, 640):
        kernels.append((width, inside, 1, 1))
        for _ in range(4):
            kernels += [(width, inside, 3, 3), (width, width, 3, 3)]
            inside = width
    return [*kernels, (10, 640)]


def sngan() -> Kernels:
    """Discriminator of SNGAN for 32 x 32 images (Miyato et al. 2018), 128 features."""
    block: Kernels = [(128, 128, 3, 3), (128, 128, 3, 3)]
    first: Kernels = [(128, 3, 3, 3), (128, 128, 3, 3), (128, 3, 1, 1)]
    return [*first, *block, (128, 128, 1, 1), *block, *block, (1, 128)]


NETWORKS: dict[str, Callable[[], Kernels]] = {
    "ResNet-20": lambda: resnet(20),
    "ResNet-32": lambda: resnet(32),
    "SNGAN-32 discriminator": sngan,
    "WRN-28-10": wide_resnet,
}


class Weights(nn.Module):
    """Nothing but the weights of a network: its forward forms all of them."""

    def __init__(self, weights: list[SpectralWeight]) -> None:
        super().__init__()
        self.weights = nn.ModuleList(weights)

    def forward(self) -> list[Tensor]:
        return [weight() for weight in self.weights]


def compare(
    competitors: dict[str, Callable[[], object]], turns: int, clock: Callable[[], float]
) -> list[list[str]]:
    """Time each competitor once a turn; the first one is what the others are held against."""
    taken: dict[str, list[float]] = {name: [] for name in competitors}
    for turn in range(turns + 2):
        for name, work in competitors.items():
            start = clock()
            work()
            if turn >= 2:  # the first turns fill caches
                taken[name].append(clock() - start)
    ours = next(iter(taken.values()))
    return [
        [
            name,
            f"{statistics.median(mine) * 1e3:.2f}",
            f"{statistics.median(t / o for t, o in zip(mine, ours, strict=True)):.2f}x",
        ]
        for name, mine in taken.items()
    ]


def step(weights: Callable[[], list[Tensor]], parameters: list[Tensor], g: list[Tensor]) -> None:
    for parameter in parameters:
        parameter.grad = None
    torch.autograd.backward(weights(), g)


class Alternative:
    """`torch-householder` a frame shape, `opt_einsum` a chain."""

    def __init__(self, shapes: list[TTShape]) -> None:
        self.shapes = shapes
        places: dict[tuple[int, int], int] = {}
        self.where = []
        for shape in shapes:
            self.where.append([((d, r), _next(places, (d, r))) for d, r in shape.frame_shapes])
        self.parameters = {
            (d, r): (torch.randn(count, d, r).tril(-1) / d**0.5).requires_grad_()
            for (d, r), count in places.items()
        }
        self.spectra = [torch.ones(shape.rank, requires_grad=True) for shape in shapes]
        self.paths = [self._path(shape) for shape in shapes]

    @staticmethod
    def _path(shape: TTShape) -> Callable[..., Tensor]:
        bonds = [opt_einsum.get_symbol(k) for k in range(len(shape.ranks))]
        modes = [opt_einsum.get_symbol(100 + k) for k in range(len(shape.ranks) - 1)]
        split = len(shape.out_modes)
        terms = [a + m + b for a, m, b in zip(bonds[:-1], modes, bonds[1:], strict=True)]
        sizes = list(shape.core_shapes)
        terms.insert(split, bonds[split])
        spectrum = (shape.rank,)
        path = ",".join(terms) + "->" + bonds[0] + "".join(modes) + bonds[-1]
        return opt_einsum.contract_expression(path, *sizes[:split], spectrum, *sizes[split:])

    def all_parameters(self) -> list[Tensor]:
        return [*self.parameters.values(), *self.spectra]

    def __call__(self) -> list[Tensor]:
        frames = {
            key: torch_householder_orgqr(value).unbind(0) for key, value in self.parameters.items()
        }
        weights = []
        chains = zip(self.shapes, self.where, self.spectra, self.paths, strict=True)
        for shape, where, s, path in chains:
            cores = []
            split = len(shape.out_modes)
            for k, (key, place) in enumerate(where):
                frame, size = frames[key][place], shape.core_shapes[k]
                cores.append((frame if k < split else frame.mT).reshape(size))
            weights.append(path(*cores[:split], s, *cores[split:]).reshape(shape.d_out, shape.d_in))
        return weights


def _next(places: dict[tuple[int, int], int], key: tuple[int, int]) -> int:
    places[key] = places.get(key, 0) + 1
    return places[key] - 1


def bench(
    name: str, rank: int, turns: int, method: str, clock: Callable[[], float]
) -> list[list[str]]:
    """Rows of the table for one network."""
    shapes = [TTShape.for_conv(kernel, rank) for kernel in NETWORKS[name]()]
    make = {"householder": HouseholderWeight, "riemannian": RiemannianWeight}[method]
    model = Weights([make(shape, init="random") for shape in shapes])
    alone = Weights(list(model.weights))
    together(model)
    g = [torch.randn(shape.d_out, shape.d_in) for shape in shapes]
    parameters = list(model.parameters())
    competitors: dict[str, Callable[[], object]] = {
        "together": lambda: step(model, parameters, g),
        "one by one": lambda: step(alone, parameters, g),
    }
    step(model, parameters, g)
    step(model, parameters, g)
    ours = [p.grad.clone() for p in parameters]
    step(alone, parameters, g)
    for mine, p in zip(ours, parameters, strict=True):
        torch.testing.assert_close(mine, p.grad, rtol=1e-3, atol=1e-4)
    if method == "householder" and opt_einsum is not None:
        for label, chain in (("merged", [s.merged for s in shapes]), ("as written", shapes)):
            other = Alternative(chain)
            competitors[f"torch-householder + opt_einsum, {label}"] = lambda other=other: step(
                other, other.all_parameters(), g
            )
    return [[name, method, *row] for row in compare(competitors, turns, clock)]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=15, help="times that each competitor runs")
    parser.add_argument("--threads", type=int, default=1, help="threads that torch may use")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: one thread, busy machine"
    )
    arguments = parser.parse_args()
    clock = time.perf_counter if arguments.clock == "wall" else time.process_time
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print(
        f"torch {torch.__version__}, {arguments.threads} thread(s), rank {arguments.rank}, "
        f"{arguments.clock} clock, ",
        end="",
    )
    print(f"{arguments.turns} turns\n")
    if opt_einsum is None:
        print(f"not installed: {MISSING}; pip install torch-householder==1.0.1 opt_einsum\n")
    rows = [
        row
        for name in arguments.networks
        for method in ("householder", "riemannian")
        for row in bench(name, arguments.rank, arguments.turns, method, clock)
    ]
    table = [["network", "held by", "who", "median ms", "against ours"], ["---"] * 5, *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        print("| " + " | ".join(map(str.ljust, row, widths)) + " |")


if __name__ == "__main__":
    main()
