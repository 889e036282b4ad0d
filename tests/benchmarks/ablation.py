"""What each part of forming all weights together brings, and how many calls it takes.

From one weight after another, over the frames of all as one batch with the chains of each weight
apart, to chains that share their products as well. Calls are those of ATen in a forward and
backward pass, which do not depend on the machine.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from networks import NETWORKS, step
from timing import Comparison, Timer, Work, markdown, parser, started
from torch import Tensor, nn

from sttp_manifold import TTShape
from sttp_manifold.experiments.models import network, weight_sizes
from sttp_manifold.nn import SpectralWeight, make_weight
from sttp_manifold.nn.batch_plan import Plan
from sttp_manifold.nn.chain_forest import Half
from sttp_manifold.nn.frame_batch import Wanted, form

sys.path.append(str(Path(__file__).parents[1]))
from calls import counted

ALONE, FRAMES, SHARED = "one by one", "frames as one batch", "and chains that share products"
DIGITS = "digits network"


class ChainsApart(Plan):
    """A plan in which no two weights share a product of their chains."""

    def _halves(self, i: int) -> list[Half]:
        halves = super()._halves(i)
        return [half._replace(keys=tuple((i, key) for key in half.keys)) for half in halves]


def shapes_of(name: str, rank: int) -> list[TTShape]:
    """Plans of the weights of a network."""
    if name == DIGITS:
        return [TTShape.for_matrix(*size, rank=rank) for size in ((128, 64), (64, 128), (10, 64))]
    sizes = weight_sizes(network(NETWORKS[name], device="meta"))
    return [TTShape.for_weight(size, rank) for size in sizes]


def together_by(kind: type[Plan], weights: Sequence[SpectralWeight]) -> Callable[[], list[Tensor]]:
    """Form weights by a plan of a kind."""
    layouts = [weight.layout for weight in weights]
    assert None not in layouts
    plan = kind(layouts, ["dense"] * len(weights), torch.float32, torch.device("cpu"))

    def formed() -> list[Tensor]:
        found, _ = form(plan, [Wanted(w._tensors(), w._in_form) for w in weights])
        return [parts[0] for parts in found]

    return formed


def works_of(name: str, rank: int, method: str) -> dict[str, Work]:
    """The three ways, all of them through forward and backward."""
    shapes = shapes_of(name, rank)
    weights = nn.ModuleList(make_weight(method, shape, init="random") for shape in shapes)
    parameters = list(weights.parameters())
    g = [torch.randn(shape.d_out, shape.d_in) for shape in shapes]
    ways = {
        ALONE: lambda: [weight() for weight in weights],
        FRAMES: together_by(ChainsApart, weights),
        SHARED: together_by(Plan, weights),
    }
    for way in ways.values():
        for mine, wanted in zip(way(), ways[ALONE](), strict=True):
            torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-5)
    return {key: (lambda way=way: step(way, parameters, g)) for key, way in ways.items()}


def ablation_case(
    name: str, rank: int, method: str, timer: Timer
) -> tuple[Comparison, dict[str, Counter[str]]]:
    """Times of the three ways, and their calls."""
    works = works_of(name, rank, method)
    return timer.compare(works), {key: counted(work) for key, work in works.items()}


def main() -> None:
    """Print the table."""
    options = parser(__doc__, turns=15)
    options.add_argument("--networks", nargs="+", default=[DIGITS, *NETWORKS])
    arguments = options.parse_args()
    timer = started(arguments)
    rows = []
    for name in arguments.networks:
        for method in ("householder", "riemannian"):
            for rank in (4, 8) if name == DIGITS else (16, 64):
                measured, calls = ablation_case(name, rank, method, timer)
                times = [measured[key] for key in (ALONE, FRAMES, SHARED)]
                rows.append(
                    [name, method, str(rank)]
                    + [f"{t.against:.2f}" if t else "" for t in times]
                    + [str(calls[key].total()) for key in (ALONE, FRAMES, SHARED)]
                )
    header = ["network", "held by", "rank"]
    header += [f"time, {key}" for key in (ALONE, FRAMES, SHARED)]
    header += [f"calls, {key}" for key in (ALONE, FRAMES, SHARED)]
    print(markdown(header, rows, numbers=6))


if __name__ == "__main__":
    main()
