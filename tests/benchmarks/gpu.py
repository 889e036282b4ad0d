"""Speed on a GPU: ``make bench-gpu``, in less than eight minutes.

Each table is measured in a process of its own, so that what goes wrong on the device in one (an
illegal access ends all of a process) leaves the others alone. Writes ``results/gpu-<name>.json`` in
the folder of the documentation and the page of all such files (:mod:`gpu_page`). Without a GPU, or
with ``--small``, it is a trial: tiny sizes, written to ``runs/benchmarks``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gpu_page
import torch
from gpu_cases import TABLES, Case
from gpu_meter import Cuda, StandIn, in_turn, meter
from peers import versions
from timing import Work

ROOT = Path(__file__).resolve().parents[2]
# Shares of the time, in all less than eight minutes with what it takes to start four processes.
SECONDS = {"steps": 120.0, "charts": 70.0, "training": 180.0, "inference": 30.0}


def options() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    found.add_argument("--turns", type=int, default=15, help="times that each competitor runs")
    found.add_argument("--docs", type=Path, help="folder to write to")
    found.add_argument("--small", action="store_true", help="tiny sizes, as a trial")
    found.add_argument("--table", choices=list(TABLES), help=argparse.SUPPRESS)
    return found


def measured(device: Cuda | StandIn, case: Case, turns: int, deadline: float) -> list[Any]:
    """A record for each competitor of a case; of one that fails or comes too late, why."""
    works: dict[tuple[str, str], Work] = {}
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for who, way, make in case.competitors:
        record = found[who, way] = {"case": case.name, "who": who, "way": way}
        if time.perf_counter() > deadline:
            record["note"] = "no time was left"
            continue
        try:
            works[who, way], peak = device.peak(make)
            record |= {"peak_mb": round(peak, 3), "kernels": device.kernels(works[who, way])}
        except Exception as error:
            works.pop((who, way), None)
            said = str(error).strip() or "no reason given"
            record["note"] = f"failed ({type(error).__name__}: {said.splitlines()[0][:150]})"
            if "illegal memory access" in said:
                break  # nothing works on the device from here on
    for key, value in in_turn(device, works, turns).items():
        found[key]["ms"] = value
    return list(found.values())


def child(table: str, small: bool, turns: int) -> None:
    """Measure one table, a line of JSON a competitor."""
    device, deadline = meter(), time.perf_counter() + 0.8 * SECONDS[table]
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")
    for case in TABLES[table](device, small):
        for record in measured(device, case, turns, deadline):
            print(json.dumps({"table": table, **record}), flush=True)


def parent(small: bool, turns: int) -> list[Any]:
    """Records of all tables; of a process that ended before its time, how."""
    found: list[Any] = []
    for table in TABLES:
        command = [sys.executable, __file__, "--table", table, "--turns", str(turns)]
        began, note = time.perf_counter(), ""
        try:
            done = subprocess.run(
                [*command, *(["--small"] if small else [])],
                capture_output=True, text=True, timeout=SECONDS[table],
            )  # fmt: skip
            out = done.stdout
            if done.returncode:
                tail = done.stderr.strip().splitlines()
                note = f"ended with an error ({tail[-1][:200] if tail else done.returncode})"
        except subprocess.TimeoutExpired as late:
            out = (late.stdout or b"").decode() if isinstance(late.stdout, bytes) else ""
            note = f"stopped after {SECONDS[table]:g} s"
        found += [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        if note:
            found.append({"table": table, "case": "", "who": "the rest", "way": "", "note": note})
        print(f"{table}: {time.perf_counter() - began:.0f} s {note}", flush=True)
    return found


def main() -> None:
    """Measure, and write file and page."""
    arguments = options().parse_args()
    small = arguments.small or not torch.cuda.is_available()
    if arguments.table:
        child(arguments.table, small, arguments.turns)
        return
    if small and not arguments.small:
        print("no GPU is there: a trial of tiny sizes on the CPU in its place")
    device, start = meter(), time.perf_counter()
    records = parent(small, arguments.turns)
    about = {
        "device": device.name,
        "versions": versions() | {"cuda": torch.version.cuda or "none"},
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "seconds": time.perf_counter() - start,
        "turns": arguments.turns,
        "small": small,
        "of": "this package",
        "note": "",
    }
    docs = arguments.docs or ROOT / ("runs/benchmarks" if small else "docs")
    name = re.sub(r"[^a-z0-9]+", "-", device.name.lower()).strip("-")
    path = docs / "results" / f"gpu-{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(gpu_page.as_json(about, records), "utf-8")
    print(f"{about['seconds']:.0f} s in all; {gpu_page.make(docs)} is written")


if __name__ == "__main__":
    main()
