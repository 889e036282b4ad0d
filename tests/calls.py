"""Calls of the library, counted: they do not depend on the machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile

__all__ = ["counted"]


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
