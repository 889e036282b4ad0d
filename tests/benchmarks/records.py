"""What a run leaves behind: records, and the file that page and figures are made from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peers import absence, versions
from timing import Measured, Timer

SCHEMA = 1
FORWARD, BACKWARD, STEP = "forward", "forward + backward", "step"


@dataclass(frozen=True)
class Setting:
    """What a part of the benchmarks is given.

    Attributes:
        timer: how to time.
        threads: how many threads torch uses now.
        small: whether only the smallest cases are asked for.
        slow: cases in which a peer took so long for one call that it is left out from then on.
    """

    timer: Timer
    threads: int
    small: bool
    slow: dict[object, float] = field(default_factory=dict)

    def within(self, seconds: float) -> Timer:
        """The timer, with so many seconds for one comparison."""
        return Timer(self.timer.turns, self.timer.clock, seconds)


@dataclass(frozen=True)
class Record:
    """One comparison with one peer.

    Attributes:
        row: of the table of targets.
        case: shape, network or rate.
        work: ``forward``, ``forward + backward``, ``step``, or how many steps.
        ours: what of this package.
        peer: what it is held against.
        threads: threads that torch used.
        turns: turns that the peer took; 1 where one call was all.
        unit: of both values: ``s``, or what an error is the norm of.
        ours_value: median seconds of a call, or our error.
        peer_value: the same of the peer; null where there is none.
        ratio: the peer's value over ours, the median over turns; over one where we are ahead.
        measure: what the target is about, ``ratio`` or ``ours``.
        target: the number to reach, or null where none is set.
        at_most: whether it is to be reached from above.
        note: why a peer is missing, or what to know.
        versions: of torch and of the peer.
    """

    row: str
    case: str
    work: str
    ours: str
    peer: str
    threads: int
    turns: int
    unit: str = "s"
    ours_value: float | None = None
    peer_value: float | None = None
    ratio: float | None = None
    measure: str = "ratio"
    target: float | None = None
    at_most: bool = False
    note: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)


def status(record: Mapping[str, Any]) -> str:
    """``met``, ``missed``, ``not measured``, or nothing where no target is set."""
    value = record["ratio"] if record["measure"] == "ratio" else record["ours_value"]
    if value is None:
        return "not measured"
    if record["target"] is None:
        return ""
    reached = value <= record["target"] if record["at_most"] else value >= record["target"]
    return "met" if reached else "missed"


def timed(
    row: str,
    case: str,
    work: str,
    ours: tuple[str, Measured | None],
    peer: tuple[str, Measured | None],
    setting: Setting,
    *needs: str,
    target: float | None = None,
    note: str = "",
) -> Record:
    """A record of two competitors of one comparison.

    Args:
        row: of the table of targets.
        case: shape or network.
        work: what was timed.
        ours: name and measurement.
        peer: name and measurement.
        setting: the threads.
        *needs: the distributions that the peer is made of.
        target: the ratio to reach.
        note: what to know.
    """
    mine, theirs = ours[1], peer[1]
    if theirs is None:
        note = absence(*needs) or note or "not measured"
    elif theirs.turns == 1 and setting.timer.turns > 1:
        note = note or "one call"
    return Record(
        row,
        case,
        work,
        ours[0],
        peer[0],
        setting.threads,
        theirs.turns if theirs else 0,
        ours_value=mine.seconds if mine else None,
        peer_value=theirs.seconds if theirs else None,
        ratio=theirs.against / mine.against if mine and theirs else None,
        target=target,
        note=note,
        versions=versions_of(*needs),
    )


def versions_of(*needs: str) -> dict[str, str]:
    """Versions of torch and of some peers."""
    known = versions()
    return {name: known[name] for name in ("torch", *needs)}


def rounded(value: Any) -> Any:
    """The same, every number with five significant digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {key: rounded(v) for key, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list | tuple) else value


def write(path: Path, about: Mapping[str, Any], parts: Mapping[str, list[Any]]) -> None:
    """Write a run; records get their status."""
    rows = [asdict(record) for record in parts["records"]]
    rows = [row | {"status": status(row)} for row in rows]
    whole = {"schema": SCHEMA, "about": about, **parts, "records": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rounded(whole), indent=1, ensure_ascii=False) + "\n", "utf-8")


def read(path: Path) -> dict[str, Any]:
    """A run that was written.

    Raises:
        SystemExit: no such file, or one of another schema.
    """
    if not path.exists():
        raise SystemExit(f"{path} is not there; measure first: python tests/benchmarks/run.py")
    found = json.loads(path.read_text("utf-8"))
    if found.get("schema") != SCHEMA:
        raise SystemExit(f"{path} has schema {found.get('schema')}, this reads {SCHEMA}; run again")
    return found
