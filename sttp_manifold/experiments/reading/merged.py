"""Several folders on one page: runs of one setting are one comparison, whoever ran them."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import Any

from sttp_manifold.errors import ConfigError
from sttp_manifold.experiments.files import file_name, named_errors, write_bytes, write_text
from sttp_manifold.experiments.reading.comparison import Comparison, load_comparison
from sttp_manifold.experiments.reading.page import template
from sttp_manifold.experiments.reading.reproduce import (
    HEADER_NOTE,
    lettered,
    row_cells,
    row_header,
)
from sttp_manifold.experiments.reading.result_table import grid
from sttp_manifold.experiments.records import Record

__all__ = ["merge", "write_merged"]

# What tells runs of one setting apart; all else that a specification has is the setting.
_OF_A_RUN = (
    *("method", "kind", "parameterization", "optimizer", "momentum", "spectrum"),
    *("rank", "seed", "lr", "schedule", "purpose"),
)


def _setting(comparison: Comparison) -> str:
    """What all runs of a comparison share, as text; the schedule of solvers has no say."""
    spec = next((r["spec"] for r in comparison.records), {"task": comparison.task})
    return json.dumps({k: v for k, v in spec.items() if k not in _OF_A_RUN}, sort_keys=True)


def merge(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Comparisons of one setting as one, in the order of the first of each.

    Of a run that is in several of them one record is kept, one that is ok before one that is not.
    """
    groups: dict[str, list[Comparison]] = {}
    for comparison in comparisons:
        groups.setdefault(_setting(comparison), []).append(comparison)
    return [group[0] if len(group) == 1 else _as_one(group) for group in groups.values()]


def _as_one(group: Sequence[Comparison]) -> Comparison:
    records: dict[str, Record] = {}
    for record in (record for comparison in group for record in comparison.records):
        held = records.get(record["hash"])
        if held is None or (held["status"] != "ok" and record["status"] == "ok"):
            records[record["hash"]] = record
    hashes = list(dict.fromkeys(key for comparison in group for key in comparison.note["hashes"]))
    left_out: dict[str, Any] = {}
    tuned: dict[str, Any] = {}
    for comparison in group:
        left_out |= comparison.note.get("left_out") or {}
        tuned |= comparison.note["tuned"]
    commands = list(dict.fromkeys(comparison.note["command"] for comparison in group))
    note = {
        **group[0].note,
        "hashes": hashes,
        "left_out": left_out,
        "tuned": tuned,
        "command": "\n".join(commands),
    }
    return Comparison(note, [records[key] for key in hashes if key in records])


def write_merged(folders: Sequence[Path], out: Path) -> list[Path]:
    """Make one page of several folders.

    Args:
        folders: those that ``sttp compare`` wrote.
        out: folder to write to.

    Returns:
        The files, the page last; none where no run is on record.

    Raises:
        ConfigError: a folder holds no comparison, or ``out`` cannot be written.
    """
    comparisons = [c for c in merge([load_comparison(folder) for folder in folders]) if c.records]
    if not comparisons:
        return []
    if any(folder.resolve() == out.resolve() for folder in folders):
        raise ConfigError(
            f"--out {out}: a page of several folders goes to a folder of its own, as in "
            f"--out {quote(str(out.parent / 'report'))}"
        )
    sections = [_section(k, comparison) for k, comparison in enumerate(comparisons, start=1)]
    page = template("merged.html.j2").render(
        sections=sections,
        folders=[str(folder) for folder in folders],
        again=f"sttp report {' '.join(quote(str(f)) for f in folders)} --out {quote(str(out))}",
    )
    pages: dict[str, str | bytes] = {
        "report.md": "\n".join(_markdown(comparison) for comparison in comparisons),
        **{f"figures/{s['picture']['file']}": s["png"] for s in sections if s["picture"]},
        "report.html": page,
    }
    for name, content in pages.items():
        with named_errors(out / name, "make room or name another folder with --out"):
            if isinstance(content, bytes):
                write_bytes(out / name, content)
            else:
                write_text(out / name, content)
    return [out / name for name in pages]


def _section(number: int, comparison: Comparison) -> dict[str, Any]:
    pictures = list(comparison.pictures.values())
    first = pictures[0] if pictures else None
    command = comparison.note["command"].split()[1:2]
    return {
        "task": comparison.task,
        "summary": comparison.note["summary"],
        "count": len(comparison.records),
        "said": comparison.conclusions[:3],
        "picture": first
        and {
            "file": f"{number}-{file_name(comparison.task)}-{first.name}.png",
            "name": first.name,
            "caption": first.caption,
            "data": base64.b64encode(first.png).decode("ascii"),
        },
        "png": first.png if first else b"",
        "tables": comparison.tables[:-1],
        "rows": row_cells(comparison.records, *command),
        "row_header": row_header(comparison.metric),
        "row_note": HEADER_NOTE,
        "pairs": [pair.to_html() for pair in comparison.pairs],
        "pair_note": comparison.pair_note,
        "reservations": comparison.reservations,
        "versions": lettered(comparison.records),
        "setting": json.loads(_setting(comparison)),
        "commands": comparison.note["command"].splitlines(),
        "pictures": [
            {
                "name": picture.name,
                "caption": picture.caption,
                "data": base64.b64encode(picture.png).decode("ascii"),
            }
            for picture in pictures[1:]
        ],
    }


def _markdown(comparison: Comparison) -> str:
    """Tables and sentences of one setting, with the command of each row."""
    command = comparison.note["command"].split()[1:2]
    rows = row_cells(comparison.records, *command)
    titles = row_header(comparison.metric)
    body = [[*line[:-1], f"`{line[-1]}`"] for line in rows]
    return (
        f"{comparison.to_markdown()}\n## Each row again\n\n{grid(titles, body)}\n\n{HEADER_NOTE}\n"
    )
