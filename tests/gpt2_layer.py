"""Hugging Face's `Conv1D`, or one like it under its name where transformers is not installed."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

try:
    from transformers.pytorch_utils import Conv1D
except ImportError:

    class Conv1D(nn.Module):  # type: ignore[no-redef]
        def __init__(self, nf: int, nx: int) -> None:
            super().__init__()
            self.nf, self.nx = nf, nx
            self.weight = nn.Parameter(torch.empty(nx, nf).normal_(std=0.02))
            self.bias = nn.Parameter(torch.zeros(nf))

        def __repr__(self) -> str:
            return f"Conv1D(nf={self.nf}, nx={self.nx})"

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight + self.bias

    Conv1D.__module__ = "transformers.pytorch_utils"
    _found: Any = ModuleType(Conv1D.__module__)
    _found.Conv1D = Conv1D
    sys.modules[Conv1D.__module__] = _found


def conv1d(nf: int, nx: int, dtype: torch.dtype | None = None) -> nn.Module:
    """One with a bias that is not zero."""
    layer = Conv1D(nf, nx)
    nn.init.uniform_(layer.bias)
    return layer if dtype is None else layer.to(dtype)
