"""All benchmarks in one process: ``make bench``.

Writes ``results/benchmarks.json`` in the folder of the documentation, then page and figures from it
(:mod:`page`). What is less than a whole run (some parts, small cases, or stopped by Ctrl-C) goes to
``runs/benchmarks`` instead, unless ``--docs`` says where.
"""

from __future__ import annotations

import argparse
import datetime
import time
from pathlib import Path
from typing import Any

import torch
from growth import AXES, SECONDS, growth_cases
from page import RESULTS, make
from peers import PEERS, absence, machine, versions
from records import Setting, write
from targets import PARTS
from timing import CLOCKS, Timer
from training import network_cases

ROOT = Path(__file__).resolve().parents[2]
SMALL_SIZES = {"rank": (2, 4), "width": (16, 32), "depth": (1, 2), "batch": (1, 2)}
SMALL_FIXED = {"rank": 2, "width": 16, "depth": 1, "batch": 2}
GROWTH, TRAINING = "growth", "training"
EVERY = [*PARTS, TRAINING, GROWTH]


def counts(text: str) -> list[int]:
    """Numbers of threads, as ``1,2``."""
    return [int(count) for count in text.split(",")]


def options() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    found.add_argument("parts", nargs="*", help=f"of {', '.join(EVERY)}; all if none is named")
    found.add_argument("--turns", type=int, default=15, help="times that each competitor runs")
    found.add_argument("--threads", type=counts, help="default: 1,2, or 1 by --clock cpu")
    found.add_argument(
        "--clock", choices=list(CLOCKS), default="wall", help="cpu: one thread, busy machine"
    )
    found.add_argument(
        "--docs", type=Path, help="folder to write to; default: docs, or runs/benchmarks if partial"
    )
    found.add_argument("--small", action="store_true", help="the smallest cases only, as a trial")
    return found


def measure(part: str, setting: Setting, first: bool) -> dict[str, list[Any]]:
    """One part, with the threads that are set."""
    if part == TRAINING:
        cases = network_cases(setting.within(6.0), setting.threads, setting.small)
        return {"training": cases}
    if part == GROWTH:
        if not first:
            return {}
        timer = setting.within(SECONDS)
        sizes, fixed = (SMALL_SIZES, SMALL_FIXED) if setting.small else (AXES, None)
        return {"growth": [c for a in AXES for c in growth_cases(timer, a, sizes[a], fixed)]}
    return {"records": list(PARTS[part](setting))}


def main() -> None:
    """Measure, and write file, page and figures."""
    parser = options()
    arguments = parser.parse_args()
    unknown = set(arguments.parts) - set(EVERY)
    if unknown:
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(EVERY)}")
    cpu = arguments.clock == "cpu"
    threads = arguments.threads or ([1] if cpu else [1, 2])
    if cpu and threads != [1]:
        parser.error("--clock cpu adds up the time of all threads; leave --threads out")
    for name in PEERS:
        if (why := absence(name)) is not None:
            print(f"{why}: measured without it")
    found: dict[str, list[Any]] = {"records": [], "training": [], "growth": []}
    timer, slow = Timer(arguments.turns, CLOCKS[arguments.clock]), {}
    seconds: dict[str, float] = {}
    start = time.perf_counter()
    stopped = False
    try:
        for count in threads:
            torch.set_num_threads(count)
            setting = Setting(timer, count, arguments.small, slow)
            for part in arguments.parts or EVERY:
                torch.manual_seed(0)
                began = time.perf_counter()
                for key, value in measure(part, setting, count == threads[0]).items():
                    found[key] += value
                took = time.perf_counter() - began
                seconds[part] = seconds.get(part, 0.0) + took
                print(f"{part}, {count} thread(s): {took:.0f} s", flush=True)
    except KeyboardInterrupt:
        stopped = True
        print("stopped; what is done is kept")
    about = {
        "machine": machine(),
        "versions": versions(),
        "threads": threads,
        "turns": arguments.turns,
        "clock": arguments.clock,
        "dtype": "float32",
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "seconds": time.perf_counter() - start,
        "seconds_by_part": seconds,
        "small": arguments.small,
        "stopped": stopped,
        "partial": bool(arguments.parts),
    }
    whole = not (arguments.parts or arguments.small or stopped)
    docs = arguments.docs or ROOT / ("docs" if whole else "runs/benchmarks")
    write(docs / RESULTS, about, found)
    print(f"{time.perf_counter() - start:.0f} s in all; {make(docs)} is written")


if __name__ == "__main__":
    main()
