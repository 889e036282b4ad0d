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

__all__ = ["needs_triton", "run_with_triton"]

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
