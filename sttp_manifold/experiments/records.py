"""Records: one JSON line a run, appended to a file that survives a kill.

Their schema is in :mod:`~sttp_manifold.experiments.schema`.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from sttp_manifold.errors import ConfigError
from sttp_manifold.experiments.files import lock, named_errors
from sttp_manifold.experiments.json_values import LARGEST, loads
from sttp_manifold.experiments.schema import (
    CURVES,
    EFFORT,
    SCHEMA,
    SCHEMA_VERSION,
    STATUSES,
    Field,
    upgraded,
    validate,
)

__all__ = [
    "CURVES",
    "DONE",
    "EFFORT",
    "SCHEMA",
    "SCHEMA_VERSION",
    "STATUSES",
    "Field",
    "Record",
    "RecordFile",
    "latest",
    "read_folder",
    "read_for",
    "read_records",
    "record_files",
    "rounded",
    "validate",
]

Record = dict[str, Any]

_ELSEWHERE = "make room or name another folder with --out; what is done is kept"

# A diverged run would diverge again, so it is a result; a failed one (an error in the machinery,
# a machine without memory) is worth another try.
DONE = ("ok", "diverged")


def rounded(value: Any, digits: int = 7) -> Any:
    """Floats to a number of significant digits, through lists and dicts.

    Those that are not finite, or beyond all measure, become None.

    Seven digits are all that float32 has, and keep a record a quarter of its size.
    """
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if abs(value) <= LARGEST else None
    if isinstance(value, Mapping):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item, digits) for item in value]
    return value


def read_for(record: Record, reading: str) -> bool:
    """Whether a record is read for something: ``score``, ``curves`` or ``effort``."""
    return reading in record["reads"]


def latest(records: Iterable[Record]) -> list[Record]:
    """One record a hash, the last one written, in the order of first appearance."""
    found: dict[str, Record] = {}
    for record in records:
        found[record["hash"]] = record
    return list(found.values())


def read_records(path: Path) -> tuple[list[Record], int]:
    """Records of a file, and how many bytes at its end are no record.

    A process that is killed while it writes leaves at most one torn line, the last one. A last
    line that nobody here wrote is no record either.

    Raises:
        ConfigError: a line that is not the last one is no record, the last one is a record of
            another schema, or the file cannot be read.
    """
    with named_errors(path, "name a folder whose files can be read"):
        if not path.exists():
            return [], 0
        content = path.read_bytes()
    records: list[Record] = []
    start = 0
    while start < len(content):
        end = content.find(b"\n", start)
        if end < 0:
            return records, len(content) - start
        record = None
        try:
            record = upgraded(loads(content[start:end]))
            validate(record)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            ours = isinstance(record, dict) and "schema" in record
            if end + 1 == len(content) and not ours:
                return records, len(content) - start
            number = content.count(b"\n", 0, start) + 1
            raise ConfigError(
                f"{path}, line {number} is no record ({error}); move the file away, or name "
                "another folder with --out"
            ) from error
        records.append(record)
        start = end + 1
    return records, 0


def record_files(folder: Path, name: str) -> list[Path]:
    """The record files of a folder: the one of that name, and those of shards beside it.

    Args:
        folder: of a comparison.
        name: ``records.jsonl`` or ``tuning.jsonl``.
    """
    stem, _, suffix = name.rpartition(".")
    found = [folder / name, *sorted(folder.glob(f"{stem}-*-of-*.{suffix}"))]
    return [path for path in found if path.is_file()]


def read_folder(folder: Path, name: str) -> list[Record]:
    """Records of all the record files of a folder, those that are done after those that failed.

    Where shards have a run each on record, :func:`latest` takes one that is done.

    Args:
        folder: of a comparison.
        name: ``records.jsonl`` or ``tuning.jsonl``.

    Raises:
        ConfigError: as :func:`read_records`.
    """
    files = record_files(folder, name)
    records = [record for path in files for record in read_records(path)[0]]
    if len(files) > 1:
        records.sort(key=lambda record: record["status"] in DONE)
    return records


class RecordFile:
    """A file of records, open for appending by one process at a time.

    Opening reads what is there. A last line that is no record is moved to the file
    :attr:`aside`. Every record reaches the disk before :meth:`append` returns.

    Args:
        path: the file; it and its folder are made when they are not there.

    Attributes:
        records: every record of the file.
        torn_bytes: length of the last line that was moved away, 0 for none.

    Raises:
        ConfigError: another process has it open, a line is no record, or the file cannot be
            written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with named_errors(path, _ELSEWHERE):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: io.FileIO = path.open("ab", buffering=0)
        try:
            if not lock(self._file.fileno()):
                raise ConfigError(
                    f"another process writes {path}; wait for it, or name another folder with --out"
                )
            self.records, self.torn_bytes = read_records(path)
            if self.torn_bytes:
                with named_errors(path, _ELSEWHERE):
                    self._move_aside(self.torn_bytes)
        except BaseException:
            self._file.close()
            raise

    @property
    def aside(self) -> Path:
        """The file beside this one that lines go to which are no records."""
        return self.path.with_name(f"{self.path.name}.not-records")

    def _move_aside(self, count: int) -> None:
        size = self.path.stat().st_size
        with self.path.open("rb") as file:
            file.seek(size - count)
            line = file.read()
        with self.aside.open("ab") as file:
            file.write(line if line.endswith(b"\n") else line + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._file.truncate(size - count)

    def append(self, record: Record) -> None:
        """Check a record and add it as one line: whole, or not at all.

        Raises:
            ConfigError: the record does not follow the schema, or the disk does not take it.
        """
        validate(record)
        line = json.dumps(record, separators=(",", ":"), allow_nan=False) + "\n"
        left = memoryview(line.encode("utf-8"))
        with named_errors(self.path, _ELSEWHERE):
            size = os.fstat(self._file.fileno()).st_size
            try:
                while left:
                    left = left[self._file.write(left) :]
                os.fsync(self._file.fileno())
            except OSError:
                # A disk that is full takes a part of a line.
                with suppress(OSError):
                    self._file.truncate(size)
                raise
        self.records.append(record)

    def close(self) -> None:
        """Let the file go."""
        self._file.close()

    def __enter__(self) -> RecordFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
