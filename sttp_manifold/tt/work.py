"""Amounts of work of contractions, and their cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from sttp_manifold.tt.costs import Costs

__all__ = ["Work", "gemm", "left_forming", "right_forming"]

Size = tuple[int, int, int]


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

    def shared(self, count: int) -> Work:
        """One part of so much of this work for each of ``count``, done by the same calls."""
        return self._replace(calls=self.calls / count)

    def cost(self, unit: Costs) -> float:
        """In floating-point operations."""
        return (
            self.flops
            + unit.call * self.calls
            + unit.touch * self.touched
            + unit.permute * self.permuted
        )


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
