"""What every test starts from: few threads, one seed, the default dtype put back."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from types import ModuleType

os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch
from benchmark_scripts import BENCHMARKS
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

# Shapes written in signatures are checked here, and only here; before the package is imported.
install_import_hook(["sttp_manifold.frames.householder"], "beartype.beartype")

# Drawing a shape and decomposing a matrix takes as long as it takes.
settings.register_profile(
    "default", deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("ci", settings.get_profile("default"), derandomize=True, print_blob=True)
settings.register_profile("thorough", settings.get_profile("default"), max_examples=300)
_PROFILE = "ci" if os.environ.get("CI") else "default"
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", _PROFILE))

# The matrices here are small: threads cost more than they bring.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """Seed the global generator, and put back the default dtype that a test may have changed."""
    dtype = torch.get_default_dtype()
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(dtype)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Import a benchmark, as its own script would what lies beside it."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module
