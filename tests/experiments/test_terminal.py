from __future__ import annotations

import errno
import io
import os
import signal

import pytest
import typer
from rich.console import Console

from sttp_manifold.errors import ConfigError
from sttp_manifold.experiments import terminal
from sttp_manifold.experiments.terminal import _SPELLED, ending, err


@pytest.mark.parametrize(
    ("text", "spelled"),
    [("90 ± 1", "90 +- 1"), ("×÷", "x/"), ("QᵀQ − I…", "Q^TQ - I..."), ("ü", "u"), ("漢", "?")],
)
def test_what_a_terminal_cannot_show_is_spelled(text, spelled):
    assert text.encode("ascii", errors=_SPELLED).decode() == spelled


def test_names_of_no_encoding_are_spelled_too():
    assert b"a\xff".decode("utf-8", "surrogateescape").encode("utf-8", errors=_SPELLED) == b"a?"


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ConfigError("no [red] wool"), 2, "error: no [red] wool"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "error: No space left on device"),
        (PermissionError(13, "Permission denied", "there"), 2, "error: there: Permission denied"),
        (KeyboardInterrupt(), 130, "Come back."),
    ],
)
def test_a_command_ends_with_a_code_and_a_message(capsys, error, code, said):
    with pytest.raises(typer.Exit) as caught, ending("Come back."):
        raise error
    assert caught.value.exit_code == code
    assert said in capsys.readouterr().err


def test_a_reader_who_has_left_is_no_error_of_settings():
    with pytest.raises(BrokenPipeError), ending():
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


@pytest.mark.skipif(os.name != "posix", reason="this system sends no such signals")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_signals_that_end_take_the_way_of_an_interrupt(capsys, name):
    number = getattr(signal, name)
    closed = []

    def wait() -> None:
        try:
            os.kill(os.getpid(), number)
            signal.pause()
        finally:
            closed.append(True)

    # Under nohup it would be ignored, and stay so.
    inherited = signal.signal(number, signal.SIG_DFL)
    try:
        with pytest.raises(typer.Exit) as caught, ending("Kept."):
            wait()
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, inherited)
    assert (caught.value.exit_code, closed) == (130, [True])
    assert "Kept." in capsys.readouterr().err


def test_brackets_are_no_markup(capsys):
    err.print("in runs/[bold]x[/bold]")
    assert "runs/[bold]x[/bold]" in capsys.readouterr().err


def test_a_table_of_pairs_is_shown_where_it_fits_and_whole(monkeypatch):
    titles, lines = ["", "method", "2"], [["1", "sttp-chart-adam", "+1.2 ± 0.8 *"], ["2", "x", ""]]

    def shown(width: int, is_terminal: bool) -> str:
        console = Console(width=width, force_terminal=is_terminal, record=True, file=io.StringIO())
        monkeypatch.setattr(terminal, "out", console)
        told = terminal.show_pairs("Rank 4", titles, lines)
        text = console.export_text()
        assert told == bool(text)
        return text

    wide = shown(80, True)
    assert "Rank 4" in wide
    assert "sttp-chart-adam" in wide
    assert "+1.2 ± 0.8 *" in wide
    narrowest = min(width for width in range(20, 80) if shown(width, True))
    assert "…" not in shown(narrowest, True)
    assert shown(narrowest - 1, True) == shown(80, False) == ""
