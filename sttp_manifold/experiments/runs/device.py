"""What a run runs on: the device, its threads, and the versions that decide the numbers."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version

import torch

from sttp_manifold.errors import ConfigError
from sttp_manifold.experiments.distributed import processes

__all__ = ["DTYPES", "device_in_words", "one_thread", "resolve_device", "versions"]

DTYPES = {"float32": torch.float32, "float64": torch.float64}


def versions() -> dict[str, str]:
    """Versions of whatever decides the numbers."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for key, package in (
        ("geoopt", "geoopt"),
        ("numpy", "numpy"),
        ("sttp_manifold", "sttp-manifold"),
    ):
        try:
            found[key] = version(package)
        except PackageNotFoundError:
            found[key] = "not installed"
    return found


def resolve_device(name: str) -> str:
    """The device that a name stands for here: ``auto`` is a CUDA GPU if there is one, else the CPU.

    Raises:
        ConfigError: no such device, or not on this machine.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise ConfigError(f"unknown device {name!r}. The devices are: auto, cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device 'cuda' asked for, but torch finds no CUDA GPU; use --device auto")
    return name


def device_in_words(device: str) -> str:
    """What a device is, for the record."""
    count = processes()
    shared = "" if count == 1 else f", {count} processes"
    if device == "cuda":
        return f"cuda: {torch.cuda.get_device_name()}{shared}"
    return f"cpu: {platform.machine()}, 1 thread{shared}"


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread, so that sums are added in one order whatever runs beside this."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
