"""The packages that are measured against, and whether they are there.

``python tests/benchmarks/peers.py`` installs the requirements of the extra ``bench`` one by one,
and goes on without those that fail; with ``--newest`` it resolves them anew, past the pins.
``pogo-torch`` is not among them (its licence is the GPL); it takes part where somebody has
installed it.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import re
import subprocess
import sys
import warnings
from functools import cache
from importlib import metadata
from pathlib import Path
from types import ModuleType

# Distribution and the module that it brings.
PEERS = {
    "geoopt": "geoopt",
    "geotorch": "geotorch",
    "opt_einsum": "opt_einsum",
    "pogo-torch": "pogo",
    "tensorly-torch": "tltorch",
    "torch-householder": "torch_householder",
}
ROOT = Path(__file__).resolve().parents[2]


@cache
def _found(name: str) -> ModuleType | str:
    """The module of a peer, or in words why it cannot be had."""
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(PEERS[name])
    except Exception as error:  # whatever a peer raises on import, the others go on
        return f"does not import ({type(error).__name__})"


def peer(name: str) -> ModuleType | None:
    """The module of a distribution, or None."""
    found = _found(name)
    return None if isinstance(found, str) else found


def absence(*names: str) -> str | None:
    """Why the first of these peers that cannot be had cannot, or None."""
    missing = (f"{name} {found}" for name in names if isinstance(found := _found(name), str))
    return next(missing, None)


def versions() -> dict[str, str]:
    """Version of everything that the numbers depend on; of a missing peer, why it is missing."""
    found = {"python": platform.python_version()}
    for name in ("torch", "numpy", "sttp-manifold"):
        found[name] = metadata.version(name)
    for name in PEERS:
        what = _found(name)
        found[name] = what if isinstance(what, str) else metadata.version(name)
    return found


def machine() -> dict[str, object]:
    """The machine in words."""
    cpuinfo = Path("/proc/cpuinfo")
    model = platform.processor() or platform.machine()
    if cpuinfo.exists():
        named = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        model = named[1].strip() if named else model
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    system = f"{platform.system()} {platform.machine()}"
    return {"cpu": model, "cores": usable, "system": system}


def install(newest: bool = False) -> list[str]:
    """Install the extra ``bench``, one requirement at a time; return those that failed.

    Args:
        newest: whether to leave the pins of ``constraints.txt`` out.
    """
    wanted = [
        requirement.split(";")[0].strip()
        for requirement in metadata.requires("sttp-manifold") or []
        if re.search(r"extra == ['\"]bench['\"]", requirement)
    ]
    # Without isolation, since torch-householder builds against the torch that is here.
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "install"]
    pip += ["--quiet", "--no-build-isolation"]
    pip += [] if newest else ["-c", str(ROOT / "constraints.txt")]
    subprocess.run([*pip, "setuptools", "wheel"], check=False)
    return [name for name in wanted if subprocess.run([*pip, name], check=False).returncode]


def main() -> None:
    """Install, say what failed, and fail if anything did."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--newest", action="store_true", help="resolve anew, past the pins")
    failed = install(parser.parse_args().newest)
    for name in failed:
        print(f"{name}: cannot be installed here; the benchmarks go on without it, and say so")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
