"""A linear layer in training, against other packages that compress or constrain one.

None of them holds the same set of weights by the same means: `geotorch` holds matrices of low rank
by their singular value decomposition, from matrix exponentials; `tensorly-torch` holds a tensor
train of row and column modes in pairs, without orthonormal cores.
"""

from __future__ import annotations

import torch
from peers import peer
from timing import Comparison, Timer, Work, cells, markdown, parser, started
from torch import Tensor, nn

from sttp_manifold.nn import SpectralLinear

RANK = 16


def _work(layer: nn.Module, x: Tensor, g: Tensor) -> Work:
    def step() -> None:
        layer.zero_grad(set_to_none=True)
        layer(x).backward(g)

    return step


def _ours(width: int, rank: int, kind: str) -> dict[str, nn.Module]:
    what = kind.upper()
    return {
        f"{what} {name}": SpectralLinear(width, width, rank, kind=kind, method=method)
        for name, method in (("chart", "householder"), ("Riemannian", "riemannian"))
    }


def _timed(layers: dict[str, nn.Module | None], width: int, count: int, timer: Timer) -> Comparison:
    x, g = torch.randn(count, width, requires_grad=True), torch.randn(count, width)
    return timer.compare({name: layer and _work(layer, x, g) for name, layer in layers.items()})


def low_rank_case(timer: Timer, small: bool = False) -> tuple[str, Comparison]:
    """SVDP against `geotorch.low_rank`, and against a dense layer."""
    width, rank, count = (32, 4, 8) if small else (512, RANK, 128)
    layers: dict[str, nn.Module | None] = {**_ours(width, rank, "svdp")}
    layers["nn.Linear"] = nn.Linear(width, width)
    geotorch = peer("geotorch")
    theirs = nn.Linear(width, width)
    if geotorch is not None:
        geotorch.low_rank(theirs, "weight", rank)
    layers["geotorch, low_rank"] = None if geotorch is None else theirs
    return f"{width} x {width}, rank {rank}, batch {count}", _timed(layers, width, count, timer)


def layer_case(timer: Timer, small: bool = False) -> tuple[str, Comparison]:
    """STTP against `tltorch.FactorizedLinear` in block TT form."""
    modes, rank, count = ((2, 4, 4), 4, 8) if small else ((4, 4, 4, 16), RANK, 128)
    width = 32 if small else 1024
    layers: dict[str, nn.Module | None] = {**_ours(width, rank, "sttp")}
    tltorch = peer("tensorly-torch")
    layers["tensorly-torch, block TT"] = tltorch and tltorch.FactorizedLinear(
        modes, modes, factorization="blocktt", rank=rank, implementation="factorized"
    )
    return f"{width} x {width}, rank {rank}, batch {count}", _timed(layers, width, count, timer)


def main() -> None:
    """Print the table."""
    timer = started(parser(__doc__, turns=15).parse_args())
    rows = []
    for case in (low_rank_case, layer_case):
        label, measured = case(timer)
        rows += [[label, *row] for row in cells(measured)]
    print(markdown(["layer", "who", "median ms", "against the first"], rows, numbers=2))


if __name__ == "__main__":
    main()
