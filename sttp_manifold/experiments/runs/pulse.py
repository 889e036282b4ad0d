"""How far runs are that go on elsewhere: a small file each, gone when the run is done."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from sttp_manifold.experiments.checkpoint import CHECKPOINTS
from sttp_manifold.experiments.files import write_text
from sttp_manifold.experiments.json_values import loads

__all__ = ["Pulse", "read_pulses"]

_STALE = 300.0


class Pulse:
    """Says how far one run is.

    Args:
        folder: of the comparison.
        key: hash of the run's specification.
        every: seconds between two writes.
    """

    def __init__(self, folder: Path, key: str, every: float = 2.0) -> None:
        self.path = folder / CHECKPOINTS / f"{key}.json"
        self._every = every
        self._latest = time.monotonic()

    def look(self, progress: tuple[int, int] | None) -> None:
        """Write, if the last time is long enough ago.

        Args:
            progress: steps done and in all.
        """
        if progress is None or time.monotonic() - self._latest < self._every:
            return
        # A disk that is full ends a run at its record, which says so.
        with suppress(OSError):
            write_text(self.path, json.dumps([*progress, time.time()]))
        self._latest = time.monotonic()

    def remove(self) -> None:
        """Remove the file."""
        with suppress(OSError):
            self.path.unlink(missing_ok=True)


def read_pulses(folder: Path, keys: Sequence[str]) -> list[float]:
    """Shares done of the runs that go on.

    Args:
        folder: of the comparison.
        keys: hashes of the runs that are not done.
    """
    found = []
    for key in keys:
        with suppress(OSError, ValueError, TypeError):
            done, whole, when = loads((folder / CHECKPOINTS / f"{key}.json").read_bytes())
            if time.time() - when < _STALE and whole > 0:
                found.append(min(1.0, max(0.0, done / whole)))
    return found
