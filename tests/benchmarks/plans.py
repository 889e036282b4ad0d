"""Plans of maps from cores: the chosen one against the best one and against the alternatives.

For 30 linear maps every plan is timed, the plans taking turns; *regret* is the time of the plan
that the cost model chooses over that of the fastest. None of the maps is one that the constants
were fitted to. `opt_einsum` contracts the same cores with the input by its best path. For
convolutions the factorized form (`r` kernels, then a pointwise one) is held against the kernel
formed, both from formed factors. Inference is a linear layer without gradient against a dense one:
as it is, with its weight formed in each forward, and as the two thin stock layers that
`decompress(form="factors")` gives.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from peers import peer
from timing import Comparison, Timer, Work, geometric, markdown, parser, started
from torch import nn

from sttp_manifold import SpectralTT, TTShape
from sttp_manifold.nn import SpectralLinear, decompress
from sttp_manifold.tt.contract import left_matrix, right_matrix, times_bond
from sttp_manifold.tt.cost_model import costs
from sttp_manifold.tt.plans import conv_plan
from sttp_manifold.tt.refit_costs import random_chain, regrets, time_plans

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


# (width, rank, vectors)
INFERENCE = [
    (width, rank, count) for width in (1024, 4096) for rank in (16, 64) for count in (1, 32, 512)
]
MATVEC, EINSUM = "SpectralTT.matvec", "opt_einsum, best path"
FORMED, FACTORIZED = "W formed", "factorized"
THIN, DENSE = 'decompress(form="factors")', "nn.Linear"
COLUMNS = f"{THIN}, weights stored by columns"
LAYER = "SpectralLinear"


class LinearCase(NamedTuple):
    """One map from cores: how far the chosen plan is from the best, and the alternative's time.

    Attributes:
        place: ``(d_out, d_in, rank, vectors)``.
        regret: time of the chosen plan over that of the fastest.
        dense: time of forming ``W`` over that of the chosen plan.
        measured: our matvec and `opt_einsum`'s best path.
    """

    place: tuple[int, int, int, int]
    regret: float
    dense: float
    measured: Comparison


class ConvCase(NamedTuple):
    """One convolution: which plan is chosen, and both timed."""

    channels: int
    size: int
    images: int
    rank: int
    chosen: str
    measured: Comparison

    @property
    def label(self) -> str:
        image = f"{self.images} x {self.size} x {self.size}"
        return f"{self.channels} channels, {image}, rank {self.rank}"

    @property
    def gain(self) -> float:
        """Time with ``W`` formed over that of the factorized plan."""
        return self.measured[FORMED].against

    @property
    def chosen_gain(self) -> float:
        """Time with ``W`` formed over that of the chosen plan."""
        return self.gain if self.chosen == "factorized" else 1.0

    @property
    def regret(self) -> float:
        return max(self.gain, 1.0) / self.chosen_gain


def path_of(module, tt: SpectralTT, count: int) -> Callable[..., torch.Tensor]:
    """The best path of `opt_einsum` for ``x W^T`` from cores."""
    letter = module.get_symbol
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
    return module.contract_expression(equation, *sizes, vectors, optimize="dp")


def matvec_case(place: tuple[int, int, int, int], backward: bool, timer: Timer) -> Comparison:
    """Our matvec and opt_einsum's, in turn."""
    d_out, d_in, rank, count = place
    tt = random_chain(TTShape.for_matrix(d_out, d_in, rank), torch.float32, "cpu")
    x = torch.randn(count, d_in)
    leaves = [*tt.left, tt.spectrum, *tt.right, x]
    for leaf in leaves:
        leaf.requires_grad_(backward)

    def ours() -> torch.Tensor:
        return tt.matvec(x)

    def work(f: Callable[[], torch.Tensor]) -> Work:
        def step() -> None:
            y = f()
            if backward:
                torch.autograd.grad(y, leaves, torch.ones_like(y))

        return step

    competitors: dict[str, Work | None] = {MATVEC: work(ours), EINSUM: None}
    module = peer("opt_einsum")
    if module is not None:
        path = path_of(module, tt, count)
        shaped = (count, *(core.shape[-2] for core in tt.right))

        def theirs() -> torch.Tensor:
            return path(*leaves[:-1], x.reshape(shaped)).reshape(count, d_out)

        largest = float(ours().detach().abs().max())
        torch.testing.assert_close(ours(), theirs(), rtol=0, atol=1e-4 * largest)
        competitors[EINSUM] = work(theirs)
    return timer.compare(competitors)


def linear_cases(
    timer: Timer, backward: bool, maps: Sequence[tuple[int, int, int, int]] = tuple(LINEAR)
) -> Iterator[LinearCase]:
    """Every plan of each map, and the alternative."""
    for place in maps:
        plans = time_plans(place, repeats=timer.turns, backward=backward, clock=timer.clock)
        (regret,) = regrets(plans, costs()).values()
        chosen = min(plans, key=lambda t: t.work.cost(costs())).seconds
        dense = next(t for t in plans if t.plan.name == "dense").seconds / chosen
        yield LinearCase(place, regret, dense, matvec_case(place, backward, timer))


def conv_cases(
    timer: Timer,
    backward: bool,
    convolutions: Sequence[tuple[int, int, int, int]] = tuple(CONVOLUTIONS),
) -> Iterator[ConvCase]:
    """Each convolution with its kernel formed, and factorized."""
    for channels, size, images, rank in convolutions:
        shape = TTShape.for_conv((channels, channels, 3, 3), rank)
        tt = random_chain(shape, torch.float32, "cpu")
        us = times_bond(left_matrix(tt.left), tt.spectrum, 0).requires_grad_(backward)
        vt = right_matrix(tt.right).requires_grad_(backward)
        x = torch.randn(images, channels, size, size, requires_grad=backward)

        def dense(us=us, vt=vt, x=x, channels=channels) -> torch.Tensor:
            kernel = (us @ vt).reshape(channels, channels, 3, 3)
            return nn.functional.conv2d(x, kernel, padding=1)

        def factorized(us=us, vt=vt, x=x, channels=channels) -> torch.Tensor:
            z = nn.functional.conv2d(x, vt.reshape(-1, channels, 3, 3), padding=1)
            return nn.functional.conv2d(z, us[..., None, None])

        def step(f: Callable[[], torch.Tensor], us=us, vt=vt, x=x) -> None:
            y = f()
            if backward:
                torch.autograd.grad(y, (us, vt, x), torch.ones_like(y))

        largest = float(dense().detach().abs().max())
        torch.testing.assert_close(dense(), factorized(), rtol=0, atol=1e-4 * largest)
        works = {FACTORIZED: lambda: step(factorized), FORMED: lambda: step(dense)}
        chosen = conv_plan(shape, images * size * size)
        yield ConvCase(channels, size, images, rank, chosen, timer.compare(works))


def inference_case(width: int, rank: int, count: int, timer: Timer) -> Comparison:
    """A linear layer without gradient: as it is, as two thin stock layers, and dense.

    Weights stored by columns (docs/training.md): one vector is multiplied by them sooner.
    """
    layer = SpectralLinear(width, width, rank, init="random")
    dense = nn.Linear(width, width)
    x = torch.randn(count, width)
    thin = decompress(copy.deepcopy(layer), form="factors")
    with torch.no_grad():
        dense.weight.copy_(layer.spectral_weight())
        dense.bias.copy_(layer.bias)
    columns = copy.deepcopy(thin)
    for module in columns.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = module.weight.data.t().contiguous().t()
    works: dict[str, Callable[[], torch.Tensor]] = {
        THIN: lambda: thin(x),
        COLUMNS: lambda: columns(x),
        LAYER: lambda: layer(x),
        DENSE: lambda: dense(x),
    }
    with torch.inference_mode():
        for name in (THIN, COLUMNS, LAYER):
            torch.testing.assert_close(works[name](), dense(x), rtol=0, atol=1e-4)
        return timer.compare(works)


def bench_linear(timer: Timer) -> None:
    """Regrets and the alternative over all maps."""
    for backward in (False, True):
        cases = list(linear_cases(timer, backward))
        what = "forward + backward" if backward else "forward"
        ratios = [case.regret for case in cases]
        worst = max(cases, key=lambda case: case.regret)
        print(f"linear, {what}: regret over {len(cases)} maps: geometric mean "
              f"{geometric(ratios):.3f}, median {statistics.median(ratios):.3f}, worst "
              f"{worst.regret:.2f} at {worst.place}")  # fmt: skip
        print(
            f"    forming W costs {geometric(case.dense for case in cases):.2f}x of the chosen plan"
        )
        einsum = [m.against for case in cases if (m := case.measured[EINSUM]) is not None]
        if not einsum:
            print("    opt_einsum is not installed")
            continue
        print(f"    opt_einsum's best path costs {geometric(einsum):.2f}x (least "
              f"{min(einsum):.2f}, median {statistics.median(einsum):.2f})")  # fmt: skip


def bench_convolutions(timer: Timer) -> None:
    """The table of convolutions, forward + backward."""
    cases = list(conv_cases(timer, backward=True))
    rows = [[c.label, c.chosen, f"{c.gain:.2f}x", f"{c.regret:.2f}"] for c in cases]
    header = ["convolution", "chosen", "factorized, against W formed", "regret"]
    print(f"\n{markdown(header, rows, numbers=2)}")
    regret = [case.regret for case in cases]
    print(
        "\nconvolutions, forward + backward: regret "
        f"{geometric(regret):.3f}, worst {max(regret):.2f}"
    )


def bench_inference(timer: Timer) -> None:
    """The table of linear layers in inference."""
    rows = []
    for width, rank, count in INFERENCE:
        measured = inference_case(width, rank, count, timer)
        label = f"{width} x {width}, rank {rank}, batch {count}"
        ours = (THIN, COLUMNS, LAYER)
        gains = [measured[DENSE].against / measured[name].against for name in ours]
        rows.append([label, *(f"{gain:.2f}x" for gain in gains)])
    header = ["inference: nn.Linear against", THIN, COLUMNS, LAYER]
    print(f"\n{markdown(header, rows, numbers=4)}")


def main() -> None:
    """Print everything."""
    arguments = parser(__doc__, turns=7).parse_args()
    timer = started(arguments)
    print(f"{costs()}\n")
    bench_linear(timer)
    bench_convolutions(timer)
    bench_inference(timer)


if __name__ == "__main__":
    main()
