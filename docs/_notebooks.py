"""Execute the notebooks of the repository for the documentation, what changed only.

Each runs in a process of its own, two at a time. A notebook is executed again when its code or
anything in the package has changed since, so that a page never shows what the code no longer does.

myst-nb can execute notebooks itself, one after the other, but knows nothing of the package.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parent
_SOURCES = _HERE.parent / "notebooks"
_PACKAGE = _HERE.parent / "sttp_manifold"
_KEPT = _HERE / "_build" / "executed"
_TIMEOUT = 100  # seconds for one cell, on a machine that does other things as well
# The client sometimes sleeps through an answer that has arrived (nbclient 0.10 and 0.11, ipykernel
# 6.31 and 7.4, two at a time). It mostly wakes at its timeout and goes on; else a new kernel does.
_ATTEMPTS = 6
_ASLEEP = ("CellTimeoutError", "Kernel didn't respond", "Timeout waiting for")


def prepare_notebooks(target: Path) -> None:
    """Put executed copies of all notebooks into a folder, and nothing else.

    Raises:
        RuntimeError: a notebook that fails, with what it said.
    """
    target.mkdir(exist_ok=True)
    sources = sorted(_SOURCES.glob("*.ipynb"))
    for stale in {path.name for path in target.glob("*.ipynb")} - {path.name for path in sources}:
        (target / stale).unlink()
    package = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        package.update(path.read_bytes())
    with ThreadPoolExecutor(max_workers=2) as pool:
        made = list(pool.map(lambda path: _executed(path, package.hexdigest()), sources))
    for path, notebook in zip(sources, made, strict=True):
        text = _with_outputs(path, notebook)
        copy = target / path.name
        # An unchanged file keeps its date, and Sphinx its page.
        if not copy.exists() or copy.read_text(encoding="utf-8") != text:
            copy.write_text(text, encoding="utf-8")


def _code(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def _executed(path: Path, package: str) -> dict[str, Any]:
    source = path.read_text(encoding="utf-8")
    cells = [cell["source"] for cell in _code(json.loads(source))]
    key = hashlib.sha256(json.dumps([package, cells]).encode()).hexdigest()[:16]
    kept = _KEPT / f"{path.stem}-{key}.ipynb"
    if not kept.exists():
        _KEPT.mkdir(parents=True, exist_ok=True)
        print(f"executing {path.name}", flush=True)
        fresh = kept.with_suffix(".new.ipynb")
        command = [sys.executable, "-m", "jupyter", "execute", f"--timeout={_TIMEOUT}"]
        for attempt in range(1, _ATTEMPTS + 1):
            done = subprocess.run(
                [*command, f"--output={fresh}", str(path)],
                cwd=path.parent,
                env={**os.environ, "PYTHONPATH": str(_PACKAGE.parent)},
                capture_output=True,
                text=True,
            )
            if not done.returncode or not any(sign in done.stderr for sign in _ASLEEP):
                break
            print(f"{path.name}: no answer in {_TIMEOUT} s, attempt {attempt}", flush=True)
        if done.returncode or not fresh.exists():
            raise RuntimeError(f"{path.name} failed:\n{done.stderr[-4000:]}")
        for older in _KEPT.glob(f"{path.stem}-*.ipynb"):
            if older != fresh:
                older.unlink()
        fresh.replace(kept)
    return json.loads(kept.read_text(encoding="utf-8"))


def _with_outputs(path: Path, executed: dict[str, Any]) -> str:
    """The notebook as it is now, with the outputs of its cells and links that hold in docs/."""
    notebook = json.loads(path.read_text(encoding="utf-8").replace("](../docs/", "](../"))
    for cell, done in zip(_code(notebook), _code(executed), strict=True):
        # A slider needs a kernel to talk to; a figure after it stands in for it.
        live = "remove-output" in cell["metadata"].get("tags", [])
        cell["outputs"] = [] if live else done["outputs"]
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
