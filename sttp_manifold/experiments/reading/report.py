"""Everything that is made from records: tables, figures and one self-contained page."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import Any

from sttp_manifold.experiments.files import file_name, named_errors, write_bytes, write_text
from sttp_manifold.experiments.reading.comparison import Comparison, load_comparison
from sttp_manifold.experiments.reading.effort_table import NOTE as EFFORT_NOTE
from sttp_manifold.experiments.reading.effort_table import effort_cells, effort_header, target_of
from sttp_manifold.experiments.reading.gan_table import GAN_HEADER, GAN_NOTE, gan_lines
from sttp_manifold.experiments.reading.page import template
from sttp_manifold.experiments.reading.reproduce import (
    HEADER_NOTE,
    lettered,
    row_cells,
    row_header,
)
from sttp_manifold.experiments.reading.result_table import cells, header, spread_words, to_csv
from sttp_manifold.experiments.records import Record, read_for

__all__ = ["write_outputs"]

_CONSTANTS = (
    "task",
    "data",
    "epochs",
    "batch_size",
    "repeats",
    "schedule",
    "target",
    "max_iterations",
    "max_evaluations",
    "max_seconds",
    "dtype",
    "device",
)


def write_outputs(out: Path) -> list[Path]:
    """Make tables, figures and ``report.html`` from the records of a folder.

    Each file is replaced only by a whole one.

    Args:
        out: a folder that ``sttp compare`` wrote.

    Returns:
        The files, the report last.

    Raises:
        ConfigError: the folder holds no comparison, or cannot be written.
    """
    comparison = load_comparison(out)
    if not comparison.records:
        return []
    pages: dict[str, str | bytes] = {
        "summary.csv": to_csv(comparison.rows, comparison.efforts),
        "summary.md": comparison.to_markdown(),
        **{f"figures/{file_name(p.name)}.png": p.png for p in comparison.pictures.values()},
        "report.html": _page(comparison),
    }
    advice = f"make room, or allow writing; then `sttp report {quote(str(out))}`"
    for name, content in pages.items():
        with named_errors(out / name, advice):
            if isinstance(content, bytes):
                write_bytes(out / name, content)
            else:
                write_text(out / name, content)
    return [out / name for name in pages]


def _page(comparison: Comparison) -> str:
    records, metric = comparison.records, comparison.metric
    first = records[0]
    target = target_of(records)
    trained = any(read_for(record, "score") for record in records)
    solved = any(read_for(record, "effort") for record in records)
    return template("report.html.j2").render(
        note=comparison.note,
        header=header(metric),
        table=[cells(row, metric) for row in comparison.rows],
        efforts=[effort_cells(row) for row in comparison.efforts],
        effort_header=[] if target is None else effort_header(target),
        effort_note=EFFORT_NOTE,
        gans=gan_lines(records),
        gan_header=GAN_HEADER,
        gan_note=GAN_NOTE,
        frontier=comparison.frontier,
        row_header=row_header(metric),
        repeated=row_cells(records, *comparison.note["command"].split()[1:2]),
        row_note=HEADER_NOTE,
        starts=first["spec"].get("options", {}).get("start", "common"),
        trained=trained,
        solved=solved,
        rates=any(record["spec"]["lr"] is not None for record in records),
        said=comparison.conclusions,
        pairs=[pair.to_html() for pair in comparison.pairs],
        pair_note=comparison.pair_note,
        reservations=comparison.reservations,
        spread_words=spread_words(metric),
        pictures=[
            {
                "name": picture.name,
                "caption": picture.caption,
                "data": base64.b64encode(picture.png).decode("ascii"),
            }
            for picture in comparison.pictures.values()
        ],
        constants=_constants(records),
        examples=first["examples"],
        seeds=sorted({record["spec"]["seed"] for record in records}),
        versions=lettered(records),
        devices=sorted({record["device"] for record in records}),
        seconds=sum(record["seconds"] for record in records),
        gap=max(
            (record["w0_gap"] for record in records if record["w0_gap"] is not None), default=0
        ),
        starts_agree=_starts_agree(records),
        bad=[record for record in records if record["status"] != "ok"],
        count=len(records),
    )


def _constants(records: Sequence[Record]) -> dict[str, Any]:
    """What all runs that have it share: training and solving are told by different fields."""
    found: dict[str, Any] = {}
    for name in _CONSTANTS:
        values = [r["spec"].get(name) for r in records if r["spec"].get(name) is not None]
        # `batch_size` is null for the whole split, which is worth saying where there is training.
        trained = name == "batch_size" and read_for(records[0], "score")
        if values or trained:
            found[name] = values[0] if values else None
    return {**found, **records[0]["spec"].get("options", {})}


def _starts_agree(records: Sequence[Record]) -> bool:
    """Whether all methods of one rank and seed had one initial weight, by its digest."""
    digests: dict[tuple[int, int], set[str]] = {}
    for record in records:
        if record["w0_digest"] is not None:
            key = (record["spec"]["rank"], record["spec"]["seed"])
            digests.setdefault(key, set()).add(record["w0_digest"])
    return all(len(found) == 1 for found in digests.values())
