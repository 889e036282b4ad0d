"""Fit the constants of the cost model: what ``sttp refit-costs FILE`` does.

Every plan of some linear maps is timed, and the constants are the non-negative least-squares fit
of times to amounts of work, each time weighted by its inverse. Nothing changes until ``STTP_COSTS``
names the file.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sttp_manifold.errors import TimingError
from sttp_manifold.tt.cost_model import Costs, Work, write_costs
from sttp_manifold.tt.decompose import orthogonalize
from sttp_manifold.tt.plans import LinearPlan, linear_plans
from sttp_manifold.tt.shape import TTShape
from sttp_manifold.tt.spectral import SpectralTT

__all__ = ["MAPS", "Timed", "fit", "random_chain", "refit", "regrets", "seconds", "time_plans"]

# (d_out, d_in, rank, vectors), from single vectors to large batches, small ranks to large ones.
MAPS = [
    (256, 256, 8, 1), (256, 256, 8, 64), (256, 256, 32, 512), (128, 512, 16, 16),
    (512, 128, 16, 128), (512, 512, 4, 256), (512, 512, 64, 32), (512, 512, 16, 2048),
    (1024, 1024, 8, 1), (1024, 1024, 8, 16), (1024, 1024, 32, 128), (1024, 1024, 64, 4),
    (2048, 1024, 16, 32), (1024, 2048, 16, 4), (2048, 2048, 8, 256), (4096, 4096, 8, 4),
    (720, 900, 12, 50), (120, 2000, 20, 300), (64, 64, 8, 4096), (64, 576, 64, 1024),
]  # fmt: skip


Clock = Callable[[], float]


class Timed(NamedTuple):
    """A plan of a map, with its work and the seconds that it took."""

    place: tuple[int, int, int, int]
    plan: LinearPlan
    work: Work
    seconds: float


def random_chain(shape: TTShape, dtype: torch.dtype, device: torch.device | str) -> SpectralTT:
    """A random value on the merged chain of a plan."""
    plan = shape.merged
    cores = [torch.randn(size, dtype=dtype, device=device) for size in plan.core_shapes]
    split = len(plan.out_modes)
    spectrum = torch.rand(plan.rank, dtype=dtype, device=device) + 0.5
    return orthogonalize(cores[:split], spectrum, cores[split:])


def time_plans(
    place: tuple[int, int, int, int],
    *,
    repeats: int = 7,
    backward: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    clock: Clock = time.perf_counter,
) -> list[Timed]:
    """Seconds of each plan of one map, the least of several turns, the plans taking turns.

    Args:
        place: ``(d_out, d_in, rank, vectors)``.
        repeats: how many turns.
        backward: whether to add the gradients of input and cores.
        dtype: dtype of weight and input.
        device: where to compute.
        clock: a function that gives seconds; ``time.process_time`` on a machine in use.
    """
    d_out, d_in, rank, count = place
    tt = random_chain(TTShape.for_matrix(d_out, d_in, rank), dtype, device)
    x = torch.randn(count, d_in, dtype=dtype, device=device)
    leaves = [*tt.left, tt.spectrum, *tt.right, x]
    for leaf in leaves:
        leaf.requires_grad_(backward)
    plans = list(linear_plans(tt.shape, count))
    best = [float("inf")] * len(plans)
    for _ in range(repeats + 1):
        for k, (plan, _) in enumerate(plans):
            best[k] = min(best[k], seconds(partial(_apply, tt, x, plan, leaves), clock))
    return [Timed(place, plan, work, b) for (plan, work), b in zip(plans, best, strict=True)]


def _apply(tt: SpectralTT, x: Tensor, plan: LinearPlan, leaves: list[Tensor]) -> None:
    y = tt._rows_times_wt(x, plan)
    if y.requires_grad:
        torch.autograd.grad(y, leaves, torch.ones_like(y))


def seconds(work: Callable[[], object], clock: Clock = time.perf_counter) -> float:
    """Time of one call, the mean of several where one is too short for the clock."""
    once = _once(work, 1, clock)
    more = min(int(5e-4 / max(once, 1e-9)), 20)
    return once if more < 2 else min(once, _once(work, more, clock))


def _once(work: Callable[[], object], times: int, clock: Clock) -> float:
    start = clock()
    for _ in range(times):
        work()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return (clock() - start) / times


def fit(timed: Iterable[Timed], like: Costs | None = None) -> Costs:
    """Constants that explain times best, in relative terms, none of them negative.

    Args:
        timed: plans with their times.
        like: the constants that no linear map determines are taken from here.

    Raises:
        TimingError: if the times do not grow with the work, as on a machine that is in use.
    """
    from scipy.optimize import nnls

    rows = list(timed)
    amounts = torch.tensor([list(t.work) for t in rows], dtype=torch.float64)
    seconds = torch.tensor([t.seconds for t in rows], dtype=torch.float64)
    scaled = amounts / seconds.unsqueeze(-1)
    units = scaled.norm(dim=0).clamp_min(1e-300)
    solution, _ = nnls((scaled / units).numpy(), torch.ones(len(rows)).double().numpy())
    flop, call, touch, permute = (torch.as_tensor(solution) / units).tolist()
    if flop <= 0:
        raise TimingError(
            "the times do not grow with the work: the machine is too busy to fit; try again when "
            "it is idle"
        )
    like = Costs() if like is None else like
    return Costs(call / flop, touch / flop, permute / flop, like.channels, like.patch)


def regrets(timed: Iterable[Timed], unit: Costs) -> dict[tuple[int, int, int, int], float]:
    """For each map, the time of the plan that the constants choose over that of the best one."""
    by_map: dict[tuple[int, int, int, int], list[Timed]] = {}
    for t in timed:
        by_map.setdefault(t.place, []).append(t)
    return {
        place: min(plans, key=lambda t: t.work.cost(unit)).seconds / min(t.seconds for t in plans)
        for place, plans in by_map.items()
    }


def refit(path: str | Path, *, repeats: int = 7) -> Costs:
    """Time, fit, and write the constants to a file.

    Args:
        path: the file to write.
        repeats: how often each plan is timed.

    Returns:
        The constants.

    Raises:
        TimingError: if the times do not grow with the work; nothing is written then.
    """
    timed = [t for place in MAPS for t in time_plans(place, repeats=repeats)]
    found = fit(timed)
    ratios = torch.tensor(list(regrets(timed, found).values()))
    about = {
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "plans timed": len(timed),
        "mean regret": round(float(ratios.log().mean().exp()), 3),
        "worst regret": round(float(ratios.max()), 3),
    }
    write_costs(path, found, about)
    return found
