"""Frame maps and optimizer steps against the alternatives: ``make bench``.

This is not a test: it asserts that competitors compute the same, no speed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from peers import peer
from timing import Comparison, Timer, Work, cells, geometric, markdown, parser, started
from torch import Tensor

from sttp_manifold import SpectralTTManifold, TTShape
from sttp_manifold._geoopt import EuclideanStiefel, ManifoldParameter, geoopt
from sttp_manifold.experiments.models import network, weight_sizes
from sttp_manifold.frames import full_frame, full_size
from sttp_manifold.optim import RiemannianAdam

FRAMES = [
    (1, 64, 16),
    (16, 128, 32),
    (64, 128, 64),
    (16, 512, 64),
    (4, 4608, 64),
    (256, 32, 16),
]
# The weights of ResNet-32 for small images: (size, how often).
LAYERS = list(Counter(weight_sizes(network("resnet-32", device="meta"))).items())
RANK = 64


# What the tables call our own, and what the others are called.
FRAME, STEP = "full_frame", "RiemannianAdam"
LINALG, HOUSEHOLDER = "torch.linalg.householder_product", "torch-householder"


class FrameCase(NamedTuple):
    """One shape of frames, with or without gradient."""

    batch: int
    d: int
    r: int
    backward: bool
    measured: Comparison

    @property
    def label(self) -> str:
        what = "forward + backward" if self.backward else "forward"
        return f"{self.batch} x {self.d} x {self.r}, {what}"


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
    module = peer(HOUSEHOLDER)
    if module is None:
        return None
    Y = (torch.randn(g.shape) / g.shape[-2] ** 0.5).requires_grad_()
    return frame_work(lambda y, d, r: module.torch_householder_orgqr(y), Y, g, backward)


def frame_cases(
    timer: Timer,
    shapes: Sequence[tuple[int, int, int]] = tuple(FRAMES),
    leave_out: Callable[[int, int, int, bool], bool] = lambda *_: False,
) -> Iterator[FrameCase]:
    """The full Householder chart, with and without gradient.

    Args:
        timer: how to time.
        shapes: ``(batch, d, r)`` of each case.
        leave_out: of batch, d, r and backward, whether householder_product sits out.
    """
    for batch, d, r in shapes:
        x = (torch.randn(batch, full_size(d, r)) / d**0.5).requires_grad_()
        g = torch.randn(batch, d, r)
        torch.testing.assert_close(
            full_frame(x, d, r), householder_product(x, d, r), atol=1e-4, rtol=0
        )
        for backward in (False, True):
            linalg = frame_work(householder_product, x, g, backward)
            competitors: dict[str, Work | None] = {
                FRAME: frame_work(full_frame, x, g, backward),
                LINALG: None if leave_out(batch, d, r, backward) else linalg,
                HOUSEHOLDER: torch_householder_work(batch, g, backward),
            }
            yield FrameCase(batch, d, r, backward, timer.compare(competitors))


def bench_frames(timer: Timer) -> list[list[str]]:
    """Rows of the table for frames."""
    rows, gains = [], []
    for case in frame_cases(timer):
        theirs = case.measured[HOUSEHOLDER]
        if case.backward and theirs is not None:
            gains.append(theirs.against)
        rows += [[case.label, *row] for row in cells(case.measured)]
    if gains:
        mean = f"{geometric(gains):.2f}x"
        rows.append(["all, forward + backward", f"{HOUSEHOLDER}, geometric mean", "", mean])
    return rows


def with_gradients(parameters: list[Tensor]) -> list[Tensor]:
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    return parameters


def pogo_work(values: list[Tensor]) -> Work | None:
    """The peer moves stacks of frames, ``(n, d, r)``."""
    pogo = peer("pogo-torch")
    if pogo is None:
        return None
    points = [torch.nn.Parameter(v[None].clone()) for v in values]
    return pogo.POGO(with_gradients(points), pogo.base.VectorAdam(), 1e-3, rows=False).step


def adam_case(timer: Timer, layers: Sequence[tuple[tuple[int, ...], int]] = LAYERS) -> Comparison:
    """One step for all weights of a network.

    Square cores are constants that our plans leave out. geoopt and torch are given what is left,
    one by one, and then every core of the chain as it is written.
    """
    shapes = [TTShape.for_conv(kernel, rank=RANK) for kernel, count in layers for _ in range(count)]
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

    def ours(retraction: str, capturable: bool = False) -> Work:
        fresh = with_gradients([manifold.random_parameter() for manifold in manifolds])
        optimizer = RiemannianAdam(
            fresh, 1e-3, retraction=retraction, capturable=capturable, second_moment="frame"
        )
        return optimizer.step

    def one_by_one(values: list[Tensor], manifold: object) -> list[Tensor]:
        return with_gradients([ManifoldParameter(v.clone(), manifold=manifold) for v in values])

    def loose(second_moment: str) -> Work:
        params = one_by_one(frames, EuclideanStiefel())
        return RiemannianAdam(params, 1e-3, second_moment=second_moment).step

    def theirs(values: list[Tensor], manifold: object) -> Work:
        return geoopt.optim.RiemannianAdam(one_by_one(values, manifold), lr=1e-3).step

    def plain(values: list[Tensor]) -> Work:
        parameters = [torch.nn.Parameter(v.detach().clone()) for v in values]
        return torch.optim.Adam(with_gradients(parameters), lr=1e-3, foreach=True).step

    competitors: dict[str, Work | None] = {STEP: ours("newton_schulz")}
    competitors |= {
        f'{STEP}, retraction="{name}"': ours(name) for name in ("qr", "polar", "cayley", "pogo")
    }
    for kind in ("frame", "elementwise"):
        name = f'{STEP}, one parameter a frame, second_moment="{kind}"'
        competitors[name] = loose(kind)
    # Every operation that an accelerator would run, on the CPU.
    competitors[f"{STEP}, capturable=True"] = ours("newton_schulz", capturable=True)
    competitors[f'{STEP}, capturable=True, retraction="qr"'] = ours("qr", capturable=True)
    for name, values in (("frames", frames), ("cores", cores)):
        what = f"all {name}"
        competitors |= {
            f"geoopt RiemannianAdam, EuclideanStiefel, {what}": theirs(values, EuclideanStiefel()),
            f"geoopt RiemannianAdam, Stiefel(), {what}": theirs(values, geoopt.Stiefel()),
            f"torch Adam(foreach=True), no constraint, {what}": plain(values),
        }
    competitors["torch Adam(foreach=True), no constraint, one vector a weight"] = plain(points)
    competitors["pogo-torch, VectorAdam, all frames"] = pogo_work(frames)
    return timer.compare(competitors)


def bench_adam(timer: Timer) -> list[list[str]]:
    """Rows of the table for optimizer steps."""
    label = f"step, ResNet-32 at rank {RANK}"
    return [[label, *row] for row in cells(adam_case(timer))]


PARTS = {"adam": bench_adam, "frames": bench_frames}


def main() -> None:
    """Print the table."""
    options = parser(__doc__, turns=20)
    options.add_argument("parts", nargs="*", default=list(PARTS), help=f"of {', '.join(PARTS)}")
    arguments = options.parse_args()
    timer = started(arguments)
    rows = [row for part in arguments.parts for row in PARTS[part](timer)]
    print(markdown(["what", "who", "median ms", "against ours"], rows, numbers=2))


if __name__ == "__main__":
    main()
