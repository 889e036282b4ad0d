"""Competitors in turn in one process: medians, and ratios within a turn.

What slows the machine slows all competitors of a turn, so that ratios carry over to other machines
and milliseconds do not.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

Work = Callable[[], object]
Clock = Callable[[], float]
K = TypeVar("K", bound=Hashable)

# What a competitor does in one turn takes at least that long, so that the one who comes first
# does not pay alone for the caches that the last one left.
AT_LEAST = 2e-3
# A competitor whose first call takes longer than this is timed by that call alone.
AT_MOST = 3.0
# Turns after which a comparison that has used up its seconds ends.
FEWEST = 3

CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Measured:
    """One competitor of a comparison.

    Attributes:
        seconds: median time of a call.
        against: median over turns of its time over that of the first competitor.
        turns: how many turns it took; 1 where one call was all.
    """

    seconds: float
    against: float
    turns: int


Comparison = dict[str, Measured | None]


@dataclass(frozen=True)
class Timer:
    """How competitors are timed.

    Attributes:
        turns: how often each of them comes.
        clock: wall time, or the time of the processor where others use the machine as well.
        seconds: a comparison that has taken that long ends, though not before three turns.
    """

    turns: int = 15
    clock: Clock = time.perf_counter
    seconds: float = math.inf

    def compare(self, competitors: Mapping[K, Work | None]) -> dict[K, Measured | None]:
        """Time each competitor once a turn; the first one is what the others are held against.

        A competitor that is None is not there, and neither is its measurement.
        """
        present = {name: work for name, work in competitors.items() if work is not None}
        taken: dict[K, list[float]] = {}
        repeats: dict[K, int] = {}
        for name, work in present.items():
            once = self._run(work, 1)
            if once > AT_MOST:
                taken[name], repeats[name] = [once], 0
            else:
                taken[name] = []
                repeats[name] = 1 + int(AT_LEAST / max(self._run(work, 1), 1e-7))
        start = time.perf_counter()
        for turn in range(self.turns):
            for name, work in present.items():
                if repeats[name]:
                    taken[name].append(self._run(work, repeats[name]))
            if turn + 1 >= FEWEST and time.perf_counter() - start > self.seconds:
                break
        ours = next(iter(taken.values()))
        return {name: _measured(taken[name], ours) if name in taken else None
                for name in competitors}  # fmt: skip

    def _run(self, work: Work, times: int) -> float:
        start = self.clock()
        for _ in range(times):
            work()
        return (self.clock() - start) / times


def _measured(mine: list[float], ours: list[float]) -> Measured:
    if len(mine) == len(ours):
        against = statistics.median(m / o for m, o in zip(mine, ours, strict=True))
    else:
        against = statistics.median(mine) / statistics.median(ours)
    return Measured(statistics.median(mine), against, len(mine))


def geometric(values: Iterable[float]) -> float:
    """Geometric mean."""
    return math.exp(statistics.fmean(map(math.log, values)))


def cells(measured: Comparison) -> list[list[str]]:
    """One row of text for each competitor: name, median in milliseconds, ratio to the first."""
    return [
        [name, "not installed", ""]
        if m is None
        else [name, f"{m.seconds * 1e3:.3f}", f"{m.against:.2f}x"]
        for name, m in measured.items()
    ]


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], numbers: int = 0) -> str:
    """A table; its last ``numbers`` columns are aligned to the right."""
    table = [list(header), *map(list, rows)]
    widths = [max(3, *map(len, column)) for column in zip(*table, strict=True)]
    words = len(header) - numbers
    rule = ["-" * w if k < words else "-" * (w - 1) + ":" for k, w in enumerate(widths)]
    lines = [table[0], rule, *table[1:]]
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def parser(about: str | None, turns: int) -> argparse.ArgumentParser:
    """Options that every benchmark has."""
    found = argparse.ArgumentParser(description=(about or "").splitlines()[0])
    found.add_argument("--turns", type=int, default=turns, help="times that each competitor runs")
    found.add_argument("--threads", type=int, default=1, help="threads that torch may use")
    found.add_argument(
        "--clock", choices=list(CLOCKS), default="wall", help="cpu: one thread, busy machine"
    )
    return found


def started(arguments: argparse.Namespace) -> Timer:
    """Set threads and seed as the options say, and print what matters about them."""
    if arguments.clock == "cpu" and arguments.threads > 1:
        raise SystemExit("--clock cpu adds up the time of all threads; give it --threads 1")
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    about = f"{arguments.threads} thread(s), {arguments.clock} clock, {arguments.turns} turns"
    print(f"torch {torch.__version__}, {about}\n")
    return Timer(arguments.turns, CLOCKS[arguments.clock])
