"""Calls of the library, counted: they do not depend on the machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch._ops import OpOverload
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["counted", "dispatched"]


def counted(work: Callable[[], object], warm: int = 3) -> Counter[str]:
    """Calls of each operation of ATen in one run, those that others make counted too.

    Args:
        work: what to run.
        warm: how often to run it before.
    """
    for _ in range(warm):
        work()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        work()
    names = (event.name for event in recorded.events())
    return Counter(name.removeprefix("aten::") for name in names if name.startswith("aten::"))


class _Dispatched(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not (isinstance(func, OpOverload) and func.is_view)
        return func(*args, **(kwargs or {}))


def dispatched(work: Callable[[], object]) -> int:
    """Operations that one run dispatches, views excepted: on a GPU, about a kernel each."""
    with _Dispatched() as mode:
        work()
    return mode.count
