"""Tensors that are equal up to rounding."""

from __future__ import annotations

import torch
from torch import Tensor


def close(a: Tensor, b: Tensor, tolerance: float = 1e-11) -> None:
    """Assert it, by a tolerance that is relative and absolute."""
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
