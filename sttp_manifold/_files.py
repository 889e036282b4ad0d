"""Files that are whole or not there: written under another name, then renamed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path

__all__ = ["remove_leftovers", "replacing", "unlinking"]


@contextmanager
def unlinking(path: Path) -> Iterator[None]:
    """Remove a file when the block ends, however it ends."""
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder, renamed to ``path`` when the block ends well.

    Readers see the old file or the new one, never a part of one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    with unlinking(temporary):
        # mkstemp makes the file private; a report is as readable as any other new file.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        yield temporary
        temporary.replace(path)


def remove_leftovers(path: Path) -> None:
    """Remove what killed processes wrote for a file that no other process is writing now."""
    for left in path.parent.glob(f".{escape(path.stem)}-*{escape(path.suffix)}"):
        left.unlink(missing_ok=True)
