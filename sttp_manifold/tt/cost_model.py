"""The cost model by which plans are chosen: amounts of work, and what each part of it costs.

One floating-point operation of a large matrix product is the unit. The constants below were fitted
on x86-64 cores with one thread; ``sttp refit-costs FILE`` fits them on another machine and writes
them to a file, which is read when the environment variable ``STTP_COSTS`` names it, and never
otherwise.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, TypeVar

from sttp_manifold.errors import ConfigError

__all__ = [
    "VARIABLE",
    "Costs",
    "Work",
    "cheapest",
    "costs",
    "gemm",
    "left_forming",
    "read_costs",
    "right_forming",
    "write_costs",
]

VARIABLE = "STTP_COSTS"
"""Environment variable that names a file of constants."""

Size = tuple[int, int, int]
P = TypeVar("P")


@dataclasses.dataclass(frozen=True)
class Costs:
    """What each part of a contraction costs, in floating-point operations.

    Attributes:
        call: one kernel call.
        touch: an element that a matrix product reads or writes.
        permute: an element of a permutation.
        channels: output channels that a convolution computes at once: fewer cost as much.
        patch: an element that a convolution reads or writes.

    Raises:
        ConfigError: a constant that is no number or out of range.
    """

    call: float = 4e5
    touch: float = 8.0
    permute: float = 180.0
    channels: float = 16.0
    patch: float = 16.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
                raise ConfigError(f"cost {field.name!r} must be a number >= 0, got {value!r}")
        if self.channels < 1:
            raise ConfigError(f"cost 'channels' must be at least 1, got {self.channels!r}")


def read_costs(path: str | Path) -> Costs:
    """Constants from a file that :func:`write_costs` wrote.

    Raises:
        ConfigError: no such file, or one that does not hold these constants.
    """
    again = "sttp refit-costs FILE writes one"
    try:
        values = json.loads(Path(path).read_text())["costs"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{VARIABLE}: {path} is no file of costs ({error!r}); {again}") from error
    names = {field.name for field in dataclasses.fields(Costs)}
    if not isinstance(values, dict) or set(values) != names:
        raise ConfigError(
            f"{VARIABLE}: {path} must hold {sorted(names)}, holds {values!r}; {again}"
        )
    return Costs(**values)


def write_costs(path: str | Path, costs: Costs, about: dict[str, object]) -> None:
    """Write constants, and facts about the machine and the fit."""
    content = {"costs": dataclasses.asdict(costs), "about": about}
    Path(path).write_text(json.dumps(content, indent=2) + "\n")


def costs() -> Costs:
    """The constants in use: those of the file that ``STTP_COSTS`` names, or the built-in ones.

    The file is read once for each name; a process that refits takes another name.

    Raises:
        ConfigError: a file that is not there or does not hold constants.
    """
    path = os.environ.get(VARIABLE)
    return _read(path) if path else _BUILT_IN


_BUILT_IN = Costs()
_read = lru_cache(maxsize=8)(read_costs)


class Work(NamedTuple):
    """Amounts of what a plan does.

    Attributes:
        flops: floating-point operations of matrix products.
        calls: kernel calls.
        touched: elements that matrix products read or write.
        permuted: elements that are permuted.
    """

    flops: float = 0.0
    calls: float = 0.0
    touched: float = 0.0
    permuted: float = 0.0

    def plus(self, other: Work) -> Work:
        """Sum of two amounts."""
        return Work(
            self.flops + other.flops,
            self.calls + other.calls,
            self.touched + other.touched,
            self.permuted + other.permuted,
        )

    def cost(self, unit: Costs) -> float:
        """In floating-point operations."""
        return (
            self.flops
            + unit.call * self.calls
            + unit.touch * self.touched
            + unit.permute * self.permuted
        )


def cheapest(plans: Sequence[tuple[P, Work]], unit: Costs) -> P:
    """The plan of least cost, of equals the first.

    Args:
        plans: each with its work.
        unit: what work costs.
    """
    # Loops and comparisons here and where plans are listed, no generators and no min(key=...):
    # torch.compile traces them, perhaps with a symbolic count.
    best, work = plans[0]
    least = work.cost(unit)
    for plan, work in plans[1:]:
        cost = work.cost(unit)
        if cost < least:
            best, least = plan, cost
    return best


def gemm(rows: int, inner: int, columns: int) -> Work:
    """Work of one matrix product."""
    touched = rows * inner + inner * columns + rows * columns
    return Work(2.0 * rows * inner * columns, 1.0, touched)


def left_forming(cores: Sequence[Size]) -> Work:
    """Work of contracting cores of these sizes to one, from the left."""
    work, size = Work(), cores[0][1]
    for a, n, b in cores[1:]:
        work = work.plus(gemm(size, a, n * b))
        size *= n
    return work


def right_forming(cores: Sequence[Size]) -> Work:
    """The same from the right."""
    work, size = Work(), cores[-1][1]
    for a, m, b in reversed(cores[:-1]):
        work = work.plus(gemm(a * m, b, size))
        size *= m
    return work
