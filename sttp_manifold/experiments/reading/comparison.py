"""A comparison as it lies in its folder: records to read as tables, figures and sentences."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from sttp_manifold.display import box_html, table_html
from sttp_manifold.errors import ConfigError
from sttp_manifold.experiments.files import COMPARISON, RECORDS, named_errors
from sttp_manifold.experiments.json_values import check_numbers, check_words, loads
from sttp_manifold.experiments.reading.conclusions import conclude, reservations
from sttp_manifold.experiments.reading.effort_table import NOTE as EFFORT_NOTE
from sttp_manifold.experiments.reading.effort_table import (
    EffortRow,
    effort_cells,
    effort_header,
    effort_rows,
    target_of,
)
from sttp_manifold.experiments.reading.frontier import NOTE as FRONTIER_NOTE
from sttp_manifold.experiments.reading.frontier import (
    frontier_cells,
    frontier_header,
    frontiers,
)
from sttp_manifold.experiments.reading.gan_pictures import draw_gans
from sttp_manifold.experiments.reading.gan_table import GAN_HEADER, GAN_NOTE, gan_lines
from sttp_manifold.experiments.reading.pair_table import PairTable, pair_note, pair_tables
from sttp_manifold.experiments.reading.pictures import Picture
from sttp_manifold.experiments.reading.plots import draw
from sttp_manifold.experiments.reading.result_table import (
    Row,
    at_every_rank,
    cells,
    grid,
    header,
    metric_note,
    metric_of,
    rows,
)
from sttp_manifold.experiments.records import Record, latest, read_folder, record_files
from sttp_manifold.experiments.task import Metric

__all__ = ["Comparison", "ResultTable", "escaped", "load_comparison"]

_LEFT = ("method", "notes", "set")
# Under its table, where the text of the first column begins.
_NOTE = "style='display:block;margin:4px 10px 14px'"


class ResultTable(NamedTuple):
    """A table of a comparison, as text.

    Attributes:
        titles: of the columns.
        lines: cells of each row.
        note: how to read it.
    """

    titles: Sequence[str]
    lines: Sequence[Sequence[str]]
    note: str


def escaped(text: str) -> str:
    r"""A text as GitHub's Markdown shows it letter by letter, on one line.

    >>> print(escaped("a|b <i>`x`</i>"))
    a\|b &lt;i>\`x\`&lt;/i>
    """
    line = " ".join(text.split())
    # An underscore within a word marks nothing.
    line = re.sub(r"[\\`|\[\]*~]|\b_|_\b|^[#+=>-](?=.)|(?<=^\d)[.)](?=\s)", r"\\\g<0>", line)
    return line.replace("&", "&amp;").replace("<", "&lt;")


@dataclass(frozen=True)
class Comparison:
    """Records of the runs of one comparison, in the order of its plan.

    It prints as its tables and sentences, and shows them in a notebook. Everything in it comes from
    files: :func:`load_comparison` makes one.

    Attributes:
        note: what was compared: ``task``, ``summary``, ``command``, ``hashes`` of the planned runs,
            and more for the sentences.
        records: one for each run that was done, with the fields of ``docs/records.md``.
        folder: where they lie, with what runs have left beside them.
    """

    note: dict[str, Any]
    records: list[Record] = field(repr=False)
    folder: Path | None = field(default=None, repr=False)

    @property
    def task(self) -> str:
        """Name of the task."""
        return str(self.note["task"])

    @property
    def metric(self) -> Metric:
        """What the task is judged by."""
        return metric_of(self.records)

    @cached_property
    def at_ranks(self) -> list[Record]:
        """The records, with those of runs that no rank changes at each rank of the comparison."""
        return at_every_rank(self.records)

    @cached_property
    def rows(self) -> list[Row]:
        """One for each method and rank: results, counts, times."""
        return rows(self.at_ranks)

    @cached_property
    def efforts(self) -> list[EffortRow]:
        """One for each method and rank whose runs had a target: what it took to reach it."""
        return effort_rows(self.at_ranks)

    @cached_property
    def frontier(self) -> ResultTable | None:
        """The best method of each set at each ratio Z; None for fewer than three ranks."""
        found = frontiers(self.at_ranks) if self.records else {}
        if not found:
            return None
        lines = frontier_cells(found, self.metric)
        return ResultTable(frontier_header(self.metric), lines, FRONTIER_NOTE)

    @cached_property
    def conclusions(self) -> list[str]:
        """What the records say in plain words; none without records.

        At most three sentences on scores, and those on what solving took.
        """
        return conclude(self.at_ranks) if self.records else []

    @cached_property
    def reservations(self) -> list[str]:
        """What to bear in mind with them: what is missing, untuned, or too coarse to tell."""
        return reservations(self.records, self.note) if self.records else []

    @cached_property
    def pairs(self) -> list[PairTable]:
        """For each rank by how much each method beats each other one, where seeds can tell."""
        return pair_tables(self.rows, self.metric) if self.records else []

    @property
    def pair_note(self) -> str:
        """How to read :attr:`pairs`."""
        return pair_note(self.pairs, self.rows)

    @property
    def tables(self) -> list[ResultTable]:
        """What it took, the frontier, what GANs are judged by, where there are; then results."""
        if not self.records:
            return []
        found = []
        target = target_of(self.records)
        if target is not None:
            lines = [effort_cells(row) for row in self.efforts]
            found.append(ResultTable(effort_header(target), lines, EFFORT_NOTE))
        if self.frontier is not None:
            found.append(self.frontier)
        lines = gan_lines(self.records)
        if lines:
            found.append(ResultTable(GAN_HEADER, lines, GAN_NOTE))
        metric = self.metric
        lines = [cells(row, metric) for row in self.rows]
        return [*found, ResultTable(header(metric), lines, metric_note(metric))]

    @cached_property
    def pictures(self) -> dict[str, Picture]:
        """Every figure that the records allow, by its name; drawn when first asked for."""
        found = [*draw(self.at_ranks), *draw_gans(self.records, self.folder)]
        return {picture.name: picture for picture in found}

    def plot(self, name: str | None = None) -> Picture:
        """One figure, which a notebook shows.

        Args:
            name: one of :attr:`pictures`; the first of them if absent: ``"convergence"`` where
                there are solvers, else ``"metric"``.

        Raises:
            ConfigError: there is no such figure, or none at all.
        """
        there = self.pictures
        wanted = next(iter(there), None) if name is None else name
        if wanted is None or wanted not in there:
            names = ", ".join(there) or "none, for no run of this comparison is done"
            what = "no figure" if name is None else f"no figure {name!r}"
            raise ConfigError(f"{what}. The figures are: {names}")
        return there[wanted]

    def to_markdown(self) -> str:
        """Tables, sentences and the command that repeats it, in GitHub's Markdown."""
        tables = "".join(
            f"{grid([*map(escaped, t.titles)], [[*map(escaped, line)] for line in t.lines])}\n\n"
            f"{escaped(t.note)}\n\n"
            for t in self.tables
        )
        said = [self._listed(map(escaped, self.conclusions))]
        for pair in self.pairs:
            lines = [[*map(escaped, line[:3]), *line[3:]] for line in pair.lines("**{}**")]
            said.append(f"### {escaped(pair.name)}\n\n{grid([*map(escaped, pair.titles)], lines)}")
        said += [escaped(self.pair_note), self._listed(map(escaped, self.reservations))]
        command = self.note["command"]
        # A fence longer than any within: nothing in the command ends it.
        longest = max((len(run) for run in re.findall("`+", command)), default=0)
        fence = "`" * max(3, longest + 1)
        return (
            f"# {escaped(self.task)}\n\n{escaped(self.note['summary'])}\n\n{tables}"
            "## What this says\n\n"
            + "".join(f"{part}\n\n" for part in said if part)
            + f"## To repeat it\n\n{fence}\n{command}\n{fence}\n"
        )

    def __str__(self) -> str:
        parts = [f"{self.task}: {self.note['summary']}", self._done]
        parts += [f"{grid(t.titles, t.lines)}\n{t.note}" for t in self.tables]
        parts += [self._listed(self.conclusions)]
        parts += [f"{pair.name}\n{grid(pair.titles, pair.lines())}" for pair in self.pairs]
        parts += [self.pair_note, self._listed(self.reservations)]
        return "\n\n".join(part for part in parts if part)

    def _repr_html_(self) -> str:
        parts = [
            f"<b>{escape(self.task)}</b> {escape(self.note['summary'])}",
            f"<small>{escape(self._done)}</small>",
        ]
        for titles, lines, note in self.tables:
            right = [k for k, title in enumerate(titles) if title not in _LEFT]
            parts += [
                table_html(titles, lines, right=right),
                f"<small {_NOTE}>{escape(note)}</small>",
            ]
        parts += [self._items(self.conclusions), *(pair.to_html() for pair in self.pairs)]
        if self.pairs:
            parts.append(f"<small {_NOTE}>{escape(self.pair_note)}</small>")
        parts.append(self._items(self.reservations))
        return box_html(*filter(None, parts))

    @staticmethod
    def _listed(sentences: Iterable[str]) -> str:
        return "\n".join(f"- {sentence}" for sentence in sentences)

    @staticmethod
    def _items(sentences: Iterable[str]) -> str:
        items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
        return f"<ul>{items}</ul>" if items else ""

    @property
    def _done(self) -> str:
        return f"{len(self.records)} of {len(self.note['hashes'])} runs done"


def load_comparison(out: Path | str) -> Comparison:
    """The latest comparison of a folder that ``sttp compare`` wrote, as far as it has come.

    Raises:
        ConfigError: the folder holds no comparison, or one that cannot be read.
    """
    out = Path(out)
    path = out / COMPARISON
    again = f"`sttp compare --out {shlex.quote(str(out))}`"
    with named_errors(path, f"name a folder that {again} wrote"):
        if not path.is_file() or not record_files(out, RECORDS):
            raise ConfigError(
                f"no comparison in {out}: expected {COMPARISON} and {RECORDS} there; make one with "
                f"{again}"
            )
        text = path.read_bytes()
    try:
        note: dict[str, Any] = loads(text)
        _check_note(note)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"no field {error}" if isinstance(error, KeyError) else str(error)
        raise ConfigError(
            f"{path} is no note of a comparison ({why}); {again} with the same options writes it "
            "again, and does no run twice"
        ) from error
    records = {record["hash"]: record for record in latest(read_folder(out, RECORDS))}
    return Comparison(note, [records[key] for key in note["hashes"] if key in records], out)


def _check_note(note: dict[str, Any]) -> None:
    """Check that a note has what is read of it.

    Raises:
        ConfigError: a value of another kind.
        KeyError: a field that is not there.
    """
    check_words("field", [note["task"], note["summary"][:200], note.get("seed_draws", "")])
    if not all(isinstance(note[name], str) for name in ("summary", "command")):
        raise ConfigError("summary and command: expected texts")
    if not isinstance(note["hashes"], list) or not note["hashes"]:
        raise ConfigError("hashes: expected a list of them")
    check_words("hashes", note["hashes"])
    left_out = note.get("left_out") or {}
    check_words("left_out", [*left_out, *left_out.values()])
    check_words("tuned", list(note["tuned"]))
    for name, found in note["tuned"].items():
        if not isinstance(found["at_edge"], bool):
            raise ConfigError(f"tuned {name}: at_edge is no truth value")
        for key in ("epochs", "max_evaluations", "steps"):
            check_numbers(f"tuned {name} {key}", [found.get(key)], null=True, whole=True)
