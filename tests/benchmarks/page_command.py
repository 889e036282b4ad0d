"""The command of a script that makes a page of the documentation from results."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

__all__ = ["DOCS", "make_again"]

DOCS = Path(__file__).resolve().parents[2] / "docs"


def make_again(make: Callable[[Path], Path], about: str | None) -> None:
    """Make a page, and say where it is.

    Args:
        make: writes it into a folder of the documentation, and returns where.
        about: what the script says of itself.
    """
    parser = argparse.ArgumentParser(description=(about or "").splitlines()[0])
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the documentation")
    print(f"{make(parser.parse_args().docs)} is written")
