"""The files of a comparison, each whole or not there: written under another name, then renamed."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sttp_manifold._files import replacing, unlinking
from sttp_manifold.errors import ConfigError

__all__ = [
    "COMPARISON",
    "RECORDS",
    "TUNING",
    "file_name",
    "lock",
    "locked",
    "named_errors",
    "replacing",
    "unlinking",
    "write_bytes",
    "write_text",
]

RECORDS = "records.jsonl"
TUNING = "tuning.jsonl"
COMPARISON = "comparison.json"

_LONGEST_NAME = 80


def file_name(text: str) -> str:
    """A word from a record as a part of a file name: it leads to no other folder, on any system.

    >>> file_name("../../etc/passwd")
    '_etc_passwd'
    """
    return re.sub(r"[^\w.+-]+|^\.+", "_", re.sub(r"\.\.+", "", text))[:_LONGEST_NAME] or "_"


@contextmanager
def named_errors(path: Path, advice: str) -> Iterator[None]:
    """Errors of the system as one that names the file and says what to do.

    Args:
        path: what is written or read.
        advice: the call that works.

    Raises:
        ConfigError: in place of an :class:`OSError`.
    """
    try:
        yield
    except OSError as error:
        named = error.filename2 or error.filename
        culprit = Path(os.fsdecode(named)) if isinstance(named, (str, bytes)) else path
        # Of a temporary file nobody has heard.
        culprit = path if culprit.name.startswith(f".{path.stem}-") else culprit
        raise ConfigError(f"{culprit}: {error.strerror or error}; {advice}") from error


def write_bytes(path: Path, content: bytes) -> None:
    """Replace ``path`` by ``content`` in one step."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    """Replace ``path`` by ``content`` in one step, UTF-8; what that cannot hold is spelled out."""
    write_bytes(path, content.encode("utf-8", errors="backslashreplace"))


def lock(descriptor: int) -> bool:
    """Take an open file for this process, where the system has such locks; whether it is ours."""
    try:
        import fcntl
    except ImportError:  # pragma: no cover - not a POSIX system
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        # A file system without locks: one process at a time is up to its users.
        return True
    return True


@contextmanager
def locked(path: Path, patience: float = 60.0) -> Iterator[None]:
    """Hold the folder of ``path``: who reads, changes and replaces a file there does so alone.

    Args:
        path: what is changed.
        patience: seconds to wait for another process.

    Raises:
        ConfigError: another process holds it for longer.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if os.name != "posix":  # pragma: no cover - folders cannot be opened there
        yield
        return
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        limit = time.monotonic() + patience
        while not lock(descriptor):
            if time.monotonic() > limit:
                raise ConfigError(f"another process holds {path.parent}; try again when it is done")
            time.sleep(0.02)
        yield
    finally:
        os.close(descriptor)
