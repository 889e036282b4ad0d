"""How far frames stray from orthonormal ones in many float32 steps.

Two kernels of ResNet-32, the most frequent of its first and of its last stage. The gradient is a
fixed one plus fresh noise of the same size, which no step ever satisfies. What is reported is the
largest entry of ``|Q^T Q - I|`` over all frames, in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from peers import peer
from steps import LAYERS, RANK
from timing import markdown, parser, started
from torch import Tensor

from sttp_manifold import SpectralTTManifold, TTShape
from sttp_manifold._geoopt import EuclideanStiefel, ManifoldParameter, geoopt
from sttp_manifold.optim import RiemannianAdam

RATES = (1e-2, 1e-1)


def drift(frames: Iterable[Tensor]) -> float:
    """The largest entry of ``|Q^T Q - I|``."""
    worst = 0.0
    for frame in frames:
        Q = frame.detach().double()
        gram = Q.mT @ Q - torch.eye(Q.shape[-1], dtype=Q.dtype)
        worst = max(worst, float(gram.abs().max()))
    return worst


def _train(optimizer: torch.optim.Optimizer, parameters: list[Tensor], steps: int) -> None:
    fixed = [torch.randn_like(p) for p in parameters]
    for _ in range(steps):
        for p, g in zip(parameters, fixed, strict=True):
            p.grad = torch.randn_like(p) + g
        optimizer.step()


def drifts(steps: int = 1000, small: bool = False) -> dict[float, dict[str, float]]:
    """For each learning rate, how far our frames stray, and geoopt's."""
    assert peer("geoopt") is not None
    kernels = LAYERS[:1] if small else [LAYERS[1], LAYERS[5]]
    shapes = [TTShape.for_conv(kernel, rank=RANK) for kernel, _ in kernels]
    found: dict[float, dict[str, float]] = {}
    for lr in RATES:
        manifolds = [SpectralTTManifold(shape) for shape in shapes]
        points = [manifold.random_parameter() for manifold in manifolds]

        def frames(manifolds=manifolds, points=points) -> list[Tensor]:
            pairs = zip(manifolds, points, strict=True)
            return [f for manifold, x in pairs for f in manifold.unpack(x).core_frames()]

        start = [frame.detach().clone() for frame in frames()]
        _train(RiemannianAdam(points, lr=lr, second_moment="frame"), points, steps)
        found[lr] = {"RiemannianAdam": drift(frames())}
        stiefel: dict[str, Callable[[], object]] = {
            "geoopt RiemannianAdam, Stiefel()": geoopt.Stiefel,
            "geoopt RiemannianAdam, EuclideanStiefel": EuclideanStiefel,
        }
        for name, make in stiefel.items():
            theirs = [ManifoldParameter(f.clone(), manifold=make()) for f in start]
            _train(geoopt.optim.RiemannianAdam(theirs, lr=lr), theirs, steps)
            found[lr][name] = drift(theirs)
    return found


def main() -> None:
    """Print the table."""
    options = parser(__doc__, turns=1)
    options.add_argument("--steps", type=int, default=1000)
    arguments = options.parse_args()
    started(arguments)
    found = drifts(arguments.steps)
    rows = [[f"{lr:g}", who, f"{d:.1e}"] for lr, each in found.items() for who, d in each.items()]
    print(markdown(["lr", "who", f"|QᵀQ - I| after {arguments.steps} steps"], rows, numbers=1))


if __name__ == "__main__":
    main()
