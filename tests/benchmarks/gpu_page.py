"""The page of what was measured on GPUs, from the files that `gpu.py` has left.

``python tests/benchmarks/gpu_page.py`` makes it again without measuring anything.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from page_command import make_again
from timing import markdown

TITLES = {
    "steps": "An optimizer's step",
    "charts": "Charts, forward and backward",
    "training": "A step of training",
    "inference": "Inference",
}
WAYS = {
    "eager": "each call as Python makes it",
    "captured": "a graph of kernels, replayed",
    "compiled": "`torch.compile(model)`",
}
Row = Mapping[str, Any]


def as_json(about: Row, records: Sequence[Row]) -> str:
    """A file of results, a record a line."""
    lines = ",\n".join(json.dumps(record) for record in records)
    return f'{{"about": {json.dumps(about, indent=1)},\n"records": [\n{lines}\n]}}\n'


def table(records: Sequence[Row]) -> str:
    """One row a competitor; what is missing says why."""
    rows = []
    for r in records:
        numbers = [f"{r['ms']:.3g}" if "ms" in r else ""]
        numbers += [str(r.get("kernels", "")), f"{r['peak_mb']:.4g}" if "peak_mb" in r else ""]
        rows.append([r["case"], r["who"], r["way"], *numbers, r.get("note", "")])
    header = ["case", "who", "way", "ms", "kernels", "peak MB", "note"]
    return markdown(header, rows)


def section(run: Row) -> str:
    """What one file says."""
    about = run["about"]
    versions = ", ".join(
        f"{name} {about['versions'][name]}"
        for name in ("torch", "cuda", "geoopt")
        if name in about["versions"]
    )
    parts = [f"## {about['device']}: {about['of']}"]
    if about["small"]:
        parts.append(":::{attention}\nA trial of tiny sizes: its numbers say nothing.\n:::")
    parts.append(f"{versions}; {about['date']}.")
    if about["note"]:
        parts.append(about["note"])
    for key, title in TITLES.items():
        mine = [record for record in run["records"] if record["table"] == key]
        if mine:
            parts += [f"### {title}", table(mine)]
    return "\n\n".join(parts)


def text(runs: Sequence[Row]) -> str:
    """The page."""
    measured = [run for run in runs if run["about"]["of"] == "this package"]
    none = "**No run of this package as it is now has been made on a GPU yet.** "
    ways = "; ".join(f"*{way}*: {what}" for way, what in WAYS.items())
    parts = [
        "# Measured on a GPU",
        "`make bench-gpu` measures this package on the GPU that is there, in less than eight "
        "minutes, writes `docs/results/gpu-<name>.json`, and makes this page from all such files "
        "(`python tests/benchmarks/gpu_page.py` makes it again). "
        + ("" if measured else none + "What follows is from records of earlier code, as named."),
        "Float32, TF32 off. Times are medians by CUDA events, the device idle before each call, so "
        "that launches count; competitors take turns. Kernels are those that the profiler sees in "
        f"one call, copies included; memory is the most that a competitor adds. {ways}.",
        *map(section, runs),
    ]
    return "\n\n".join(parts) + "\n"


def make(docs: Path) -> Path:
    """Write the page next to the results, and return where it is."""
    files = sorted((docs / "results").glob("gpu-*.json"))
    page = docs / "gpu.md"
    page.write_text(text([json.loads(file.read_text("utf-8")) for file in files]), "utf-8")
    return page


if __name__ == "__main__":
    make_again(make, __doc__)
