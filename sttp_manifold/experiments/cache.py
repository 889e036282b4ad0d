"""Where what is costly to make and easy to make again is kept, for all comparisons of a user."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["CACHE_VARIABLE", "cache_folder"]

CACHE_VARIABLE = "STTP_CACHE"


def cache_folder() -> Path:
    """The folder of the variable ``STTP_CACHE``, or where the system keeps caches."""
    given = os.environ.get(CACHE_VARIABLE)
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "sttp-manifold"
