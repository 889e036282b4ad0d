"""Memory that no one wrote, full of the worst values: what is read of it shows."""

from __future__ import annotations

import math
from typing import Any

import torch

_empty = torch.empty


def poisoned(*size: Any, **kwargs: Any) -> torch.Tensor:
    """As torch.empty, which it takes the place of."""
    made = _empty(*size, **kwargs)
    return made.fill_(math.nan) if made.is_floating_point() else made.fill_(-1)
