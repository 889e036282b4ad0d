"""One line that follows a solver; plain lines, few of them, where there is no terminal."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import Progress as Bar
from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

__all__ = ["Progress"]

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Shows iteration, cost, gradient norm and evaluations.

    Args:
        title: what is shown in front.
        quiet: show nothing.
        console: where to write; standard error if absent.
    """

    def __init__(self, title: str, *, quiet: bool, console: Console | None = None) -> None:
        self._title = title
        self._quiet = quiet
        self._console = console or Console(stderr=True)
        self._live = self._console.is_terminal or self._console.is_jupyter
        self._bar = Bar(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            console=self._console,
            disable=quiet or not self._live,
        )
        self._task = self._bar.add_task(title, total=None, state="")
        self._last_line = time.monotonic()
        self._state = ""

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, iteration: int, cost: float, grad_norm: float, evaluations: int) -> None:
        """Show an iterate."""
        if self._quiet:
            return
        self._state = (
            f"iteration {iteration}  cost {cost:.6g}  gradient {grad_norm:.2e}  "
            f"evaluations {evaluations}"
        )
        if self._live:
            self._bar.update(self._task, state=self._state)
        elif time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self._say(self._state)

    def finish(self, message: str) -> None:
        """Show why the solver stopped."""
        if not self._quiet:
            self._say(f"{self._state}: {message}")

    def _say(self, text: str) -> None:
        self._bar.console.print(
            f"{self._title}: {text}", markup=False, highlight=False, soft_wrap=True
        )
