"""The scripts of benchmarks, as tests run and import them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent / "benchmarks"


def run_script(name: str, *options: str, seconds: float) -> str:
    """What one says that is run in a process of its own, by one thread.

    Args:
        name: of its file.
        options: of its command.
        seconds: how long it may take.
    """
    path = os.pathsep.join([str(BENCHMARKS.parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / name), *options],
        check=True,
        capture_output=True,
        text=True,
        timeout=seconds,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path.rstrip(os.pathsep)},
    )
    return done.stdout
