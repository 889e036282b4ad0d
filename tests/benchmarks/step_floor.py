"""The arithmetic of a Riemannian step alone, beside a step of torch's Adam on the same frames.

A step projects the gradient, moves to the nearest frame and carries the momentum along: two
products of the size of a frame each, six in all. A second moment of entries has its quotient
projected too, which makes eight. Here they run on stacks that lie ready, into memory that is there;
then with what no step goes without beside them: points and gradients are joined, the moments and
the point take a pass each, and points are put back.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import NamedTuple

import torch
from steps import LAYERS, RANK, with_gradients
from timing import cells, markdown, parser, started
from torch import Tensor

from sttp_manifold import TTShape

# How many products each kind of second moment takes.
PRODUCTS = {"frame": 6, "elementwise": 8}


class Stack(NamedTuple):
    """Frames of one shape, as parameters and as one batch."""

    frames: list[Tensor]
    gradients: list[Tensor]
    X: Tensor
    G: Tensor
    S: Tensor
    momentum: Tensor
    second: Tensor


def frame_shapes() -> Counter[tuple[int, int]]:
    """How often each shape of frames occurs in ResNet-32."""
    plans = [TTShape.for_conv(kernel, rank=RANK).merged for kernel, n in LAYERS for _ in range(n)]
    return Counter(shape for plan in plans for shape in plan.frame_shapes)


def stack(n: int, d: int, r: int) -> Stack:
    """Orthonormal frames, so that repeated products stay bounded."""
    X, G = torch.linalg.qr(torch.randn(n, d, r))[0], torch.randn(n, d, r)
    frames, gradients = [list(each.clone().unbind()) for each in (X, G)]
    zeros = torch.zeros(n, d, r)
    return Stack(frames, gradients, X, G, torch.empty(n, r, r), zeros, zeros.clone())


def multiply(X: Tensor, G: Tensor, S: Tensor, many: int) -> None:
    """``X^T G`` and ``X S`` in turn."""
    for _ in range(many // 2):
        torch.bmm(X.mT, G, out=S)
        torch.bmm(X, S, out=G)


def products(stacks: list[Stack], many: int) -> None:
    """So many products of every stack."""
    for one in stacks:
        multiply(one.X, one.G, one.S, many)


def bare_step(stacks: list[Stack], many: int) -> None:
    """The same, with passes over memory as few as there can be."""
    for one in stacks:
        X, G = torch.stack(one.frames), torch.stack(one.gradients)
        multiply(X, G, one.S, many)
        one.momentum.lerp_(G, 0.1)
        if many == PRODUCTS["frame"]:
            norms = torch.linalg.vector_norm(G, dim=(1, 2), keepdim=True)
            X.addcdiv_(one.momentum, norms, value=-1e-3)
        else:
            one.second.mul_(0.999).addcmul_(G, G, value=1e-3)
            X.addcdiv_(one.momentum, one.second.sqrt().add_(1e-8), value=-1e-3)
        torch._foreach_copy_(one.frames, list(X.unbind()))


def main() -> None:
    """Print the table."""
    arguments = parser(__doc__, turns=40).parse_args()
    timer = started(arguments)
    shapes = frame_shapes()
    plain = [torch.nn.Parameter(torch.randn(size)) for size in shapes.elements()]
    adam = torch.optim.Adam(with_gradients(plain), lr=1e-3, foreach=True)
    stacks = [stack(n, d, r) for (d, r), n in shapes.items()]
    competitors = {"torch Adam(foreach=True), no constraint": adam.step}
    for kind, many in PRODUCTS.items():
        competitors[f'{many} products, second_moment="{kind}"'] = partial(products, stacks, many)
        competitors[f"{many} products and passes"] = partial(bare_step, stacks, many)
    numbers = sum(p.numel() for p in plain)
    print(f"{len(plain)} frames of ResNet-32 at rank {RANK}, {numbers:,} numbers")
    print(markdown(["who", "median ms", "of Adam"], cells(timer.compare(competitors)), numbers=2))


if __name__ == "__main__":
    main()
