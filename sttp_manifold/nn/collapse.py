"""When singular values collapse: measures of a spectrum, and a rule over their history."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from sttp_manifold.errors import SpectrumError

__all__ = ["CollapseRule", "Measures", "SpectrumAlarm", "measures_of"]

# A spectrum of zeros has neither measure; it counts as collapsed.
_LEAST = 1e-300


class Measures(NamedTuple):
    """What a spectrum is judged by.

    Attributes:
        stable_rank: sum of squares over the largest square.
        ratio: the smallest over the largest.
        largest: singular value.
        smallest: singular value.
    """

    stable_rank: float
    ratio: float
    largest: float
    smallest: float


def measures_of(s: Tensor) -> Measures:
    """Measures of singular values.

    Shape:
        - s: ``(r,)``, not negative

    Example:
        >>> import torch
        >>> measures_of(torch.tensor([2.0, 1.0, 1.0]))
        Measures(stable_rank=1.5, ratio=0.5, largest=2.0, smallest=1.0)
    """
    s = s.double()
    largest, smallest = float(s.max()), float(s.min())
    if largest <= _LEAST:
        return Measures(0.0, 0.0, largest, smallest)
    relative = s / largest
    return Measures(float(relative.square().sum()), smallest / largest, largest, smallest)


@dataclass(frozen=True)
class SpectrumAlarm:
    """One layer whose singular values collapse.

    Attributes:
        layer: its name.
        step: of the reading that raised the alarm.
        kind: ``"stable rank"``, ``"ratio"`` or ``"trend"``.
        value: what the measure is now.
        reference: what it was at first.
    """

    layer: str
    step: int
    kind: str
    value: float
    reference: float

    def __str__(self) -> str:
        words = {
            "stable rank": "the stable rank has fallen",
            "ratio": "smallest over largest singular value has fallen",
            "trend": "the stable rank keeps falling",
        }[self.kind]
        return (
            f"{self.layer or 'the root module'} at step {self.step}: {words} "
            f"from {self.reference:.3g} to {self.value:.3g}"
        )


@dataclass(frozen=True)
class CollapseRule:
    """When the history of a layer's measures is an alarm.

    The reference of a measure is its median over the first readings, or the median of the readings
    that there are. An alarm wants several readings in a row, so that one bad one is none:

    - ``"stable rank"``: at most the part ``fall`` of its reference;
    - ``"ratio"``: below ``least_ratio`` and at most the part ``fall`` of its reference;
    - ``"trend"``: of the last ``window`` stable ranks nearly each one is below those before it
      (Mann & Kendall's test, ``z`` standard deviations), and the median of their last third is half
      the way down to ``fall`` times the reference, or further.

    So there is none while every stable rank stays above ``(1 + fall) / 2`` times its reference and
    every ratio above ``least_ratio``, whatever they do there; and there is one after ``patience``
    readings below. A stable rank that falls somewhat is learning, not collapse.

    Args:
        fall: part of the reference that counts as collapsed.
        least_ratio: smallest over largest that counts as collapsed.
        patience: readings in a row.
        reference: readings that the reference is made from; none of them is an alarm.
        window: readings of the trend.
        z: standard deviations.

    Raises:
        SpectrumError: a part that is not between 0 and 1, or a count that is too small.

    References:
        Mann 1945, *Nonparametric tests against trend*; Kendall 1975, *Rank correlation methods*.
    """

    fall: float = 0.5
    least_ratio: float = 1e-3
    patience: int = 3
    reference: int = 3
    window: int = 12
    z: float = 3.5

    kinds = ("stable rank", "ratio", "trend")

    def __post_init__(self) -> None:
        for name in ("fall", "least_ratio"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 < value < 1:
                raise SpectrumError(f"{name}={value!r}: expected a part between 0 and 1, as in 0.5")
        for name, least in (("patience", 1), ("reference", 1), ("window", 10)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise SpectrumError(f"{name}={value!r}: expected a whole number, {least} or more")
        value = vars(self)["z"]
        if not isinstance(value, (int, float)) or not value > 0:
            raise SpectrumError(f"z={value!r}: expected a positive number, as in 3.5")

    def judge(self, layer: str, step: int, history: Sequence[Measures]) -> Iterator[SpectrumAlarm]:
        """The alarms that a history is cause for, each kind at most once.

        Args:
            layer: name for the alarm.
            step: of the last reading.
            history: of the layer, oldest first.
        """
        if len(history) < self.reference + self.patience:
            return
        last = history[-self.patience :]
        first = history[: self.reference]
        rank = statistics.median(m.stable_rank for m in first)
        ratio = statistics.median(m.ratio for m in first)
        if all(m.stable_rank <= self.fall * rank for m in last):
            yield SpectrumAlarm(layer, step, "stable rank", last[-1].stable_rank, rank)
        low = min(self.least_ratio, self.fall * ratio)
        if ratio > 0 and all(m.ratio <= low for m in last):
            yield SpectrumAlarm(layer, step, "ratio", last[-1].ratio, ratio)
        if len(history) >= self.window:
            window = [m.stable_rank for m in history[-self.window :]]
            end = statistics.median(window[-(self.window // 3) :])
            if end <= (1 + self.fall) / 2 * rank and self._falls(window):
                yield SpectrumAlarm(layer, step, "trend", end, rank)

    def _falls(self, values: Sequence[float]) -> bool:
        """Whether Mann and Kendall's statistic is that far below what chance gives."""
        n = len(values)
        score = sum((b > a) - (b < a) for k, a in enumerate(values) for b in values[k + 1 :])
        deviation = math.sqrt(n * (n - 1) * (2 * n + 5) / 18)
        return (score + 1) / deviation <= -self.z
