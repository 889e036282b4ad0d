"""Plans of maps from cores: the chosen one against the best one and against the alternatives.

For 30 linear maps every plan is timed, the plans taking turns; *regret* is the time of the plan
that the cost model chooses over that of the fastest. None of the maps is one that the constants
were fitted to. `opt_einsum` contracts the same cores with the input by its best path. For
convolutions the factorized form (`r` kernels, then a pointwise one) is held against the kernel
formed, both from formed factors.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from sttp_manifold import SpectralTT, TTShape
from sttp_manifold.tt.contract import left_matrix, right_matrix, times_bond
from sttp_manifold.tt.costs import costs
from sttp_manifold.tt.plans import conv_plan
from sttp_manifold.tt.refit import random_chain, regrets, seconds, time_plans

try:
    import opt_einsum
except ImportError:
    opt_einsum = None

LINEAR = [
    (w_out, w_in, rank, count)
    for (w_out, w_in), rank in zip(
        [(1024, 4096), (4096, 1024), (384, 384), (768, 3072), (3072, 768)] * 2,
        [16, 16, 8, 32, 64, 64, 8, 32, 12, 24],
        strict=True,
    )
    for count in (1, 32, 512)
]
# (channels, size of the image, images, rank)
CONVOLUTIONS = [
    (16, 32, 16, 16), (32, 16, 16, 16), (64, 8, 16, 64), (64, 32, 8, 16), (128, 16, 8, 64),
    (256, 8, 8, 64), (512, 8, 4, 64), (512, 16, 2, 64), (640, 8, 4, 64), (640, 8, 4, 16),
]  # fmt: skip


def geometric(values: list[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def path_of(tt: SpectralTT, count: int) -> Callable[..., torch.Tensor]:
    """The best path of `opt_einsum` for ``x W^T`` from cores."""
    letter = opt_einsum.get_symbol
    cores = len(tt.left) + len(tt.right)
    bonds, modes = [letter(k) for k in range(cores + 1)], [letter(100 + k) for k in range(cores)]
    terms = [a + m + b for a, m, b in zip(bonds[:-1], modes, bonds[1:], strict=True)]
    split = len(tt.left)
    terms.insert(split, bonds[split])
    equation = f"{','.join(terms)},{letter(99)}{''.join(modes[split:])}"
    equation += f"->{letter(99)}{''.join(modes[:split])}"
    sizes = [tuple(t.shape) for t in (*tt.left, tt.spectrum, *tt.right)]
    vectors = (count, *(core.shape[-2] for core in tt.right))
    # The ends of the chain have rank one and are summed over.
    return opt_einsum.contract_expression(equation, *sizes, vectors, optimize="dp")


def einsum_seconds(place: tuple[int, int, int, int], turns: int, backward: bool, clock) -> tuple:
    """Seconds of our matvec and of opt_einsum, in turn."""
    d_out, d_in, rank, count = place
    tt = random_chain(TTShape.for_matrix(d_out, d_in, rank), torch.float32, "cpu")
    x = torch.randn(count, d_in)
    leaves = [*tt.left, tt.spectrum, *tt.right, x]
    for leaf in leaves:
        leaf.requires_grad_(backward)
    path = path_of(tt, count)
    shaped = (count, *(core.shape[-2] for core in tt.right))

    def ours() -> torch.Tensor:
        return tt.matvec(x)

    def theirs() -> torch.Tensor:
        return path(*leaves[:-1], x.reshape(shaped)).reshape(count, d_out)

    largest = float(ours().detach().abs().max())
    torch.testing.assert_close(ours(), theirs(), rtol=0, atol=1e-4 * largest)

    def step(f: Callable[[], torch.Tensor]) -> None:
        y = f()
        if backward:
            torch.autograd.grad(y, leaves, torch.ones_like(y))

    best = {ours: math.inf, theirs: math.inf}
    for _ in range(turns + 1):
        for f in best:
            best[f] = min(best[f], seconds(lambda f=f: step(f), clock))
    return best[ours], best[theirs]


def bench_linear(turns: int, clock: Callable[[], float]) -> None:
    for backward in (False, True):
        timed = [
            t
            for place in LINEAR
            for t in time_plans(place, repeats=turns, backward=backward, clock=clock)
        ]
        found = regrets(timed, costs())
        ratios = list(found.values())
        worst = max(found, key=found.__getitem__)
        what = "forward + backward" if backward else "forward"
        print(f"linear, {what}: regret over {len(ratios)} maps: geometric mean "
              f"{geometric(ratios):.3f}, median {statistics.median(ratios):.3f}, worst "
              f"{max(ratios):.2f} at {worst}")  # fmt: skip
        dense = []
        for place in LINEAR:
            plans = [t for t in timed if t.place == place]
            chosen = min(plans, key=lambda t: t.work.cost(costs()))
            dense += [next(t for t in plans if t.plan.name == "dense").seconds / chosen.seconds]
        print(f"    forming W costs {geometric(dense):.2f}x of the chosen plan")
        if opt_einsum is None:
            print("    opt_einsum is not installed")
            continue
        pairs = [einsum_seconds(place, turns, backward, clock) for place in LINEAR]
        einsum = [theirs / ours for ours, theirs in pairs]
        print(f"    opt_einsum's best path costs {geometric(einsum):.2f}x (least "
              f"{min(einsum):.2f}, median {statistics.median(einsum):.2f})")  # fmt: skip


def bench_convolutions(turns: int, clock: Callable[[], float]) -> None:
    print(
        "\n| convolution | chosen | factorized, against W formed | regret |",
        "| --- | --- | --- | --- |",
        sep="\n",
    )
    regret = []
    for channels, size, images, rank in CONVOLUTIONS:
        shape = TTShape.for_conv((channels, channels, 3, 3), rank)
        tt = random_chain(shape, torch.float32, "cpu")
        us = times_bond(left_matrix(tt.left), tt.spectrum, 0).requires_grad_()
        vt = right_matrix(tt.right).requires_grad_()
        x = torch.randn(images, channels, size, size, requires_grad=True)

        def dense(us=us, vt=vt, x=x, channels=channels) -> torch.Tensor:
            kernel = (us @ vt).reshape(channels, channels, 3, 3)
            return nn.functional.conv2d(x, kernel, padding=1)

        def factorized(us=us, vt=vt, x=x, channels=channels) -> torch.Tensor:
            z = nn.functional.conv2d(x, vt.reshape(-1, channels, 3, 3), padding=1)
            return nn.functional.conv2d(z, us[..., None, None])

        largest = float(dense().detach().abs().max())
        torch.testing.assert_close(dense(), factorized(), rtol=0, atol=1e-4 * largest)
        best = {dense: math.inf, factorized: math.inf}
        for _ in range(turns + 1):
            for f in best:

                def step(f=f, us=us, vt=vt, x=x) -> None:
                    y = f()
                    torch.autograd.grad(y, (us, vt, x), torch.ones_like(y))

                best[f] = min(best[f], seconds(step, clock))
        chosen = conv_plan(shape, images * size * size)
        mine = best[dense] if chosen == "dense" else best[factorized]
        regret.append(mine / min(best.values()))
        label = f"{channels} channels, {images} x {size} x {size}, rank {rank}"
        print(f"| {label} | {chosen} | {best[dense] / best[factorized]:.2f}x | {regret[-1]:.2f} |")
    print(
        "\nconvolutions, forward + backward: regret "
        f"{geometric(regret):.3f}, worst {max(regret):.2f}"
    )


def main() -> None:
    """Print everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=7, help="times that each plan runs")
    parser.add_argument("--threads", type=int, default=1, help="threads that torch may use")
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: one thread, busy machine"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    clock = time.perf_counter if arguments.clock == "wall" else time.process_time
    about = f"{arguments.threads} thread(s), {arguments.clock} clock, {costs()}"
    print(f"torch {torch.__version__}, {about}\n")
    bench_linear(arguments.turns, clock)
    bench_convolutions(arguments.turns, clock)


if __name__ == "__main__":
    main()
