"""What the command line shows, and how a command ends: messages, exit codes, signals."""

from __future__ import annotations

import codecs
import errno
import signal
import sys
import threading
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from sttp_manifold.errors import ConfigError, TimingError

__all__ = ["ending", "err", "out", "prepare_streams", "show_pairs", "show_rates", "show_table"]

# Texts are printed as they are: a bracket in a path or a name is no markup.
out = Console(markup=False, highlight=False)
err = Console(stderr=True, markup=False, highlight=False)

_IN_ASCII = {"±": "+-", "×": "x", "÷": "/", "…": "...", "−": "-", "–": "-", "’": "'", "ᵀ": "^T"}
_SPELLED = "sttp_manifold.spelled"
_WIDE = 10_000


def _spelled(error: UnicodeError) -> tuple[str, int]:
    """What a stream cannot encode, in letters that any stream has."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = ""
    for letter in error.object[error.start : error.end]:
        plain = unicodedata.normalize("NFKD", letter).encode("ascii", "ignore").decode()
        text += _IN_ASCII.get(letter) or plain or "?"
    return text, error.end


codecs.register_error(_SPELLED, _spelled)


def prepare_streams() -> None:
    """Let no letter end a command: a terminal that cannot show ``±`` is given ``+-``."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors=_SPELLED)


@contextmanager
def ending(interrupted: str = "Stopped.") -> Iterator[None]:
    """How a command ends: what is wrong with its settings, or cannot be timed, is exit code 2.

    An interrupt, and the signal that ends processes, is exit code 130. No traceback for either.

    Args:
        interrupted: what to say then.
    """
    with _signals():
        try:
            yield
            sys.stdout.flush()
        except (ConfigError, TimingError) as error:
            _say(f"error: {error}")
            raise typer.Exit(2) from error
        except KeyboardInterrupt:
            _say(f"\n{interrupted}")
            raise typer.Exit(130) from None
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise
            culprit = f"{error.filename}: " if error.filename is not None else ""
            _say(f"error: {culprit}{error.strerror or error}")
            raise typer.Exit(2) from error


def _say(text: str) -> None:
    err.print(text, soft_wrap=True)


@contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM and SIGHUP take the way of an interrupt, which ends workers and closes files."""
    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    numbers = [getattr(signal, name) for name in names]
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, Any] = {}
    for number in numbers:
        # Who started this with nohup wants it to live on.
        if signal.getsignal(number) is signal.SIG_DFL:
            before[number] = signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    # A second one ends it at once.
    signal.signal(number, signal.SIG_DFL)
    raise KeyboardInterrupt


def show_table(name: str, titles: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """A table whose first column is the rank, with a rule between ranks."""
    table = Table(title=name, title_justify="left", box=SIMPLE)
    for title in titles:
        left = title in ("method", "notes")
        table.add_column(title, justify="left" if left else "right", no_wrap=True)
    for k, line in enumerate(lines):
        last = k + 1 == len(lines) or lines[k + 1][0] != line[0]
        table.add_row(*line, end_section=last)
    if out.is_terminal:
        out.print(table)
    else:
        # A narrow pipe would fold the columns beyond recognition.
        Console(width=_WIDE, markup=False, highlight=False).print(table)


def show_pairs(name: str, titles: Sequence[str], lines: Sequence[Sequence[str]]) -> bool:
    """A table of pairs, if the terminal is wide enough for it; whether it was."""
    table = Table(title=name, title_justify="left", box=SIMPLE)
    for title in titles:
        table.add_column(title, justify="left" if title == "method" else "right", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    # Measured where there is room: a table that does not fit would be measured as it is cut.
    wanted = Console(width=_WIDE).measure(table).maximum
    fits = out.is_terminal and wanted <= out.width
    if fits:
        out.print(table)
    return fits


def show_rates(path: Path, found: dict[str, dict[str, object]]) -> None:
    """What was tuned, and where it is kept."""
    table = Table("method", "learning rate", "", title="Tuned", title_justify="left", box=SIMPLE)
    for name, entry in found.items():
        table.add_row(name, f"{entry['lr']:g}", "at the edge of the grid" * bool(entry["at_edge"]))
    out.print(table)
    out.print(f"Kept in {path}", soft_wrap=True)
