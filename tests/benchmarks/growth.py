"""How the time of a training step grows: with rank, width, depth and batch.

One linear layer, or a stack of them, is trained dense and by each method, competitors in turn. The
exponent is the slope of a straight line through the logarithms, over the upper half of the sizes;
beside it stands that of the flop count of the same step.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from timing import Timer, Work, markdown, parser, started
from torch import Tensor, nn
from training import METHODS, converted, flops, training_step

AXES: dict[str, Sequence[int]] = {
    "rank": (4, 8, 16, 32, 64, 128, 256),
    "width": (128, 256, 512, 1024, 2048, 4096, 8192),
    "depth": (1, 2, 5, 10, 20, 50, 100, 200),
    "batch": (1, 4, 16, 64, 256, 1024, 4096),
}
# What stays the same while one of them grows.
FIXED: dict[str, dict[str, int]] = {
    "rank": {"width": 1024, "depth": 1, "batch": 128},
    "width": {"rank": 16, "depth": 1, "batch": 128},
    "depth": {"rank": 16, "width": 256, "batch": 32},
    "batch": {"rank": 16, "width": 1024, "depth": 1},
}
# Seconds that the competitors of one size may take, after three turns.
SECONDS = 1.0


class Residual(nn.Module):
    """``x + W x``, so that what is far from the ends keeps its size at any depth."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x)


def works(axis: str, size: int, fixed: Mapping[str, int] | None = None) -> dict[str, Work | None]:
    """The training step of every method at one size."""
    at = {**(fixed or FIXED[axis]), axis: size}
    x = torch.randn(at["batch"], at["width"])
    found: dict[str, Work | None] = {}
    for method in METHODS:
        stack = nn.Sequential(*(Residual(at["width"]) for _ in range(at["depth"])))
        found[method] = training_step(*converted(stack, method, at["rank"]), x)
    return found


def growth_cases(
    timer: Timer, axis: str, sizes: Iterable[int], fixed: Mapping[str, int] | None = None
) -> list[dict[str, object]]:
    """Time and flops of each method at each size, all but ``axis`` as in FIXED or as given."""
    found: list[dict[str, object]] = []
    for size in sizes:
        competitors = works(axis, size, fixed)
        counts = {method: flops(work) for method, work in competitors.items() if work}
        for method, measured in timer.compare(competitors).items():
            assert measured is not None
            found.append(
                {
                    "axis": axis,
                    "size": size,
                    "method": method,
                    "turns": measured.turns,
                    "seconds": measured.seconds,
                    "flops": counts[method],
                }
            )
    return found


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Slope of the logarithms over the upper half of the sizes; nan where that is one point."""
    if len(sizes) < 2:
        return math.nan
    upper = slice(-max(2, math.ceil(len(sizes) / 2)), None)
    return float(np.polyfit(np.log(sizes[upper]), np.log(values[upper]), 1)[0])


def exponents(cases: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], tuple[float, float]]:
    """For each axis and method the exponents of time and of flops."""
    curves: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for case in cases:
        curves[case["axis"], case["method"]].append(case)
    found = {}
    for key, curve in curves.items():
        sizes = [case["size"] for case in curve]
        found[key] = (
            exponent(sizes, [case["seconds"] for case in curve]),
            exponent(sizes, [case["flops"] for case in curve]),
        )
    return found


def main() -> None:
    """Print the exponents."""
    options = parser(__doc__, turns=7)
    options.add_argument("axes", nargs="*", default=list(AXES), help=f"of {', '.join(AXES)}")
    arguments = options.parse_args()
    given = started(arguments)
    timer = Timer(given.turns, given.clock, SECONDS)
    cases = [c for axis in arguments.axes for c in growth_cases(timer, axis, AXES[axis])]
    table = [
        [str(c["axis"]), str(c["size"]), str(c["method"]), f"{1e3 * c['seconds']:.2f}"]
        for c in cases
    ]
    print(markdown(["axis", "size", "method", "median ms"], table, numbers=1))
    found = exponents(cases).items()
    rows = [[axis, method, f"{t:.2f}", f"{f:.2f}"] for (axis, method), (t, f) in found]
    print(f"\n{markdown(['axis', 'method', 'time', 'flops'], rows, numbers=2)}")


if __name__ == "__main__":
    main()
