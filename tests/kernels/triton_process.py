"""Processes that find Triton where `make test` has put it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

__all__ = ["compile_within_bounds", "needs_triton", "run_with_triton"]

BESIDE = Path(sys.prefix) / "triton"
HAS_TRITON = importlib.util.find_spec("triton") is not None or (BESIDE / "triton").is_dir()
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")


def run_with_triton(cache: Path, *arguments: str, **environment: str) -> Any:
    """What a process prints that finds Triton, as JSON.

    Args:
        cache: folder for what Triton compiles.
        arguments: of Python.
        environment: variables beside those of this process.
    """
    path = os.pathsep.join([*sys.path, str(BESIDE)])
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=1200,
        env={**os.environ, "PYTHONPATH": path, "TRITON_CACHE_DIR": str(cache)} | environment,
    )
    assert not done.returncode, done.stderr[-3000:]
    return json.loads(done.stdout)


_BEFORE = """
import sys, json
sys.path.insert(0, sys.argv[1])
from compiling import usage
from sttp_manifold.frames._tiles import SIZES
found = []
def add(kernel, *arguments, **constants):
    used = usage(kernel, *arguments, **constants)
    found.append((kernel.__name__, constants.get("R"), *used))
"""
_AFTER = "\njson.dump(found, sys.stdout)\n"


def compile_within_bounds(cache: Path, code: str, count: int) -> None:
    """Compile kernels for GPUs that need not be there, and assert that programs of them fit.

    Args:
        cache: folder for what Triton compiles.
        code: calls ``add``, as :func:`compiling.usage`, for each; ``SIZES`` are there.
        count: of the kernels.
    """
    here = str(Path(__file__).parent)
    found = run_with_triton(cache, "-c", _BEFORE + code + _AFTER, here)
    assert len(found) == count
    for *case, registers, stack, shared, threads in found:
        used = *case, registers, stack, shared
        assert registers * threads <= 65536, used  # of one multiprocessor
        assert stack <= 1024, used
        assert shared <= 96 * 1024, used  # of one block, since compute capability 8.0
