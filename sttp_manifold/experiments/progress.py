"""One bar for all runs, with the best score so far; plain lines where there is no terminal."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.progress import TimeElapsedColumn as Elapsed

from sttp_manifold.experiments.records import Record
from sttp_manifold.experiments.runs.pulse import read_pulses
from sttp_manifold.experiments.task import Metric

__all__ = ["RunProgress"]

_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_BETWEEN_LOOKS = 1.0
_SECONDS_BETWEEN_PULSES = 60.0


class RunProgress:
    """Follows runs as they end.

    The score shown is on the validation split: the test split is for the table.

    Args:
        console: where to write.
        metric: what is best.
        title: what the runs are for.
        quiet: say nothing.
    """

    def __init__(
        self, console: Console, metric: Metric, title: str, *, quiet: bool = False
    ) -> None:
        self._console = console
        self._metric = metric
        self._title = title
        self._quiet = quiet
        self._best: tuple[float, str] | None = None
        self._total = 0
        self._done = 0
        self._skipped = 0
        self._last_line = self._begin = time.monotonic()
        self._folder: Path | None = None
        self._open: dict[str, None] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            Elapsed(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[best]}", markup=False),
            console=console,
            disable=quiet or not console.is_terminal,
        )
        self._task = self._bar.add_task(title, total=None, best="")

    def __enter__(self) -> RunProgress:
        self._bar.start()
        if not self._quiet:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
        self._bar.stop()

    def follow(self, folder: Path, keys: Sequence[str]) -> None:
        """Look from time to time at how far runs are that are not done.

        Args:
            folder: of the comparison.
            keys: hashes of its runs.
        """
        self._open, self._folder = dict.fromkeys(keys), folder

    def _look(self) -> None:
        while not self._over.wait(_SECONDS_BETWEEN_LOOKS):
            if self._folder is None:
                continue
            shares = read_pulses(self._folder, list(self._open))
            self._bar.update(self._task, completed=self._done + sum(shares))
            now = time.monotonic()
            if shares and not self._console.is_terminal:
                if now - self._last_line < _SECONDS_BETWEEN_PULSES:
                    continue
                self._last_line = now
                listed = ", ".join(f"{100 * share:.0f} %" for share in shares)
                self._say(
                    f"{self._title}: {self._done}/{self._total} runs, {len(shares)} going on "
                    f"({listed}){self._left(sum(shares), now)}"
                )

    def _left(self, going_on: float, now: float) -> str:
        """Time left, as the runs since the start have gone."""
        new = self._done - self._skipped + going_on
        if new <= 0:
            return ""
        left = (now - self._begin) * (self._total - self._done - going_on) / new
        return f", about {timedelta(seconds=round(left))} left"

    def start(self, total: int, skipped: int, torn_bytes: int) -> None:
        """Told before the first run, and before the first of each extension of a grid."""
        self._total, self._skipped, self._done = total, skipped, 0
        self._begin = time.monotonic()
        self._bar.reset(self._task, total=total, best="")
        if torn_bytes:
            self._say(
                f"The last line was no record ({torn_bytes} bytes; a process that is killed while "
                "it writes leaves such): moved to the file *.not-records beside it. If it was "
                "one, its run is done again."
            )
        if skipped:
            self._say(f"{skipped} of {total} runs are on record already; going on with the rest.")

    def extend(self, rates: Mapping[str, float]) -> None:
        """Told the rates that are tried beyond their grids, by method."""
        listed = ", ".join(f"{name} {lr:g}" for name, lr in rates.items())
        self._say(f"Best at the edge of the grid, trying beyond: {listed}")

    def record(self, record: Record) -> None:
        """Told each record."""
        self._done += 1
        self._open.pop(record["hash"], None)
        spec = record["spec"]
        label = f"{spec['method']} rank {spec['rank']} seed {spec['seed']}"
        value = record["val_metric"]
        if record["status"] != "ok":
            rate = "" if spec["lr"] is None else f" lr {spec['lr']:g}"
            self._say(f"{label}{rate} {record['status']}: {record['reason']}")
        elif self._best is None or self._metric.better(value, self._best[0]):
            self._best = (value, label)
        best = ""
        if self._best is not None:
            unit = f" {self._metric.unit}" if self._metric.unit else ""
            shown = f"{self._metric.show(self._best[0])}{unit}"
            best = f"best val {self._metric.name} {shown} ({self._best[1]})"
        self._bar.update(self._task, completed=self._done, best=best)
        if self._console.is_terminal or self._done <= self._skipped:
            return
        now = time.monotonic()
        if now - self._last_line >= _SECONDS_BETWEEN_LINES or self._done == self._total:
            self._last_line = now
            left = self._left(0.0, now) if self._done < self._total else ""
            self._say(
                f"{self._title}: {self._done}/{self._total} runs, {best or 'none finished'}{left}"
            )

    def _say(self, text: str) -> None:
        if not self._quiet:
            # A reason may be an error's text of many lines, or hold what moves a terminal's cursor.
            line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
