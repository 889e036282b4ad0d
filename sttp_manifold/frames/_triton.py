"""Whether kernels of Triton can run: asked without importing it."""

from __future__ import annotations

import importlib.util
import os
from functools import cache

import torch

__all__ = ["has_triton", "runs_on"]


@cache
def has_triton() -> bool:
    """Whether Triton is installed, which comes with torch for CUDA only."""
    return importlib.util.find_spec("triton") is not None


def runs_on(device: torch.device) -> bool:
    """Whether kernels run on a device: a GPU, or in tests Triton's interpreter in its place."""
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
