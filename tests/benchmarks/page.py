"""Page and figures of the benchmarks, from the file that a run has left.

``python tests/benchmarks/page.py`` makes them again without measuring anything.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pictures
from growth import FIXED, exponents
from page_command import make_again
from records import read
from timing import AT_MOST, markdown

RESULTS = Path("results", "benchmarks.json")
Row = Mapping[str, Any]


def value(record: Row) -> str:
    """What the target is about: a ratio, or our own error."""
    if record["status"] == "not measured":
        return record["note"]
    if record["measure"] == "ours":
        return f"{record['ours_value']:.3g}"
    return f"{record['ratio']:.2f}x"


def target(record: Row) -> str:
    """The number to reach."""
    if record["target"] is None:
        return ""
    sign, unit = "≤" if record["at_most"] else "≥", "x" if record["measure"] == "ratio" else ""
    return f"{sign} {record['target']:g}{unit}"


def by_case(records: Iterable[Row]) -> list[dict[int, Row]]:
    """Records that differ in nothing but their threads, together."""
    found: dict[tuple[str, ...], dict[int, Row]] = defaultdict(dict)
    for record in records:
        key = tuple(record[name] for name in ("row", "case", "work", "ours", "peer"))
        found[key][record["threads"]] = record
    return list(found.values())


def targets_table(records: Sequence[Row], threads: Sequence[int]) -> str:
    """Every target, with what came out at each number of threads."""
    rows = []
    for case in by_case(r for r in records if r["target"] is not None):
        any_one = next(iter(case.values()))
        cells = [f"{any_one['row']}: {any_one['case']}", any_one["work"], any_one["ours"]]
        cells += [any_one["peer"], target(any_one)]
        for count in threads:
            record = case.get(count)
            status = record["status"] if record else ""
            shown = value(record) if record else "the same"
            mark = {"met": ", met", "missed": ", **missed**"}.get(status, "")
            cells.append(shown + mark)
        rows.append(cells)
    words = [pictures.in_words(count) for count in threads]
    return markdown(["what", "work", "ours", "peer", "target", *words], rows, len(threads) + 1)


def verdict(records: Sequence[Row], threads: Sequence[int]) -> str:
    """How many targets were met, and which were not."""
    lines = []
    for count in threads:
        judged = [r for r in records if r["threads"] == count and r["target"] is not None]
        met = sum(r["status"] == "met" for r in judged)
        absent = sum(r["status"] == "not measured" for r in judged)
        line = f"With {pictures.in_words(count)}, {met} of {len(judged)} targets are met"
        line += f", {len(judged) - met - absent} are missed"
        lines.append(line + (f", {absent} could not be measured." if absent else "."))
    missed = [r for r in records if r["status"] == "missed"]
    if missed:
        lines += ["", "Missed:", ""]
        for r in missed:
            where = f"{pictures.label(r)}, {pictures.in_words(r['threads'])}"
            lines.append(f"- {where}: {value(r)}, target {target(r)}")
    return "\n".join(lines)


def every_record(records: Sequence[Row]) -> str:
    """All records, folded, one table a row of targets."""
    parts: dict[str, list[Row]] = defaultdict(list)
    for record in records:
        parts[record["row"]].append(record)
    found = []
    for name, group in parts.items():
        rows = []
        for r in group:
            scale, unit = (1e3, " ms") if r["unit"] == "s" else (1, "")
            both = [r["ours_value"], r["peer_value"]]
            shown = ["" if v is None else f"{v * scale:.3g}{unit}" for v in both]
            ratio = "" if r["ratio"] is None else f"{r['ratio']:.2f}x"
            what = [r["case"], r["work"], r["ours"], r["peer"], str(r["threads"])]
            rows.append([*what, *shown, ratio, r["note"]])
        header = ["case", "work", "ours", "peer", "threads"]
        header += ["our value", "its value", "ratio", "note"]
        found += [f":::{{dropdown}} {name}", markdown(header, rows), ":::", ""]
    return "\n".join(found)


def training_table(cases: Sequence[Row]) -> str:
    """Time ratios beside flop ratios."""
    rows = [
        [
            c["network"],
            c["method"],
            str(c["threads"]),
            f"{1e3 * c['seconds']:.1f}",
            f"{c['time_ratio']:.2f}",
            f"{c['flop_ratio']:.2f}",
            f"{c['time_ratio'] / c['flop_ratio']:.2f}",
            f"{c['of_plain']:.2f}",
        ]
        for c in cases
    ]
    header = ["network", "method", "threads", "median ms", "time, of dense", "flops, of dense",
              "time over flops", "time, of plain factors"]  # fmt: skip
    return markdown(header, rows, numbers=6)


def growth_table(cases: Sequence[Row]) -> str:
    """Exponents of time, with those of the flop count in brackets."""
    found = exponents(cases)
    axes = list(dict.fromkeys(axis for axis, _ in found))
    methods = list(dict.fromkeys(method for _, method in found))
    rows = [
        [method, *("{:.2f} ({:.2f})".format(*found[axis, method]) for axis in axes)]
        for method in methods
    ]
    return markdown(["method", *axes], rows, numbers=len(axes))


def fixed_in_words() -> str:
    """What stays the same along each axis."""
    return "; ".join(
        f"{axis}: " + ", ".join(f"{name} {size}" for name, size in at.items())
        for axis, at in FIXED.items()
    )


def about_table(about: Row) -> str:
    """Machine and versions."""
    machine = about["machine"]
    rows = [["machine", f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}"]]
    rows += [[name, version] for name, version in about["versions"].items()]
    rows.append(["measured", f"{about['date']}, {about['seconds'] / 60:.1f} minutes"])
    return markdown(["what", "which"], rows)


def text(run: Row) -> str:
    """The page."""
    about, records = run["about"], run["records"]
    warning = [
        f"{{attention}} {why}"
        for flag, why in (
            ("small", "A trial run of the smallest cases: its numbers say nothing."),
            ("stopped", "The run was stopped: parts are missing."),
            ("partial", "A run of some parts only."),
        )
        if about[flag]
    ]
    parts = [
        "# Benchmarks",
        *(f":::{line}\n:::" for line in warning),
        "Written by `make bench` from one run, kept in `docs/results/benchmarks.json`; "
        "`python tests/benchmarks/page.py` makes this page again from that file. A ratio is the "
        "time of the other over ours: above one, we are faster. Ratios carry over to other "
        "machines, milliseconds do not.",
        about_table(about),
        "`make bench` does not install `pogo-torch`, whose licence is the GPL; it is measured "
        "where it is there.",
    ]
    if records:
        parts += [
            "## Targets",
            verdict(records, about["threads"]),
            "![Ratio to each target](figures/benchmarks-targets.png)",
            "Each comparison that has a target, its result divided by the target: right of the "
            "line it is met.",
            targets_table(records, about["threads"]),
            "Two of the rows want a word. *All weights of a network*: the alternative makes one "
            "call of `torch-householder` for each frame shape and contracts each chain by a cached "
            "expression of `opt_einsum`, with the chain as its modes are written (prime factors, "
            "the published method) and merged as this package stores it; the target is held "
            'against both. *Linear inference* is that of `decompress(form="factors")`, two thin '
            "`nn.Linear`, as they are and with weights stored by columns (docs/training.md), which "
            "one vector is multiplied by sooner. `SpectralLinear` itself forms its factors in each "
            "forward, and stands below without a target.",
            "## Every comparison",
            every_record(records),
        ]
    if run["training"]:
        parts += [
            "## Training a whole network",
            "![Time and flops of each method](figures/benchmarks-training.png)",
            "One step of training (forward, backward, optimizer) of the same network, dense with "
            "Adam, by charts with Adam, and on the manifold with `RiemannianAdam`. *Plain factors* "
            "are two matrices of the same rank as free parameters, applied by the same plan and "
            "trained by Adam: the same arithmetic without frames, so that the last column is what "
            "a chart or a manifold costs beyond its arithmetic. Flops are "
            "counted by torch's `FlopCounterMode` over the step that is timed: matrix products, "
            "convolutions, triangular solves and Cholesky factorizations, forward, backward and in "
            "the optimizer, an addition and a multiplication as two. What goes element by element "
            "(norms, activations, Adam) is not in the count, but it is in the time of all.",
            training_table(run["training"]),
        ]
    if run["growth"]:
        parts += [
            "## How the time grows",
            "![Time of a training step against rank, width, depth and batch]"
            "(figures/benchmarks-growth.png)",
            f"A training step of square linear layers, {pictures.in_words(about['threads'][0])}. "
            f"Fixed along each axis: {fixed_in_words()}. Dashed: the flop count, scaled to meet "
            "the curve at its last point. Exponents are slopes of the logarithms over the upper "
            "half of the sizes, in brackets those of the flop count.",
            growth_table(run["growth"]),
        ]
    parts += [
        "## How it is measured",
        f"Competitors take turns in one process, {about['turns']} turns at most, in "
        f"{about['dtype']}, by {about['clock']} clock. A table shows medians, and the median of "
        "the ratios within a turn. A comparison ends early, after three turns, once it has used "
        "up its share of the "
        f"time. A competitor whose first call takes more than {AT_MOST:g} s is timed by that call "
        f"alone, and left out with more threads if it took more than {2 * AT_MOST:g} s. Before "
        "they are timed, competitors are held to the same result where they compute the same. "
        "Regrets are from the least time of each plan.",
    ]
    return "\n\n".join(parts) + "\n"


def make(docs: Path) -> Path:
    """Write page and figures next to the results, and return where the page is."""
    run = read(docs / RESULTS)
    figures = docs / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    for name, draw in (
        ("targets", pictures.targets),
        ("training", pictures.training),
        ("growth", pictures.growth),
    ):
        cases = run["records" if name == "targets" else name]
        path = figures / f"benchmarks-{name}.png"
        path.unlink(missing_ok=True)
        if cases:
            draw(cases, path)
    page = docs / "benchmarks.md"
    page.write_text(text(run), "utf-8")
    return page


if __name__ == "__main__":
    make_again(make, __doc__)
