"""Networks of spectral layers, and the comparison of their weights with weights formed alone."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sttp_manifold.nn import SpectralConv2d, SpectralLinear, together
from sttp_manifold.tt import SPECTRA

DOUBLE = {"dtype": torch.float64}

every_spectrum = pytest.mark.parametrize("spectrum", SPECTRA)


class Block(nn.Module):
    """Two equal convolutions and a shortcut, as networks are mostly made."""

    def __init__(self, width: int, method: str, spectrum: str) -> None:
        super().__init__()
        how = {"method": method, "spectrum": spectrum, "init": "random", **DOUBLE}
        self.first = SpectralConv2d(width, width, 3, 4, padding=1, **how)
        self.second = SpectralConv2d(width, width, 3, 4, padding=1, **how)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x).tanh())


class Net(nn.Module):
    """Weights in all three forms: formed, as two factors, and as cores."""

    def __init__(self, method: str = "householder", spectrum: str = "free") -> None:
        super().__init__()
        how = {"method": method, "spectrum": spectrum, "init": "random", **DOUBLE}
        self.blocks = nn.ModuleList(Block(8, method, spectrum) for _ in range(3))
        self.wide = nn.ModuleList(SpectralConv2d(8, 8, 3, 2, padding=1, **how) for _ in range(2))
        self.linears = nn.ModuleList(SpectralLinear(60, 60, 6, **how) for _ in range(2))
        self.middle: Callable[[], None] = lambda: None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        self.middle()
        for layer in self.wide:
            x = layer(x).tanh()
        x = x.flatten(1)[:, :60]
        for layer in self.linears:
            x = layer(x)
        return x


def made(method: str = "householder", spectrum: str = "free", seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return together(Net(method, spectrum))


def image(count: int = 2, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 8, 4, 4, generator=generator, **DOUBLE)


def gradients(model: nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def run(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    """Output and gradients of a scalar of it."""
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    return y.detach(), gradients(model)


def alone(model: nn.Module) -> nn.Module:
    """A copy whose layers compute their own weights."""
    return together(copy.deepcopy(model), False)


def agree(ours: tuple[Tensor, list], wanted: tuple[Tensor, list]) -> None:
    torch.testing.assert_close(ours[0], wanted[0], rtol=1e-10, atol=1e-12)
    assert [g is None for g in ours[1]] == [g is None for g in wanted[1]]
    for mine, other in zip(ours[1], wanted[1], strict=True):
        if mine is not None:
            torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-11)


def warm(model: nn.Module, x: Tensor, taken: list[bool]) -> None:
    """The first forward finds out what the next ones need."""
    for _ in range(2):
        run(model, x)
    assert taken
    assert all(taken)
    taken.clear()


class Heads(nn.Module):
    """Parts that share nothing; one of them may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(
            SpectralLinear(12, 12, 4, init="random", **DOUBLE) for _ in "abc"
        )
        self.leave_out: set[int] = set()

    def forward(self, x: Tensor) -> list[Tensor]:
        return [part(x) for k, part in enumerate(self.parts) if k not in self.leave_out]


def run_script(script: str, *arguments: str) -> subprocess.Popen[bytes]:
    """A process of its own: import hooks of the tests stay out of it."""
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
