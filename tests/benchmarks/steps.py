"""Frame maps and optimizer steps against the alternatives: ``make bench``.

Competitors take turns in one process, so that what slows the machine slows all of them; the table
shows medians, and the median of the ratios within a turn. Ratios carry over to other machines,
milliseconds do not. This is not a test: it asserts that competitors compute the same, no speed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from sttp_manifold import SpectralTTManifold, TTShape
from sttp_manifold._geoopt import EuclideanStiefel, ManifoldParameter, geoopt
from sttp_manifold.frames import full_frame, full_size
from sttp_manifold.optim import RiemannianAdam

try:
    from torch_householder import torch_householder_orgqr
except ImportError:  # builds from its sdist with a compiler; the table says that it is absent
    torch_householder_orgqr = None

try:
    from pogo import POGO, base
except ImportError:  # pogo-torch
    POGO = None

Work = Callable[[], object]

FRAMES = [
    (1, 64, 16),
    (16, 128, 32),
    (64, 128, 64),
    (16, 512, 64),
    (4, 4608, 64),
    (256, 32, 16),
]
# What a competitor does in one turn takes at least that long, so that the one who comes first
# does not pay alone for the caches that the last one left.
AT_LEAST = 2e-3
# Seconds after which a competitor sits out the turns that remain.
AT_MOST = 2.0
# Wall time unless --cpu-time: on a machine that others use as well, what they take is no cost.
clock = time.perf_counter
# The convolutions of ResNet-32 for small images: (kernel, how often).
LAYERS = [
    ((16, 3, 3, 3), 1),
    ((16, 16, 3, 3), 10),
    ((32, 16, 3, 3), 1),
    ((32, 32, 3, 3), 9),
    ((64, 32, 3, 3), 1),
    ((64, 64, 3, 3), 9),
]
RANK = 64


def compare(competitors: dict[str, Work | None], turns: int) -> list[list[str]]:
    """Time each competitor once a turn; the first one is what the others are held against.

    A competitor that is None is not installed.
    """
    present = {name: work for name, work in competitors.items() if work is not None}
    seconds: dict[str, list[float]] = {name: [] for name in present}
    repeats = {}
    for name, work in present.items():
        for _ in range(2):
            start = clock()
            work()
            taken = clock() - start
            if taken > AT_MOST:
                break
        repeats[name] = 1 + int(AT_LEAST / max(taken, 1e-7))
    for turn in range(turns):
        for name, work in present.items():
            if turn and sum(seconds[name]) * repeats[name] > AT_MOST:
                continue
            start = clock()
            for _ in range(repeats[name]):
                work()
            seconds[name].append((clock() - start) / repeats[name])
    ours = next(iter(seconds.values()))
    rows = []
    for name in competitors:
        if name not in seconds:
            rows.append([name, "not installed", ""])
            continue
        ratio = statistics.median(t / o for t, o in zip(seconds[name], ours, strict=False))
        rows.append([name, f"{statistics.median(seconds[name]) * 1e3:.3f}", f"{ratio:.2f}x"])
    return rows


def householder_product(parameters: Tensor, d: int, r: int) -> Tensor:
    """The same frame by `torch.linalg.householder_product`."""
    split = r * (r - 1) // 2
    rows, columns = torch.tril_indices(r, r, -1)
    top = parameters.new_zeros(*parameters.shape[:-1], r, r)
    top[..., rows, columns] = parameters[..., :split]
    Y = torch.cat((top, parameters[..., split:].unflatten(-1, (d - r, r))), -2)
    return torch.linalg.householder_product(Y, 2 / (1 + Y.square().sum(-2)))


def frame_work(chart: Callable[..., Tensor], x: Tensor, g: Tensor, backward: bool) -> Work:
    d, r = g.shape[-2:]

    def work() -> None:
        if backward:
            torch.autograd.grad(chart(x, d, r), x, g)
        else:
            with torch.no_grad():
                chart(x, d, r)

    return work


def torch_householder_work(batch: int, g: Tensor, backward: bool) -> Work | None:
    """The peer takes a ``d x r`` matrix and reads its lower part: it has nothing to unpack."""
    if torch_householder_orgqr is None:
        return None
    Y = (torch.randn(g.shape) / g.shape[-2] ** 0.5).requires_grad_()
    return frame_work(lambda y, d, r: torch_householder_orgqr(y), Y, g, backward)


def bench_frames(turns: int) -> list[list[str]]:
    """The full Householder chart, with and without gradient."""
    rows, gains = [], []
    for batch, d, r in FRAMES:
        x = (torch.randn(batch, full_size(d, r)) / d**0.5).requires_grad_()
        g = torch.randn(batch, d, r)
        torch.testing.assert_close(
            full_frame(x, d, r), householder_product(x, d, r), atol=1e-4, rtol=0
        )
        for backward in (False, True):
            label = f"{batch} x {d} x {r}, forward" + (" + backward" if backward else "")
            competitors = {
                "full_frame": frame_work(full_frame, x, g, backward),
                "torch.linalg.householder_product": frame_work(householder_product, x, g, backward),
                "torch-householder": torch_householder_work(batch, g, backward),
            }
            measured = compare(competitors, turns)
            if backward and measured[-1][-1]:
                gains.append(float(measured[-1][-1].rstrip("x")))
            rows += [[label, *row] for row in measured]
    if gains:
        mean = f"{statistics.geometric_mean(gains):.2f}x"
        rows.append(["all, forward + backward", "torch-householder, geometric mean", "", mean])
    return rows


def with_gradients(parameters: list[Tensor]) -> list[Tensor]:
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    return parameters


def pogo_work(values: list[Tensor]) -> Work | None:
    """The peer moves stacks of frames, ``(n, d, r)``."""
    if POGO is None:
        return None
    points = [torch.nn.Parameter(v[None].clone()) for v in values]
    return POGO(with_gradients(points), base.VectorAdam(), 1e-3, rows=False).step


def bench_adam(turns: int) -> list[list[str]]:
    """One step for all weights of a network.

    Square cores are constants that our plans leave out. geoopt and torch are given what is left,
    one by one, and then every core of the chain as it is written.
    """
    shapes = [TTShape.for_conv(kernel, rank=RANK) for kernel, count in LAYERS for _ in range(count)]
    manifolds = [SpectralTTManifold(shape) for shape in shapes]
    points = [manifold.random_parameter() for manifold in manifolds]
    frames = [
        frame.detach().clone()
        for manifold, point in zip(manifolds, points, strict=True)
        for frame in manifold.unpack(point).core_frames()
    ]
    sizes = [
        (a * n, b) if k < len(shape.out_modes) else (n * b, a)
        for shape in shapes
        for k, (a, n, b) in enumerate(shape.core_shapes)
    ]
    cores = [torch.linalg.qr(torch.randn(d, r))[0] for d, r in sizes]

    def ours(retraction: str) -> Work:
        fresh = [manifold.random_parameter() for manifold in manifolds]
        return RiemannianAdam(with_gradients(fresh), lr=1e-3, retraction=retraction).step

    def theirs(values: list[Tensor], manifold: object) -> Work:
        one_by_one = [ManifoldParameter(v.clone(), manifold=manifold) for v in values]
        return geoopt.optim.RiemannianAdam(with_gradients(one_by_one), lr=1e-3).step

    def plain(values: list[Tensor]) -> Work:
        parameters = [torch.nn.Parameter(v.detach().clone()) for v in values]
        return torch.optim.Adam(with_gradients(parameters), lr=1e-3, foreach=True).step

    competitors: dict[str, Work | None] = {"RiemannianAdam": ours("newton_schulz")}
    competitors |= {
        f'retraction="{name}"': ours(name) for name in ("qr", "polar", "cayley", "pogo")
    }
    for name, values in (("frames", frames), ("cores", cores)):
        what = f"{len(values)} {name}"
        competitors |= {
            f"geoopt RiemannianAdam, EuclideanStiefel, {what}": theirs(values, EuclideanStiefel()),
            f"geoopt RiemannianAdam, Stiefel(), {what}": theirs(values, geoopt.Stiefel()),
            f"torch Adam(foreach=True), no constraint, {what}": plain(values),
        }
    competitors[f"torch Adam(foreach=True), no constraint, {len(points)} vectors"] = plain(points)
    competitors[f"pogo-torch, VectorAdam, {len(frames)} frames"] = pogo_work(frames)
    label = f"step, ResNet-32 at rank {RANK}, {len(points)} weights"
    return [[label, *row] for row in compare(competitors, turns)]


PARTS = {"adam": bench_adam, "frames": bench_frames}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=20, help="times that each competitor runs")
    parser.add_argument("--threads", type=int, default=1, help="threads that torch may use")
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--cpu-time", action="store_true", help="count the time of this process")
    arguments = parser.parse_args()
    global clock
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    rows = [row for part in arguments.parts for row in PARTS[part](arguments.turns)]
    print(f"torch {torch.__version__}, {arguments.threads} thread(s), {arguments.turns} turns\n")
    table = [["what", "who", "median ms", "against ours"], ["---"] * 4, *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        print("| " + " | ".join(map(str.ljust, row, widths)) + " |")


if __name__ == "__main__":
    main()
