"""What products under TF32 would cost in orthonormality, simulated on the CPU.

TF32 keeps ten bits of the mantissa of each operand and adds up in float32. So are the operands of
every product rounded here, in the optimizer's steps and in the Householder charts. Factorizations
and triangular solves keep float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from orthonormality import drift
from steps import LAYERS, RANK
from timing import markdown, parser, started
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sttp_manifold import SpectralTTManifold, TTShape
from sttp_manifold.frames import full_frame, full_size
from sttp_manifold.frames.retractions import RETRACTIONS
from sttp_manifold.optim import RiemannianAdam

# Which arguments of a product are its operands.
OPERANDS = {"mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2), "baddbmm_": (1, 2)}
KEPT = 10


def rounded(x: Tensor) -> Tensor:
    """``x`` in float32 with ten bits after the leading one, to the nearest."""
    if x.dtype != torch.float32:
        return x
    dropped = 23 - KEPT
    bits = x.contiguous().view(torch.int32)
    return (((bits + (1 << (dropped - 1))) >> dropped) << dropped).view(torch.float32)


class Tf32(TorchDispatchMode):
    """Rounds the operands of products."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] = {}
    ) -> Any:
        which = OPERANDS.get(func.overloadpacket.__name__, ())
        args = tuple(rounded(a) if i in which else a for i, a in enumerate(args))
        return func(*args, **(kwargs or {}))


def steps(lr: float, retraction: str, count: int, simulated: bool) -> float:
    """How far frames are off after steps of fresh noise, as on an accelerator."""
    torch.manual_seed(0)
    manifolds = [
        SpectralTTManifold(TTShape.for_conv(kernel, rank=RANK))
        for kernel, _ in (LAYERS[1], LAYERS[5])
    ]
    points = [manifold.random_parameter() for manifold in manifolds]
    optimizer = RiemannianAdam(points, lr=lr, retraction=retraction, capturable=True)
    for _ in range(count):
        for p in points:
            p.grad = torch.randn_like(p)
        if simulated:
            with Tf32():
                optimizer.step()
        else:
            optimizer.step()
    pairs = zip(manifolds, points, strict=True)
    return drift(f for manifold, x in pairs for f in manifold.unpack(x).core_frames())


def chart(simulated: bool) -> float:
    """How far the frames of a chart are off."""
    torch.manual_seed(0)
    x = torch.randn(16, full_size(128, 32)) / 128**0.5
    if simulated:
        with Tf32():
            return drift(full_frame(x, 128, 32))
    return drift(full_frame(x, 128, 32))


def main() -> None:
    """Print the table."""
    options = parser(__doc__, turns=1)
    options.add_argument("--steps", type=int, default=200)
    arguments = options.parse_args()
    started(arguments)
    rows = [["full_frame", "", f"{chart(False):.1e}", f"{chart(True):.1e}"]]
    for retraction in RETRACTIONS:
        for lr in (1e-3, 1e-1):
            exact, simulated = (steps(lr, retraction, arguments.steps, s) for s in (False, True))
            rows.append([f"step, {retraction}", f"{lr:g}", f"{exact:.1e}", f"{simulated:.1e}"])
    print(markdown(["what", "lr", "float32", "TF32"], rows, numbers=2))


if __name__ == "__main__":
    main()
