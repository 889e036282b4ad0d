"""What a dtype can hold: where half precision is widened, and how equal is equal."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["autocast_is_on", "closeness", "computing_dtype", "is_half", "widened"]


def is_half(dtype: torch.dtype) -> bool:
    """Whether LAPACK has no factorizations in a dtype."""
    return dtype in (torch.float16, torch.bfloat16)


def computing_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype in which numbers of a dtype are computed with: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def widened(x: Tensor) -> Tensor:
    """``x`` in float32 if it is in half precision."""
    return x.to(computing_dtype(x.dtype))


def autocast_is_on(kind: str) -> bool:
    """Whether autocast is on for a type of device.

    Of a device without any, as meta, torch refuses to say; and ``torch.compile`` of torch 2.9 to
    2.11 stumbles over the question whether there is any.
    """
    if torch.compiler.is_compiling():
        return kind != "meta" and torch.is_autocast_enabled(kind)
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def closeness(dtype: torch.dtype) -> float:
    """Relative difference up to which two weights of a dtype are equal."""
    if dtype == torch.float64:
        return 1e-10
    return max(1e-5, 16 * torch.finfo(dtype).eps)
