"""What a call does on a GPU: its time by events, its kernels by the profiler, its peak of memory.

Cases ask a meter and know nothing of CUDA. That of the CPU stands in where there is no GPU, so that
a test runs every case: its kernels are calls of ATen, its memory is what is allocated, and
its captured and compiled calls are ordinary ones.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from timing import Work
from torch.profiler import ProfilerActivity, profile

sys.path.append(str(Path(__file__).parents[1]))
from calls import counted

Key = TypeVar("Key", bound=Hashable)

__all__ = ["Cuda", "StandIn", "in_turn", "meter"]


class Cuda:
    """A GPU."""

    device = torch.device("cuda")

    @property
    def name(self) -> str:
        """What the device calls itself."""
        return torch.cuda.get_device_name()

    def milliseconds(self, work: Work) -> float:
        """Time of one call, the device idle before it: launches are part of it."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def kernels(self, work: Work) -> int:
        """Kernels and copies of one call."""
        work()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            work()
            torch.cuda.synchronize()
        cuda = torch.autograd.DeviceType.CUDA
        return sum(event.device_type == cuda for event in seen.events())

    def peak(self, make: Callable[[], Work]) -> tuple[Work, float]:
        """A call that is made, and the MB that it holds at most, with what it keeps, once warm."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        work = make()
        for _ in range(2):
            work()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return work, (torch.cuda.max_memory_allocated() - before) / 2**20

    def captured(self, work: Work) -> Work:
        """The call as a graph of kernels, after a warm-up on the stream that captures."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                work()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            work()
        return graph.replay

    def compiled(self, model: Callable[..., Any]) -> Callable[..., Any]:
        """The model as torch compiles it by default."""
        return torch.compile(model)


class StandIn:
    """The CPU in the place of a GPU: every case runs, and its numbers say nothing of one."""

    device = torch.device("cpu")
    name = "CPU, in the place of a GPU"

    def milliseconds(self, work: Work) -> float:
        """Wall time of one call."""
        start = time.perf_counter()
        work()
        return 1e3 * (time.perf_counter() - start)

    def kernels(self, work: Work) -> int:
        """Calls of ATen in one run."""
        return counted(work, warm=1).total()

    def peak(self, make: Callable[[], Work]) -> tuple[Work, float]:
        """A call that is made, and the MB that one run of it allocates."""
        work = make()
        work()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            work()
        taken = (event.self_cpu_memory_usage for event in seen.events())
        return work, sum(bytes_ for bytes_ in taken if bytes_ > 0) / 2**20

    def captured(self, work: Work) -> Work:
        """The call itself."""
        return work

    def compiled(self, model: Callable[..., Any]) -> Callable[..., Any]:
        """The model, traced as for a compiler, run as it is."""
        return torch.compile(model, backend="aot_eager")


def meter() -> Cuda | StandIn:
    """That of the GPU, if there is one."""
    return Cuda() if torch.cuda.is_available() else StandIn()


def in_turn(device: Cuda | StandIn, works: Mapping[Key, Work], turns: int) -> dict[Key, float]:
    """Median milliseconds of each call, all in turn, warm."""
    for work in works.values():
        work()
    taken: dict[Key, list[float]] = {name: [] for name in works}
    for _ in range(turns):
        for name, work in works.items():
            taken[name].append(device.milliseconds(work))
    return {name: statistics.median(mine) for name, mine in taken.items()}
