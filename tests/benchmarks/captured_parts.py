"""Which part of a captured training step fails on the GPU that is there.

``python tests/benchmarks/captured_parts.py`` captures forward and backward, the charts alone, the
optimizer alone and the whole step of a wide network (WRN-28-10 at rank 64, batch 128), with kernels
of this package and without, and replays each. Every one has a process of its own, since an illegal
access ends all of one. A line each: the replays that went well, or what ended them. To look closer
at one, run it alone, as ``compute-sanitizer --target-processes all python
tests/benchmarks/captured_parts.py --part optimizer --method "STTP Riemannian" --seconds 3000``.
Without a GPU, or with ``--small``, it is a trial: tiny sizes, nothing captured.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from gpu_cases import Meter
from gpu_meter import meter
from networks import Weights
from timing import Work
from torch import Tensor, nn
from training import METHODS, converted, mlp

from sttp_manifold import TTShape
from sttp_manifold.experiments.models import network, weight_sizes
from sttp_manifold.nn import HouseholderWeight, capture_step, together
from sttp_manifold.optim import RiemannianAdam


class Wide(NamedTuple):
    """A network, and a batch for it.

    Attributes:
        make: the network.
        sizes: of its weights.
        rank: at which they are held.
        x, labels: the batch.
    """

    make: Callable[[], nn.Module]
    sizes: list[tuple[int, ...]]
    rank: int
    x: Tensor
    labels: Tensor


def wide(device: torch.device, small: bool) -> Wide:
    """The network with which it was seen, or a tiny one."""
    if small:
        sizes: list[tuple[int, ...]] = [(32, 16), (16, 32)]
        make, rank, size = (lambda: mlp(16, 32)), 4, (8, 16)
    else:
        sizes = weight_sizes(network("wrn-28-10", device="meta"))
        make, rank, size = (lambda: network("wrn-28-10")), 64, (128, 3, 32, 32)
    x = torch.randn(size, device=device)
    return Wide(make, sizes, rank, x, torch.randint(10, size[:1], device=device))


def _loss(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x), labels)


def _trained(
    meter: Meter, method: str, small: bool, *, fused: bool
) -> tuple[nn.Module, torch.optim.Optimizer, Wide]:
    """The network as a method holds it, and an optimizer that can be captured."""
    case = wide(meter.device, small)
    model, optimizer = converted(case.make(), method, case.rank)
    model = model.to(meter.device)
    flags: dict[str, Any] = dict(capturable=True) if meter.device.type == "cuda" else {}
    if isinstance(optimizer, RiemannianAdam):
        flags |= {} if fused else dict(fused=False)
        return model, RiemannianAdam(model.parameters(), lr=1e-3, **flags), case
    return model, torch.optim.Adam(model.parameters(), lr=1e-3, **flags), case


def forward_backward(meter: Meter, method: str, small: bool, kernels: bool) -> Work:
    """Loss and gradients."""
    model, _, case = _trained(meter, method, small, fused=kernels)

    def work() -> None:
        model.zero_grad(set_to_none=True)
        _loss(model, case.x, case.labels).backward()

    return meter.captured(work)


def charts(meter: Meter, method: str, small: bool, kernels: bool) -> Work:
    """Charts of all weights, forward and backward, without the network."""
    case = wide(meter.device, small)
    shapes = [TTShape.for_weight(size, case.rank) for size in case.sizes]
    model = Weights([HouseholderWeight(shape, init="random") for shape in shapes]).to(meter.device)
    together(model)
    g = [torch.randn(shape.d_out, shape.d_in, device=meter.device) for shape in shapes]
    parameters = list(model.parameters())
    model()  # weights are formed together from the second forward on
    return meter.captured(lambda: torch.autograd.grad(model(), parameters, g))


def optimizer(meter: Meter, method: str, small: bool, kernels: bool) -> Work:
    """The optimizer's step, of gradients that stay where they are."""
    model, stepper, case = _trained(meter, method, small, fused=kernels)
    _loss(model, case.x, case.labels).backward()
    return meter.captured(stepper.step)


def whole(meter: Meter, method: str, small: bool, kernels: bool) -> Work:
    """All of it, by :func:`sttp_manifold.nn.capture_step`."""
    model, stepper, case = _trained(meter, method, small, fused=kernels)
    step = capture_step(model, stepper, _loss, (case.x, case.labels))
    return lambda: step(case.x, case.labels)


PARTS: dict[str, Callable[[Meter, str, bool, bool], Work]] = {
    "forward and backward": forward_backward,
    "charts": charts,
    "optimizer": optimizer,
    "whole step": whole,
}
WITH, WITHOUT = "with kernels", "without"


def cases(parts: Sequence[str], methods: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Part, method and way of each process."""
    for part in parts:
        for method in methods:
            # Charts are formed alone; a dense network has no kernel of ours in it.
            if part == "charts" and method != "STTP chart":
                continue
            for way in (WITH,) if method == "dense" else (WITH, WITHOUT):
                yield part, method, way


def child(part: str, method: str, way: str, small: bool, replays: int) -> None:
    """Capture one part, and replay it, a line a replay."""
    device = meter()
    torch.manual_seed(0)
    work = PARTS[part](device, method, small, way == WITH)
    for n in range(replays):
        device.milliseconds(work)  # waits for the device, which would say so
        print(f"replay {n + 1}", flush=True)


def outcome(part: str, method: str, way: str, *, small: bool, replays: int, seconds: float) -> str:
    """What becomes of a process of its own."""
    command = [sys.executable, __file__, "--child", way, "--part", part, "--method", method]
    command += ["--replays", str(replays), *(["--small"] if small else [])]
    kernels = {} if way == WITH else {"STTP_KERNELS": "0"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, env=os.environ | kernels
        )
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds:g} s"
    good = sum(line.startswith("replay") for line in done.stdout.splitlines())
    if not done.returncode:
        return f"{good} replays went well"
    said = [line for line in done.stderr.strip().splitlines() if "Error" in line]
    why = said[-1][:200] if said else f"exit status {done.returncode}"
    return f"FAILED {f'at replay {good + 1}' if good else 'before or at the first replay'}: {why}"


def options() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    found.add_argument("--part", choices=list(PARTS), help="this part alone")
    found.add_argument("--method", choices=list(METHODS), help="this method alone")
    found.add_argument("--replays", type=int, default=20, help="of each captured part")
    found.add_argument("--seconds", type=float, default=300, help="that one process may take")
    found.add_argument("--small", action="store_true", help="tiny sizes, as a trial")
    found.add_argument("--child", choices=(WITH, WITHOUT), help=argparse.SUPPRESS)
    return found


def main() -> None:
    """Try every part."""
    arguments = options().parse_args()
    small = arguments.small or not torch.cuda.is_available()
    if arguments.child:
        child(arguments.part, arguments.method, arguments.child, small, arguments.replays)
        return
    if small and not arguments.small:
        print("no GPU is there: a trial of tiny sizes on the CPU, which captures nothing")
    parts = [arguments.part] if arguments.part else list(PARTS)
    methods = [arguments.method] if arguments.method else list(METHODS)
    start = time.perf_counter()
    for part, method, way in cases(parts, methods):
        limits: dict[str, Any] = dict(replays=arguments.replays, seconds=arguments.seconds)
        said = outcome(part, method, way, small=small, **limits)
        print(f"{part}, {method}, {way}: {said}", flush=True)
    print(f"{time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
