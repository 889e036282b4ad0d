"""What a dtype can hold: where half precision is widened, and how equal is equal."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["closeness", "is_half", "widened"]


def is_half(dtype: torch.dtype) -> bool:
    """Whether LAPACK has no factorizations in a dtype."""
    return dtype in (torch.float16, torch.bfloat16)


def widened(x: Tensor) -> Tensor:
    """``x`` in float32 if it is in half precision."""
    return x.float() if is_half(x.dtype) else x


def closeness(dtype: torch.dtype) -> float:
    """Relative difference up to which two weights of a dtype are equal."""
    if dtype == torch.float64:
        return 1e-10
    return max(1e-5, 16 * torch.finfo(dtype).eps)
